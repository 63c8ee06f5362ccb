"""LazyLLM: drop visual tokens step by step while the prompt is read, and let any of them return at decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.method import Method, Per, Phase, Stage, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, select, signal_of
from .schedule import check_layers, check_one, check_shares, in_proportion, pyramid

ROW = Signal("last_row", -1)
POINTS, OF = (9, 19, 28), 32  # layers of Llama-2-7B between which the paper groups its statistics
RATIO = 0.7  # of the paper's figure: 30 % of the tokens leave at each point


@register("lazyllm", paper="https://arxiv.org/abs/2407.14057", seam="in_llm")
@dataclass(frozen=True)
class LazyLLM(Method):
    """Top-k of the newest token's softmax row in the layer before each stage, averaged over heads, at every step.

    While the prompt is read this is PyramidDrop with another row and other layers. At each decode step the stages
    choose anew among the visual tokens of the prompt. A chosen token whose keys and values a layer lacks comes back:
    its hidden state was put by where it was dropped, and runs through the layers behind, once. So no token passes a
    layer twice, and keys are stored for all that was ever chosen. Text, prompt or generated, is never dropped; calls of
    several tokens (a second turn, guessed tokens) see everything that is stored, and bring nothing back.

    There is no official code. The paper names neither its layers nor its percentiles; those here are the ones of its
    figures: 30 % fewer tokens behind 9, 19 and 28 of 32 layers, in proportion elsewhere (unverified).

    layers: decoder layers whose input is pruned, ascending, >= 1; None: as above.
    ratios: shares that stay at each of `layers`, none above the one before, in place of `keep`. `keep` is what the last
        stage leaves; the stages before reach it in equal factors, a count is doubled for each.
    """

    reads_text: ClassVar[bool] = True
    per: ClassVar[Per] = "sample"
    phases: ClassVar[tuple[Phase, ...]] = ("prefill", "decode")
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_layers(self.name, self.layers)
        if self.layers and self.layers[0] == 0:
            raise ValueError(f"layers={self.layers!r}: {self.name} reads the layer before, so use layers >= 1")
        check_shares(self.name, self.ratios, len(self.layers or POINTS))

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (ROW,)

    def default_where(self) -> Where:
        return self.layers[0] if self.layers else POINTS[0]

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        check_one(self.name, keep, self.ratios)
        layers = self.layers or in_proportion(POINTS, OF, depth)
        shares = self.ratios or pyramid(RATIO ** len(layers) if keep is None else keep, len(layers))
        return [Stage(layer, self, keep=share) for layer, share in zip(layers, shares)]

    def __call__(self, v: Visual) -> Assignment:
        row = signal_of(v, ROW, self.name)
        check_finite([row], "attention rows of the newest token")
        return select(best_first(row)[: budget_of(v, self.name)], scores=row)
