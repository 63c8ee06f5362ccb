"""Top tokens by CLS attention: the plain attention baseline, FasterVLM's rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.kernels import check_finite

from ...core.method import Method
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import Fallback, best_first, budget_of, check_fallback, cls_attention, cls_needs, select


@register("cls_topk", paper="https://arxiv.org/abs/2412.01818", seam="pre_llm")
@dataclass(frozen=True)
class ClsTopK(Method):
    """Keep the tokens that the tower's CLS token attends to most, mean over heads.

    layer: tower layer as in `Signal`; -1 is the last, None the one that feeds the projector, as in FasterVLM's code.
    fallback: on towers without a CLS token, "received" ranks by the mean attention that every token receives
        (noted in `Visual.state["note"]`), "error" raises UnsupportedModel.
    """

    layer: int | float | None = -1
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_fallback(self.fallback)
        Signal("cls", self.layer)  # checks a share

    @property
    def needs(self) -> tuple[Signal, ...]:
        return cls_needs(self.layer, self.fallback)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        scores = [cls_attention(v, self.layer, self.fallback, self.name) for v in units]
        check_finite(scores, "attention rows")
        return [select(best_first(score)[:n], score) for n, score in zip(budgets, scores)]
