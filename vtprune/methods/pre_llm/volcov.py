"""Volume and coverage: keep tokens that span a large volume and cover the whole image (our own method)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vtprune.kernels import volume_coverage

from ...core.errors import UnsupportedModel
from ...core.method import Method
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, check_choices, select
from ..shared.text import note

FeaturesFallback = Literal["features", "error"]
NO_SIGNAL = "{}: the attention in the vision tower is not there to be read, so the features alone decide"


@register("volcov", paper="https://arxiv.org/abs/2506.10967", seam="pre_llm")
@dataclass(frozen=True)
class VolCov(Method):
    """Greedy picks of the token j with the largest d_j * c_j * a_j ** alpha.

    x: [N, D] projected tokens, S [N, N] their cosines, P the tokens picked so far.
    d_j: what the picked tokens leave unexplained of j, S_jj + ridge - S_jP (S_PP + ridge I)^-1 S_Pj (greedy MAP of a
        determinantal point process, as in CDPruner, but without the question).
    c_j: how much better all tokens would be covered, mean over i of max(S_ij - max over p in P of S_ip, 0) (facility
        location, as in SCOPE, https://arxiv.org/abs/2510.24214).
    a_j: [N], the attention that j receives from all queries in the tower layer that feeds the projector; no CLS token
        is needed. Newlines receive none.

    Neither the question nor a fixed position has a say, so the choice may be stored with the image. The frames of a
    video are covered together, over space and time; none of them comes first.

    alpha: weight of the attention, >= 0; 0 looks at features alone. What else was tried, and did not help, stands in
        benchmarks/2026-11-27-volcov/tuning.md.
    ridge: > 0; the larger it is, the less likeness to picked tokens counts.
    fallback: where the attention cannot be read (no known tower layout, features encoded elsewhere), "features" does
        as alpha=0 does, noted in `Visual.state["note"]`, and "error" raises UnsupportedModel.
    memory: as for `vtprune.kernels.volume_coverage`; beyond 8,192 tokens "auto" covers a regular part of them.
    """

    alpha: float = 0.25
    ridge: float = 0.01
    fallback: FeaturesFallback = "features"
    memory: Literal["auto", "fast", "low"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self, fallback=FeaturesFallback, memory=Literal["auto", "fast", "low"])
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha={self.alpha}: use a finite number >= 0, such as 0.25; 0 looks at features alone")
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ValueError(f"ridge={self.ridge}: use a finite number > 0, such as 0.01")

    @property
    def needs(self) -> tuple[Signal, ...]:
        received = Signal("received", None, optional=self.fallback == "features")
        return (received,) if self.alpha else ()

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        weights = [self._weight(v) for v in units]
        orders = volume_coverage([v.x for v in units], budgets, weights=weights, ridge=self.ridge, memory=self.memory)
        return [select(order) for order in orders]

    def _weight(self, v: Visual) -> Tensor:
        """[N] float32: a ** alpha; ones where there is nothing to read."""
        for need in self.needs:
            if need in v.signals:
                # Attention of exactly 0 (a newline, a masked patch) must not rule a token out.
                return v.signals[need].float().clamp(min=1e-9) ** self.alpha
            if self.fallback == "error":
                raise UnsupportedModel(
                    f"{self.name} needs {need}, and it is not there to be read: pass alpha=0 or fallback='features', "
                    "which look at the features alone"
                )
            note(v, NO_SIGNAL.format(self.name))
        return v.x.new_ones(v.n, dtype=v.x.float().dtype)
