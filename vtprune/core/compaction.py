"""`Compaction`: which tokens of a batch stay, and how to cut and restore everything that has their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.compact.reference import places
from .masks import hidden_like, hide


@dataclass(frozen=True)
class Compaction:
    """Rows of L tokens shortened to n, left-padded where rows keep different counts.

    index: [B, n] int64, the original position of each kept token (at pads: any position).
    valid: [B, n] bool, False at pads; None when every row keeps n tokens.
    src: [B, L] int64, the slot that answers for each original position: its own if kept, else that of the last kept
        token before it (the first kept one, if there is none before).
    """

    index: Tensor
    valid: Tensor | None
    src: Tensor

    @classmethod
    def of(cls, keep: Tensor, counts: Sequence[int]) -> Compaction:
        """From a mask [B, L] (bool, True = stays) and its row sums, which the host knows: no device sync."""
        return cls(*places(keep, counts))

    @property
    def kept(self) -> Tensor:
        """[B, L] bool: which of the original positions stay."""
        kept = self.index.gather(1, self.src) == torch.arange(self.length, device=self.src.device)
        return kept if self.valid is None else kept & self.valid.gather(1, self.src)

    @property
    def n(self) -> int:
        """Kept tokens per row, pads included."""
        return self.index.shape[1]

    @property
    def length(self) -> int:
        """Tokens per row before."""
        return self.src.shape[1]

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """Shorten dimension `dim` (size L) to n; the dimension before it is the batch (size B or 1)."""
        dim = dim % x.dim()
        index = self.index.to(x.device)
        if index.shape[0] == 1:
            return x.index_select(dim, index[0])
        batch = dim - 1
        if x.shape[batch] == 1:
            x = x.expand(*x.shape[:batch], index.shape[0], *x.shape[dim:])
        shape = [1] * x.dim()
        shape[batch], shape[dim] = index.shape
        size = list(x.shape)
        size[dim] = self.n
        return x.gather(dim, index.view(shape).expand(size))

    def cut_all(self, value: Any) -> Any:
        """Position ids ([.., B, L]) or rotary embeddings ([.., B, L, d], in tuples or dicts) of a layer, shortened."""
        if isinstance(value, tuple):
            return tuple(self.cut_all(v) for v in value)
        if isinstance(value, dict):
            return {k: self.cut_all(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        return self.cut(value, -2 if value.is_floating_point() else -1)

    def restore(self, h: Tensor) -> Tensor:
        """[B, n, ...] -> [B, L, ...]: every original position gets the state that answers for it."""
        src = self.src.to(h.device)
        if src.shape[0] == 1:
            return h.index_select(1, src[0])
        return h.gather(1, src.view(*src.shape, *[1] * (h.dim() - 2)).expand(*src.shape, *h.shape[2:]))

    def then(self, after: Compaction) -> Compaction:
        """This cut followed by `after` (which counts in slots of this one), as one cut of the original rows."""
        return Compaction(self.index.gather(1, after.index), after.valid, after.src.gather(1, self.src))

    def cut_mask(self, mask: Tensor, past: int) -> Tensor:
        """Shorten an attention mask whose columns are [past | L new tokens | room of a static cache].

        mask: [B, K] (1 = real token) or [B or 1, 1, L, K] (bool, True = may attend; or additive float).
        The room of a static cache grows by what is dropped, so that its width stays K.
        """
        length, tail = self.length, mask.shape[-1] - past - self.length
        index = self.index.to(mask.device)
        if mask.dim() == 4:
            batch, heads = max(index.shape[0], mask.shape[0]), mask.shape[1]
            index, mask = index.expand(batch, -1), mask.expand(batch, *mask.shape[1:])
            rows = index[:, None, :, None].expand(batch, heads, self.n, mask.shape[-1])
            mask = mask.gather(2, rows)
            index = index[:, None, None, :].expand(batch, heads, self.n, self.n)
        new = mask[..., past : past + length].gather(-1, index)
        if self.valid is not None:
            new = hide(new, self.valid)
        parts = [mask[..., :past], new]
        if tail > 0:
            parts += [mask[..., past + length :], hidden_like(mask, (*new.shape[:-1], length - self.n))]
        return torch.cat(parts, dim=-1)
