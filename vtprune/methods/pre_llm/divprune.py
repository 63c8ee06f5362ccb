"""DivPrune: keep the tokens that are most unlike each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vtprune.kernels import farthest_point

from ...core.method import Method
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, select


@register("divprune", paper="https://arxiv.org/abs/2503.02175", seam="pre_llm")
@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity: each pick is the token farthest (cosine) from the tokens picked so far.

    The first pick is the token whose nearest neighbour is farthest. Newline tokens compete like any other. A share is
    rounded to a count, half to even, as officially. Picks equal the official ones computed in float32, with one
    difference: picked tokens are masked, so that repeated rows never make a token come out twice.

    memory: "fast" holds one N x N float32 matrix per unit, "low" none (for long videos); "auto" decides by size.
    """

    memory: Literal["auto", "fast", "low"] = "auto"

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        return [select(order) for order in farthest_point([v.x for v in units], budgets, memory=self.memory)]
