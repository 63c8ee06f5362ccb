"""SparseVLM: the words that the image is about say which visual tokens stay; some of the others are recycled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...core.method import Method, Positions, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, check_choices, select, signal_of
from ..shared.recycling import kept_beside, means_of, recycle, recycled
from .published import BEHIND, OF, PRESETS, PUBLISHED
from .schedule import check_layers, in_proportion, pyramid

Version = Literal["v1", "plus"]
Order = Literal["positional", "official"]
RELEVANCE, ROWS = Signal("relevance"), Signal("text_rows")
HEADS, WEIGHT = Signal("text_rows_by_head"), Signal("rope_weight")


@register("sparsevlm", paper="https://arxiv.org/abs/2410.04417", seam="in_llm")
@dataclass(frozen=True)
class SparseVLM(Method):
    """Visual tokens by the attention that the raters pay them, at three places.

    1. The relevance of a token of the text behind the image is the mean over all visual tokens of the softmax of
       x_v . x_t over that text, of the embeddings that enter the LLM.
    2. Raters are the tokens whose relevance is above the mean, or all of that text if none is.
    3. A stage behind layer l ranks the visual tokens by that layer's softmax rows of the raters, averaged over heads
       and raters.

    keep is what the last stage leaves, merged tokens included; the stages before leave more, in equal factors (a count
    doubles). Without keep or preset each stage counts by the rank rule of the first release.

    version: "v1" recycles: of p dropped tokens the int(0.3 p) + 1 best become one mean for every ten (density peaks,
        equal densities in order of score), which stands at its centre's place. "plus" (SparseVLM+) merges nothing and
        takes the heads with the most attention to the image, each weight divided by what rotary positions alone would
        give, where a single embedding a token holds them.
    preset: 192, 128, 96 or 64, the published lists (average tokens of 576), in place of keep.
    counts: such a list of your own, a count for each of `layers`, merged tokens not included; at least one token goes.
    layers: decoder layers behind which tokens are dropped, ascending; None: 2, 6, 15 of 32, in proportion.
    scale, bias: tokens kept = int(scale * rank of the raters' rows + bias), waits for the device. 13.5, 9 with bias 6,
        and 0.8 are published.
    heads: heads that "plus" listens to, a count or a share of all (14 of 32).
    order: "official" puts merged tokens behind all others.

    The official code of "v1" renumbers position ids, positions="compact". Here they are kept: the embedded image model
    then answers 92.6 % of its questions at 11 %, renumbered 83.7 %.
    """

    reads_text: ClassVar[bool] = True
    official_positions: ClassVar[Positions] = "compact"
    version: Version = "v1"
    preset: int | None = None
    counts: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    scale: float = 13.5
    bias: float = 0.0
    heads: int | float = 14 / 32
    order: Order = "positional"

    def __post_init__(self) -> None:
        check_choices(self, version=Version, order=Order)
        check_layers(self.name, self.layers)
        fits = self.preset in PRESETS[self.version] and len(self.layers or BEHIND) == len(BEHIND)
        if self.preset is not None and not fits:
            raise ValueError(
                f"preset={self.preset!r}: choose 192, 128, 96 or 64, for {len(BEHIND)} layers, or pass keep"
            )
        if self.counts is not None and (self.preset is not None or not all(c >= 1 for c in self.counts)):
            raise ValueError(f"counts={self.counts!r}: use ints >= 1, in place of preset={self.preset!r}")
        if not (self.heads >= 1 if isinstance(self.heads, int) else 0 < self.heads <= 1):
            raise ValueError(f"heads={self.heads}: use a count >= 1 or a share in (0, 1]")
        if not (self.scale >= 0 and self.bias >= 0):
            raise ValueError(f"scale={self.scale}, bias={self.bias}: use numbers >= 0")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (RELEVANCE, ROWS) if self.version == "v1" else (RELEVANCE, HEADS, WEIGHT)

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        behind = self.layers or [k - 1 for k in in_proportion([k + 1 for k in BEHIND], OF, depth)]
        shares: Sequence[float | int | None] = [None] * len(behind) if keep is None else pyramid(keep, len(behind))
        if self.preset is not None:
            if keep is not None:
                raise TypeError(f"{self.name}: keep={keep} and preset={self.preset}: give one of them")
            shares = [count / PUBLISHED for count in PRESETS[self.version][self.preset][-len(behind) :]]
        rules = [self] * len(behind) if self.counts is None else [replace(self, counts=(c,)) for c in self.counts]
        if len(rules) != len(behind) or (self.counts is not None and keep is not None):
            raise ValueError(f"counts={self.counts!r}: {self.name} takes {len(behind)} of them here, in place of keep")
        return [Stage(k + 1, rule, keep=s) for k, rule, s in zip(behind, rules, shares)]

    def __call__(self, v: Visual) -> Assignment:
        relevance = signal_of(v, RELEVANCE, self.name)
        rows = signal_of(v, ROWS, self.name) if self.version == "v1" else signal_of(v, HEADS, self.name).mean(1)
        raters = relevance > relevance.mean()
        weight = torch.where(raters.any(), raters, True).float()
        scores = (rows if self.version == "v1" else self._sharp(v, weight)) @ weight / weight.sum()
        check_finite([scores, relevance], "attention rows of the text")
        order = best_first(scores)
        if v.budget is None:
            kept = self._count(v, rows, weight)
            merged = means_of(v.n - kept) if kept < v.n else 0
        else:
            kept = kept_beside(budget_of(v, self.name), v.n)
            merged = v.budget - kept
        if self.version == "plus" or not merged:
            return select(order[: kept if v.budget is None else v.budget], scores)
        pool = order[kept:][: recycled(v.n - kept)]
        return recycle(v.x, order[:kept], pool, merged, scores, behind=self.order == "official")

    def _count(self, v: Visual, rows: Tensor, weight: Tensor) -> int:
        """Tokens kept, merged ones not counted: the next of a list, or the rank rule."""
        if self.counts is not None:
            return max(1, min(self.counts[0], v.n - 1))
        rank = int(torch.linalg.matrix_rank(rows[:, weight > 0]))
        return v.n if rank == v.n else max(1, min(int(rank * self.scale + self.bias), v.n - 1))

    def _sharp(self, v: Visual, weight: Tensor) -> Tensor:
        """[N, T]: rows of the heads that look at the image most, with the bias of rotary positions divided out."""
        bias, by_head = signal_of(v, WEIGHT, self.name), signal_of(v, HEADS, self.name)
        rows = by_head / torch.where(bias.abs() < 1e-6, 1e-6, bias)[:, None]  # [N, H, T]; the bias crosses zero
        count = self.heads if isinstance(self.heads, int) else max(1, round(self.heads * rows.shape[1]))
        return rows.index_select(1, best_first((rows @ weight).sum(0))[:count]).mean(1)
