"""DyCoke at decode: each new token sees the visual tokens it looks at, chosen again when its gaze moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...core.method import Method, Per, Phase, Rounding, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, check_choices, check_cosine, select, signal_of

Similar = Literal["reuse", "all"]
ROW = Signal("last_row", -1)


@register("dycoke_kv", paper="https://arxiv.org/abs/2411.15024", seam="in_llm")
@dataclass(frozen=True)
class DyCokeKV(Method):
    """Top-k of the new token's softmax row in the layer before `layer`, averaged over heads, at every decode step.

    The prompt is read in full. At each step the row is compared with that of the step before; where their cosine
    similarity reaches `threshold` the last choice stands, otherwise the layers from `layer` on see the text and the
    top-k anew. Nothing is forgotten: a token may return at the next step, so memory is not saved, the chosen keys and
    values are a copy. Calls of several tokens (a second turn, guessed tokens) see everything and end the comparison.

    The official code shows all tokens at a step that is similar to the last one, which takes the gain from the steps
    that need no choice; `similar="all"` does that, and waits for the device at every step, as "reuse" does.

    keep: of the visual tokens of a row, a share cut off to a count as officially. The authors state what goes, 0.7 (0.8
        elsewhere in their code), so their count is that of keep=1 - 0.8: int(140 * (1 - 0.8)) is 27, not 28.
    layer: the first decoder layer that sees the selection, >= 1; 3 in the official code.
    """

    reads_text: ClassVar[bool] = True
    per: ClassVar[Per] = "sample"
    rounding: ClassVar[Rounding] = "down"
    phases: ClassVar[tuple[Phase, ...]] = ("decode",)
    layer: int = 3
    threshold: float = 0.9
    similar: Similar = "reuse"

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(f"layer={self.layer!r}: {self.name} reads the layer before, so use an int >= 1")
        check_cosine("threshold", self.threshold)
        check_choices(self, similar=Similar)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (ROW,)

    @property
    def exact(self) -> bool:
        return self.similar == "reuse"

    def default_where(self) -> Where:
        return self.layer

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        rows = [signal_of(v, ROW, self.name) for v in units]
        check_finite(rows, "attention rows of the new token")
        likeness = torch.stack([self._likeness(v, row) for v, row in zip(units, rows)])
        same = (likeness >= self.threshold).tolist()
        answers = []
        for v, row, still in zip(units, rows, same):
            v.state["row"] = row
            answers.append(self._again(v) if still else select(best_first(row)[: budget_of(v, self.name)], row))
            v.state["answer"] = answers[-1]
        return answers

    def _likeness(self, v: Visual, row: Tensor) -> Tensor:
        """[] cosine similarity with the row of the step before; below any threshold at the first."""
        before = v.state.get("row")
        return row.new_full((), -torch.inf) if before is None else cosine_similarity(row, before, dim=0)

    def _again(self, v: Visual) -> Assignment:
        """The last choice, the very same tensor, so that the seam need not copy anything."""
        if self.similar == "all":
            return Assignment(torch.arange(v.n, device=v.x.device))
        answer: Assignment = v.state["answer"]
        return answer
