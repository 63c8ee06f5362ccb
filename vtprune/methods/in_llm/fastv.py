"""FastV: after a few decoder layers, keep the visual tokens that the last prompt token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.kernels import check_finite

from ...core.method import Method, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, select, signal_of

LAST_ROW = Signal("last_row", -1)


@register("fastv", paper="https://arxiv.org/abs/2403.06764", seam="in_llm")
@dataclass(frozen=True)
class FastV(Method):
    """Top-k of the last query's softmax row in the layer before `layer`, averaged over heads.

    This is what all official code computes; the paper's text speaks of the attention received from all tokens. A share
    is rounded to a count, half to even, as in the authors' Hugging Face code; their first one takes a count, and the
    file in lmms-eval cuts off. Position ids are kept. Ties go to the lower index. The query is the prompt's last token:
    `model.generate` tells where the prompt ends. In a loop of your own that feeds guessed tokens with the prompt it is
    the last token fed.

    layer: "K" of the paper; the first decoder layer that runs on the pruned sequence, >= 1.
    """

    reads_text: ClassVar[bool] = True
    layer: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise TypeError(f"layer={self.layer!r} is a {type(self.layer).__name__}: use an int >= 1")
        if self.layer < 1:
            raise ValueError(f"layer={self.layer}: fastv reads the attention of the layer before, so use layer >= 1")

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (LAST_ROW,)

    def default_where(self) -> Where:
        return self.layer

    def __call__(self, v: Visual) -> Assignment:
        row = signal_of(v, LAST_ROW, self.name)
        check_finite([row], "last-query attention rows")
        return select(row.argsort(descending=True, stable=True)[: budget_of(v, self.name)], scores=row)
