"""TransPrune: keep the visual tokens that layers transform most and that the text looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels import check_finite
from ...registry import register
from ...types import Assignment, Method, Positions, Signal, Stage, Visual, Where
from .. import best_first, budget_of, select, signal_of
from .schedule import check_layers, check_one, check_shares, in_steps_of

FROM_TEXT = Signal("from_text", 0)
PUBLISHED = (7, 9, 12)  # of 32 layers
SHARES = (0.875, 0.625, 0.125)


@register("transprune", paper="https://github.com/liaolea/TransPrune", seam="in_llm")
@dataclass(frozen=True)
class TransPrune(Method):
    """Top-k of TTV + IGA at three layers, with fewer tokens each time; each term is divided by its sum over the unit.

    TTV is the transition of a token (`Signal("transition")`) summed over the layers from the one before the first
    stage to the one before this stage. IGA is the attention that the text behind the first visual token gives it in
    the layer about to run. `keep` is what the last stage leaves; earlier stages drop 1/7 and 3/7 of what it drops, the
    published proportion (keep=0.125 gives 0.875, 0.625, 0.125). A count is multiplied by 7 and 5 there. Without keep:
    the published list, and in a `Stage` of your own half of the tokens it sees. Counts are rounded (officially cut
    off). Position ids are renumbered at every stage, as officially, except where they have several axes (M-RoPE).
    The official code weighs transitions over all rows of a batch together; here every sample stands for itself.

    layers: decoder layers >= 1 whose input is pruned, ascending; None: 7, 9 and 12 of 32, in proportion to the depth.
    ratios: shares that stay at each of `layers`, none above the one before, in place of `keep`.
    history: how many layers before the stage TTV sums over; set by the schedule.
    """

    positions: ClassVar[Positions] = "compact"
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    history: int = 1

    def __post_init__(self) -> None:
        check_layers(self.name, self.layers)
        check_shares(self.name, self.ratios, 3 if self.layers is None else len(self.layers))
        if self.layers and self.layers[0] < 1:
            raise ValueError(f"layers={self.layers}: {self.name} reads the layer before the first stage, so use >= 1")
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 1:
            raise ValueError(f"history={self.history!r}: {self.name} sums over 1 layer or more")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return FROM_TEXT, *self._transitions

    @property
    def _transitions(self) -> tuple[Signal, ...]:
        return tuple(Signal("transition", -back) for back in range(self.history, 0, -1))

    def default_where(self) -> Where:
        return self.layers[0] if self.layers else PUBLISHED[0]

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        check_one(self.name, keep, self.ratios)
        layers = self.layers or tuple(sorted({max(1, round(depth * k / 32)) for k in PUBLISHED}))
        shares = self.ratios or in_steps_of(SHARES, SHARES[-1] if keep is None else keep, len(layers))
        first = layers[0] - 1
        return [Stage(k, replace(self, history=k - first), keep=share) for k, share in zip(layers, shares)]

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        all_scores = [self._scores(v) for v in units]
        check_finite(all_scores, "scores of transitions and attention")
        counts = [max(1, v.n // 2) if v.budget is None else budget_of(v, self.name) for v in units]
        return [select(best_first(s)[:count], scores=s) for s, count in zip(all_scores, counts)]

    def _scores(self, v: Visual) -> Tensor:
        transition = torch.stack([signal_of(v, s, self.name) for s in self._transitions]).sum(0)
        looked = signal_of(v, FROM_TEXT, self.name)
        return transition / (transition.sum() + 1e-8) + looked / (looked.sum() + 1e-8)
