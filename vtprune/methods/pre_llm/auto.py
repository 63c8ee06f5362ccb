"""Automatic: the method that vtprune recommends, `volcov` with what its model and medium can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.method import Method
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of
from .volcov import VolCov

# What a tower shows is found out when the model is patched: volcov itself does without what cannot be read.
RECOMMENDED = VolCov()


@register("auto", paper="https://arxiv.org/abs/2506.10967", seam="pre_llm")
@dataclass(frozen=True)
class Auto(Method):
    """The documented default: `volcov`, for images and videos and at every budget.

    It acts before the LLM and does not read the question, so its choice is safe to store with the image or the prefix.
    Where the attention of the vision tower cannot be read, features alone decide, and a note says so. Why it is this
    method, measured on questions that were drawn after its form was fixed, stands in benchmarks/README.md.

    A stage, a handle and a recipe hold the method that it stands for (`Method.resolved`): `volcov` with its options, so
    that a recipe that was written down means the same in a later version.
    """

    @property
    def resolved(self) -> Method:
        return RECOMMENDED

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.resolved.needs

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        for v in units:
            budget_of(v, self.name)
        return self.resolved.batch(units)
