"""ToDRE, stage 1: start from a pivot token and diversify away from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vtprune.kernels import check_finite, farthest_point

from ...registry import register
from ...types import Assignment, Method, Signal, Visual
from .. import budget_of, select

Objective = Literal["maxsum", "kcenter"]
Pivot = Literal["cls", "center", "farthest", "random"]
CLS = Signal("cls", -1)


@register("todre", paper="https://arxiv.org/abs/2505.18757", seam="pre_llm")
@dataclass(frozen=True)
class ToDRE(Method):
    """Greedy diversification over all visual tokens of a unit from a pivot (training-free, stage 1 of the paper).

    objective: "maxsum" picks the token with the smallest summed cosine to the picked ones (version 2 of the
        paper), "kcenter" the one whose nearest picked token is farthest (version 1).
    pivot: the first pick. "cls": highest CLS attention of the tower's last layer; "center" / "farthest": most /
        least similar to the mean direction of the tokens; "random": seeded. A unit of several spans takes it
        from the first one, the thumbnail. A tower without CLS token makes "cls" fall back to "center", noted
        in `Visual.state["note"]`.
    seed: for pivot="random"; the draw depends on it and on the number of candidates only.
    memory: as for `farthest_point`.
    """

    objective: Objective = "maxsum"
    pivot: Pivot = "cls"
    seed: int = 0
    memory: Literal["auto", "fast", "low"] = "auto"

    def __post_init__(self) -> None:
        for name, valid in (("objective", get_args(Objective)), ("pivot", get_args(Pivot))):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, valid))}")

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (CLS,) if self.pivot == "cls" else ()

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
