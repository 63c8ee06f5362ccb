"""`PromptState`: which visual tokens of a batch of prompts are left, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import DeferredChecks
from ..kernels.dispatch import Backend
from .clock import Clock
from .compaction import Compaction
from .result import UnitResult
from .units import TokenGroup, Unit
from .visual import Assignment

# A merge in a row: the slots of a unit's tokens when a stage saw them, and the answer.
Merge = tuple[int, Tensor, Assignment]


@dataclass
class PromptState:
    """Rows of tokens while stages run. A position counts tokens as fed, a slot counts those that are left.

        positions   0    1    2    3    4    5          positions 2 and 4 were dropped:
        slots       0    1    -    2    -    3          position 5 stands in slot 3

    units: the images and videos of all rows. groups: what is left of each.
    hidden: [B, n, D] states in the current slots; or a list of [n, D], where rows differ in length.
    keep: [B, L] bool on the device, or a list of [L]: the positions that are left. counts: its row sums, on the host.
    whole: the cut from positions to slots; None while nothing was cut, when a slot is a position. step: its last part.
    merges: what was merged since the last cut. results: one `UnitResult` a unit and stage. notes: fallbacks in words.
    method_state: by the number of a stage, what its method keeps from unit to unit (`Visual.state`).
    checks: conditions whose results are on their way to the host.
    """

    units: list[Unit]
    groups: list[TokenGroup]
    hidden: Any
    keep: Any
    counts: list[int]
    whole: Compaction | None = None
    step: Compaction | None = None
    merges: list[Merge] = field(default_factory=list)
    results: list[UnitResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    method_state: dict[int, dict[str, Any]] = field(default_factory=dict)
    clocks: list[Clock] = field(default_factory=list)
    kernels: dict[str, Backend] = field(default_factory=dict)
    checks: list[DeferredChecks] = field(default_factory=list)

    def slots(self, row: int, positions: Tensor) -> Tensor:
        """Where tokens of a row stand in the current states: [K] int64 -> [K] int64."""
        return positions if self.whole is None else self.whole.src[row].index_select(0, positions)

    def shrink(self, group: TokenGroup, idx: Tensor) -> None:
        """Cut a group down to its tokens idx [K], ascending."""
        row = group.unit.row
        self.counts[row] += idx.shape[0] - group.positions.shape[0]
        keep = self.keep[row]
        keep.index_fill_(0, group.positions, False)
        group.keep(idx)
        keep.index_fill_(0, group.positions, True)

    def write(self, row: int, slots: Tensor, states: Tensor) -> None:
        """Put states [K, D] in the slots [K] of a row; tensors that others hold are not changed."""
        if isinstance(self.hidden, list):
            self.hidden[row] = self.hidden[row].index_put((slots,), states)
        else:
            self.hidden = self.hidden.index_put((torch.full_like(slots, row), slots), states)

    def cut(self) -> None:
        """Make `whole` and `step` of what is left by now."""
        whole = Compaction.of(self.keep, self.counts)
        if self.whole is None:
            self.step = whole
        else:
            now = self.keep.gather(1, self.whole.index)
            now = now if self.whole.valid is None else now & self.whole.valid
            self.step = Compaction.of(now, self.counts)
        self.whole = whole

    def note(self, text: str | None) -> None:
        """Say something in `Last.notes`, once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def raise_if_failed(self) -> None:
        """Raise what the checks of the stages found; the caller gets no answer that was computed from bad input."""
        while self.checks:
            self.checks.pop(0).raise_if_failed()


def side_by_side(features: Sequence[Tensor], units: Sequence[Unit], rows: int) -> list[Tensor]:
    """Features [N, D] of images and videos, one after the other in their rows: [L, D] each."""
    parts: list[list[Tensor]] = [[] for _ in range(rows)]
    for x, unit in zip(features, units):
        parts[unit.row].append(x)
    return [torch.cat(row) for row in parts]
