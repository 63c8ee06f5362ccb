"""Rows of different lengths as one tensor, so that a batch of images takes no more operations than one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of these lengths, on a device."""

    lengths: list[int]
    device: torch.device

    @property
    def width(self) -> int:
        """The longest."""
        return max(self.lengths)

    @cached_property
    def _slots(self) -> Tensor | None:
        """Where the elements of all rows stand among those of the padded ones; None if all are equally long.

        Made on the device, so that nothing is copied there.
        """
        if min(self.lengths) == self.width:
            return None
        sections = [part for n in self.lengths for part in (n, self.width - n)]
        everywhere = torch.arange(sum(sections), device=self.device)
        return torch.cat(everywhere.split(sections)[::2])

    def joined(self, *kinds: Sequence[Tensor]) -> Tensor:
        """Of each kind vectors of these lengths, as one tensor [kinds, I, width] with zeros behind the shorter ones."""
        flat = torch.stack([torch.cat(list(parts)) for parts in kinds])
        if self._slots is not None:
            rows = flat.new_zeros(len(kinds), len(self.lengths) * self.width)
            flat = rows.index_copy_(1, self._slots, flat)
        return flat.view(len(kinds), len(self.lengths), self.width)

    def parted(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows [I, width or more] as vectors of these lengths."""
        rows = rows[:, : self.width]
        at = self._slots
        flat: Tensor = rows.reshape(-1) if at is None else rows.flatten().index_select(0, at)
        vectors: Sequence[Tensor] = flat.split(self.lengths)
        return vectors

    def ascending(self, order: Tensor) -> Tensor:
        """The first places of each row of an order [I, width or more], ascending; behind them what says nothing."""
        order = order[:, : self.width]
        if self._slots is not None:
            real = torch.zeros(order.numel(), dtype=torch.bool, device=self.device).index_fill_(0, self._slots, True)
            order = order.where(real.view(order.shape), torch.iinfo(order.dtype).max)
        return order.sort(1).values
