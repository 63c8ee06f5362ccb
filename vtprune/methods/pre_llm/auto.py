"""Automatic: the method that vtprune recommends, `volcov` with what its model and medium can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...core.method import Method
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of
from .volcov import VolCov


class Row(NamedTuple):
    """For which models, media and budgets `auto` means which method, and why."""

    model: str
    medium: str
    budget: str
    method: VolCov
    why: str


# What a tower shows is found out when the model is patched, so the rows share one method and differ in what it reads.
# The figures are of the embedded models and of tuning seeds, no confirmation: benchmarks/2026-11-27-volcov/tuning.md.
ROWS = (
    Row(
        "attention of the tower can be read",
        "image",
        "any",
        VolCov(),
        "over divprune at 5 %: +0.6 [-0.6, 1.8] and +2.0 [1.1, 2.9] on two draws",
    ),
    Row(
        "attention of the tower can be read",
        "video",
        "any",
        VolCov(),
        "over divprune at 5 %: +4.4 [1.6, 7.2] on one draw",
    ),
    Row(
        "any other, and features without signals",
        "image, video",
        "any",
        VolCov(alpha=0.0),
        "over divprune at 5 %: images +0.4 [-0.8, 1.6] and +1.4 [0.6, 2.2], videos +1.8 [-1.2, 4.8]",
    ),
)


@register("auto", paper="https://arxiv.org/abs/2506.10967", seam="pre_llm")
@dataclass(frozen=True)
class Auto(Method):
    """The documented default: `volcov`, for images and videos and at every budget.

    It acts before the LLM and does not read the question, so its choice is safe to store with the image or the prefix.
    Where the attention of the vision tower cannot be read, features alone decide, and a note says so. `ROWS` says why.

    A stage, a handle and a recipe hold the method that it stands for (`Method.resolved`): `volcov` with its options, so
    that a recipe that was written down means the same in a later version.
    """

    @property
    def resolved(self) -> Method:
        return ROWS[0].method

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.resolved.needs

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        for v in units:
            budget_of(v, self.name)
        return self.resolved.batch(units)
