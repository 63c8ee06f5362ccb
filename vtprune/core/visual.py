"""`Visual`: what a method sees of one unit; `Assignment`: what it answers; `Span`: a raster of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..kernels.merge import merge
from .signal import Signal


@dataclass(frozen=True)
class Span:
    """A run of a unit's tokens in raster order: t frames of h rows of w tokens, starting at token `start`.

    newline: one extra token ends every row (any-resolution mosaics of LLaVA-NeXT); it belongs to the span.
    tiles: heights and widths, in tokens, of the crops that a mosaic was put together from; () for a single crop.
    """

    start: int
    grid: tuple[int, int, int]
    newline: bool = False
    tiles: tuple[tuple[int, ...], tuple[int, ...]] | tuple[()] = ()

    def __len__(self) -> int:
        t, h, w = self.grid
        return t * h * (w + self.newline)


@dataclass(frozen=True)
class Visual:
    """What a method sees of ONE unit (an image, a frame or a whole sample; the stage says which).

    x: [N, D] projected features (before the LLM) or hidden states (inside it), in the model's dtype.
    budget: tokens to keep, 1 <= budget <= N; None if the method decides.
    grid: (t, h, w) when all N tokens form one raster, else None.
    spans: runs with a raster of their own (crops, mosaics); tokens outside every span are separators.
    video: True for a video, and for all images of a row together (per="sample"): spans of equal size that follow each
        other are then its frames. False for an image, whose spans are crops.
    signals: what `Method.needs` asked for; a "cls" signal is missing when the tower has no CLS token.
    text: [M, D] embeddings of the sample's text tokens, or None.
    state: made by the seam for one forward pass and shared by the stages of one method; in the tower, one per unit.
    block: (k, last) inside the vision tower: the tokens are about to enter block k, and the budget is due at block
        `last` (k itself, unless the stage is a schedule); None elsewhere.
    before: [P, D], of a video that comes in parts (`vtprune.Stream`) the frame before the first of x; else None.
    """

    x: Tensor
    budget: int | None
    grid: tuple[int, int, int] | None = None
    spans: tuple[Span, ...] = ()
    video: bool = False
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    text: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)
    block: tuple[int, int] | None = None
    before: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of visual tokens of the unit."""
        return self.x.shape[0]


@dataclass(frozen=True)
class Assignment:
    """Which tokens stay, and what flows into them: x' = A x.

    idx: [K] kept positions, ascending, distinct, int64. A merged token stands at the position of its representative.
    order: [K] the same positions in the order they were picked, or None if the method has no order.
    src, dst, w: sparse merge weights; row `dst` (0..K-1, along `idx`) of x' sums w * x[src]. None: x' = x[idx].
    scores: [N] float32 score per token for inspection, or None.
    """

    idx: Tensor
    order: Tensor | None = None
    src: Tensor | None = None
    dst: Tensor | None = None
    w: Tensor | None = None
    scores: Tensor | None = None

    @property
    def merges(self) -> bool:
        """True if kept tokens are weighted sums and not plain copies."""
        return self.src is not None

    def apply(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [K, ...]; merges accumulate in float32 and return in x's dtype."""
        if self.src is None or self.dst is None or self.w is None:
            return x.index_select(0, self.idx)
        merged: Tensor = merge(x, self.src, self.dst, self.w, self.idx.shape[0])
        return merged
