"""SCOPE: each pick is the token that covers the others best, weighted by the CLS attention that it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.kernels import check_finite, facility_greedy

from ...core.method import Method, Newlines, Per, Positions
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import Fallback, budget_of, check_choices, check_counts, check_fallback, cls_attention, cls_needs, select
from ..shared.hidden import FeaturesFallback, hidden_need, hidden_states

Combine = Literal["multiply", "add"]


@register("scope", paper="https://arxiv.org/abs/2510.24214", seam="pre_llm")
@dataclass(frozen=True)
class Scope(Method):
    """Greedy picks of the token j with the largest gain_j * a_j ** alpha.

    gain_j: by how much j covers the tokens better than the picks P so far, the sum over all tokens i of
        max(S_ij - max(0, max over p in P of S_ip), 0), where S [N, N] are the cosines of the tower's states.
    a_j: [N] CLS attention of the layer that feeds the projector; the method reads no text.

    Each crop has a budget of its own, and newlines and other separators are dropped, as officially. The official code
    computes in the model's dtype, ours in float32. The official code renumbers position ids, positions="compact".

    alpha: exponent of the attention, finite and >= 0; with combine="multiply" and 0, only coverage counts.
    combine: "multiply", or "add" for the score gain_j + a_j ** alpha, the official mode "add".
    heads: factor of a_j. The signal is the mean over heads and the official code takes their sum: heads=16 is that of
        CLIP-L. It makes a difference with combine="add" alone.
    features: "hidden" compares the states of the tower as the projector reads them, [N, C]; "projected" the tokens
        behind it, [N, D].
    features_fallback: where the states cannot be read (no known tower layout, features encoded elsewhere), "features"
        takes the projected tokens, noted in `Visual.state["note"]`; "error" raises UnsupportedModel.
    fallback: on towers without a CLS token, as for `cls_topk`.
    memory: as for `vtprune.kernels.facility_greedy`.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"
    official_positions: ClassVar[Positions] = "compact"

    alpha: float = 1.0
    combine: Combine = "multiply"
    heads: int = 1
    features: Literal["hidden", "projected"] = "hidden"
    features_fallback: FeaturesFallback = "features"
    fallback: Fallback = "received"
    memory: Literal["auto", "fast", "low"] = "auto"

    def __post_init__(self) -> None:
        check_choices(
            self,
            combine=Combine,
            features=Literal["hidden", "projected"],
            features_fallback=FeaturesFallback,
            memory=Literal["auto", "fast", "low"],
        )
        check_fallback(self.fallback)
        check_counts(heads=self.heads)
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha={self.alpha}: use a finite number >= 0, such as 1.0")

    @property
    def needs(self) -> tuple[Signal, ...]:
        states = hidden_need(self.features_fallback) if self.features == "hidden" else ()
        return (*cls_needs(None, self.fallback), *states)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        attention = [cls_attention(v, None, self.fallback, self.name) for v in units]
        check_finite(attention, "attention rows")
        orders = facility_greedy(
            [self._compared(v) for v in units],
            budgets,
            weights=[(row.clamp(min=0) * self.heads) ** self.alpha for row in attention] if self.alpha else None,
            combine=self.combine,
            memory=self.memory,
        )
        return [select(order, row) for order, row in zip(orders, attention)]

    def _compared(self, v: Visual) -> Tensor:
        """[N, C or D]: what is compared of the tokens."""
        return v.x if self.features == "projected" else hidden_states(v, self.features_fallback, self.name)
