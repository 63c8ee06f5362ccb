"""TransPrune: keep the visual tokens that layers transform most and that the text looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...core.method import Method, Positions, Rounding, Stage, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, select, signal_of
from .schedule import check_layers, check_one, check_shares, in_proportion, in_steps_of

FROM_TEXT = Signal("from_text", 0)
PUBLISHED, OF = (7, 9, 12), 32  # the published layers, and the depth they are meant for
SHARES = (0.875, 0.625, 0.125)


@register("transprune", paper="https://github.com/liaolea/TransPrune", seam="in_llm")
@dataclass(frozen=True)
class TransPrune(Method):
    """Top-k of TTV + IGA at three layers, with fewer tokens each time; each term is divided by its sum over the unit.

    TTV is the transition of a token (`Signal("transition")`) summed over the layers of `accumulating` that ran before
    this stage. IGA is the attention that the text behind the first visual token gives it in the layer about to run.
    `keep` is what the last stage leaves; earlier stages drop 1/7 and 3/7 of what it drops, the published proportion
    (keep=0.125 gives 0.875, 0.625, 0.125). A count is multiplied by 7 and 5 there. Without keep: the published list,
    and in a `Stage` of your own half of the tokens it sees. Shares are cut off to a count as officially: int(share *
    n), at least one. The official code weighs transitions over all rows of a batch together; here every sample stands
    for itself.

    The official code renumbers position ids at every stage, positions="compact". Here they are kept: the embedded image
    model then answers 92.1 % of its questions at 11 %, renumbered 85.0 %.

    layers: decoder layers >= 1 whose input is pruned, ascending; None: 7, 9 and 12 of 32, in proportion to the depth.
    ratios: shares that stay at each of `layers`, none above the one before, in place of `keep`.
    accumulating: layers that TTV sums over, ascending, counted from 1 as in the official list (a is the layer that runs
        just before a stage at layers=a), the first of them not behind the first stage; None: from the first stage's on
        (7 to 12 of 32, the published list).
    history: how many layers before a `Stage` of your own TTV sums over, or which (offsets back); set by the schedule.
    """

    reads_text: ClassVar[bool] = True
    official_positions: ClassVar[Positions] = "compact"
    rounding: ClassVar[Rounding] = "down"
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    accumulating: tuple[int, ...] | None = None
    history: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_layers(self.name, self.layers)
        check_shares(self.name, self.ratios, 3 if self.layers is None else len(self.layers))
        if self.layers and self.layers[0] < 1:
            raise ValueError(f"layers={self.layers}: {self.name} reads the layer before the first stage, so use >= 1")
        check_layers(self.name, self.accumulating, "accumulating")
        if self.accumulating and self.accumulating[0] < 1:
            raise ValueError(f"accumulating={self.accumulating}: layers count from 1 here, so use >= 1")
        back = self.history if isinstance(self.history, tuple) else (self.history,)
        if not back or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in back):
            raise ValueError(f"history={self.history!r}: {self.name} sums over 1 layer or more")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return FROM_TEXT, *self._transitions

    @property
    def _transitions(self) -> tuple[Signal, ...]:
        back = self.history if isinstance(self.history, tuple) else range(self.history, 0, -1)
        return tuple(Signal("transition", -b) for b in back)

    def default_where(self) -> Where:
        return self.layers[0] if self.layers else PUBLISHED[0]

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        check_one(self.name, keep, self.ratios)
        layers = self.layers or in_proportion(PUBLISHED, OF, depth)
        shares = self.ratios or in_steps_of(SHARES, SHARES[-1] if keep is None else keep, len(layers))
        return [Stage(k, replace(self, history=self._before(k, layers[0])), keep=s) for k, s in zip(layers, shares)]

    def _before(self, k: int, first: int) -> int | tuple[int, ...]:
        """The history of a stage at layer k, in a schedule that begins at layer `first`."""
        if self.accumulating is None:
            return k - first + 1
        if self.accumulating[0] > first:
            raise ValueError(
                f"accumulating={self.accumulating}: no layer up to {first}, so the first stage at layer {first} has no "
                f"transitions to sum; begin with a layer from 1 to {first}"
            )
        return tuple(k - a + 1 for a in self.accumulating if a <= k)

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
