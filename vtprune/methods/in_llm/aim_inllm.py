"""AIM inside the LLM: from the middle layers on, visual tokens leave little by little, the least important first."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ...core.method import Method, Per, Rounding, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, select, signal_of
from .schedule import check_one, tidy
from .withdraw import Withdraw

IMPORTANCE = Signal("page_rank", -1)
START, SPAN, OF = 14, 8, 28  # all visual tokens up to layer 14 of 28, none from the eighth layer behind it on


@register("aim_inllm", paper="https://arxiv.org/abs/2412.03248", seam="in_llm")
@dataclass(frozen=True)
class AIMInLLM(Method):
    """Top-k of the PageRank importance in the layer before: five steps on its attention, ten times as sharp.

    From the middle of the depth on each layer leaves 1/8 of the visual tokens fewer (of 28 layers; in proportion
    elsewhere) until none is left. Shares are of the tokens as the model sees them unpruned, cut off to a count as
    officially: int(share * n), at least one. With keep as a share that is where it ends; a count is reached at once, at
    the first of these layers. A stage of one's own without keep leaves half. Position ids are kept.

    The official code masks tokens and never drops them. Dropping gives the others the same states, but a masked token
    still hands out its 1 / N in the first step of later layers' PageRank, so later choices may differ from the
    official ones. Nothing is computed in layers that no stage stands behind.

    rates: shares left behind each decoder layer, none above the one before, in place of keep; 0 leaves none. The
        official list for 28 layers is 1 behind layers 0 to 13, 0.875 behind 14, 0.75 behind 15, ... 0 from 21 on.
    """

    per: ClassVar[Per] = "sample"
    reads_text: ClassVar[bool] = True
    rounding: ClassVar[Rounding] = "down"
    rates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        fine = self.rates is None or (self.rates and all(0.0 <= share <= 1.0 for share in self.rates))
        if not fine or any(a < b for a, b in pairwise(self.rates or ())):
            raise ValueError(
                f"rates={self.rates}: use shares in [0, 1], one a decoder layer, none above the one before"
            )

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (IMPORTANCE,)

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        check_one(self.name, keep, self.rates, "rates")
        if self.rates is not None:
            return self._listed(self.rates, depth)
        first = max(1, min(depth - 1, depth * START // OF + 1))
        if isinstance(keep, int):
            return [Stage(first, self, keep=keep)]
        end, out = 0.0 if keep is None else keep, []
        for layer in range(first, depth):
            share = max(tidy(1 - (layer - depth * START / OF) * OF / (SPAN * depth)), end)
            out.append(self._stage(layer, share))
            if share <= end:
                break
        return out

    def _listed(self, rates: tuple[float, ...], depth: int) -> list[Stage]:
        """A stage behind each layer that leaves less than the one before."""
        if len(rates) != depth:
            raise ValueError(f"rates={rates}: {len(rates)} shares, but the model has {depth} decoder layers")
        behind = enumerate(pairwise((1.0, *rates[:-1])), 1)
        return [self._stage(layer, share) for layer, (before, share) in behind if share < before]

    def _stage(self, layer: int, share: float) -> Stage:
        return Stage(layer, self, keep=float(share)) if share > 0 else Stage(layer, Withdraw(None))

    def __call__(self, v: Visual) -> Assignment:
        scores = signal_of(v, IMPORTANCE, self.name)
        check_finite([scores], "importance scores")
        count = max(1, v.n // 2) if v.budget is None else budget_of(v, self.name)
        return select(best_first(scores)[:count], scores=scores)
