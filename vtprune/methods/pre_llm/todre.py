"""ToDRE: start from a pivot token and diversify away from it; drop what is left once the text has seen it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune.kernels import check_finite, farthest_point

from ...core.method import Method, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, check_choices, select
from ..in_llm.withdraw import withdrawals

Objective = Literal["maxsum", "kcenter"]
Pivot = Literal["cls", "center", "farthest", "random"]
CLS = Signal("cls", -1)


@register("todre", paper="https://arxiv.org/abs/2505.18757", seam="pre_llm")
@dataclass(frozen=True)
class ToDRE(Method):
    """Greedy diversification over the visual tokens from a pivot, and removal of all that is left deep in the LLM.

    By name both stages of the paper run: this rule before the LLM, and `Withdraw` behind the first layer from 7/8 of
    the depth on where text and visual tokens no longer attend to each other. `Stage("llm", ToDRE())` is stage 1 alone.

    objective: "maxsum" picks the token with the smallest summed cosine to the picked ones (version 2 of the
        paper), "kcenter" the one whose nearest picked token is farthest (version 1).
    pivot: the first pick. "cls": highest CLS attention of the tower's last layer; "center" / "farthest": most /
        least similar to the mean direction of the tokens; "random": seeded. A unit of several spans takes it
        from the first one, the thumbnail. A tower without CLS token makes "cls" fall back to "center", noted
        in `Visual.state["note"]`.
    seed: for pivot="random"; the draw depends on it and on the number of candidates only.
    memory: as for `farthest_point`.
    threshold: share of attention below which the visual tokens are withdrawn; None leaves stage 2 out.
    """

    objective: Objective = "maxsum"
    pivot: Pivot = "cls"
    seed: int = 0
    memory: Literal["auto", "fast", "low"] = "auto"
    threshold: float | None = 0.1

    def __post_init__(self) -> None:
        check_choices(self, objective=Objective, pivot=Pivot)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (CLS,) if self.pivot == "cls" else ()

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        whole = isinstance(keep, float) and keep == 1.0  # nothing may change then
        return [first] if whole or self.threshold is None else [first, *withdrawals(depth, self.threshold)]

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        orders = farthest_point(
            [v.x for v in units],
            budgets,
            objective="maxsum" if self.objective == "maxsum" else "maxmin",
            first=[self._pivot(v) for v in units],
            memory=self.memory,
        )
        return [select(order, self._scores(v)) for v, order in zip(units, orders)]

    def _scores(self, v: Visual) -> Tensor | None:
        """[N] CLS attention, the only score a token has before the greedy loop."""
        cls = v.signals.get(CLS) if self.pivot == "cls" else None
        return None if cls is None else cls.float()

    def _pivot(self, v: Visual) -> Tensor | int:
        """Position of the first pick, as an int or a 0-d tensor on the unit's device."""
        start, stop = (v.spans[0].start, v.spans[0].start + len(v.spans[0])) if len(v.spans) > 1 else (0, v.n)
        if self.pivot == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return start + int(torch.randint(stop - start, (1,), generator=generator))
        scores = self._scores(v)
        if scores is not None:
            check_finite([scores], "CLS attention rows")
            return start + scores[start:stop].argmax()
        if self.pivot == "cls":
            v.state["note"] = f"{self.name}: the tower has no CLS token, pivot='center' used instead of 'cls'"
        rows = torch.nn.functional.normalize(v.x[start:stop].float(), dim=1)
        similarity = rows @ rows.mean(dim=0)
        return start + (similarity.argmin() if self.pivot == "farthest" else similarity.argmax())
