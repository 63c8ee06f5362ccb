"""FlowCut's second stage: what the last token of the prompt looks at, inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.method import Method, Per, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, select, signal_of

ROW, VALUE, NORM = Signal("last_visual"), Signal("last_value"), Signal("value_norm")


@register("flowcut_llm", paper="https://arxiv.org/abs/2505.19536", seam="in_llm")
@dataclass(frozen=True)
class FlowCutLLM(Method):
    """Top-k of (p + q) * e in the layer before `layer`, over the visual tokens of a sample.

    p is the softmax row of the prompt's last query over the visual tokens only, q that of the last token's value with
    theirs (scaled by 1 / sqrt(d)), e the L1 norm of the value's mean over heads. Position ids are kept; the official
    code renumbers them from this layer on.

    layer: the first decoder layer that runs on the pruned sequence, >= 1.
    """

    reads_text: ClassVar[bool] = True
    per: ClassVar[Per] = "sample"
    layer: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise TypeError(f"layer={self.layer!r} is a {type(self.layer).__name__}: use an int >= 1")
        if self.layer < 1:
            raise ValueError(f"layer={self.layer}: {self.name} reads the layer before, so use layer >= 1")

    @property
    def needs(self) -> tuple[Signal, ...]:
        return ROW, VALUE, NORM

    def default_where(self) -> Where:
        return self.layer

    def __call__(self, v: Visual) -> Assignment:
        row, value, norm = (signal_of(v, s, self.name) for s in self.needs)
        scores = (row + value) * norm
        check_finite([scores], "scores")
        return select(best_first(scores)[: budget_of(v, self.name)], scores=scores)
