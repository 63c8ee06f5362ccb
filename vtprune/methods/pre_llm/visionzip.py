"""VisionZip: keep what CLS attends to, and merge the rest into a few evenly spaced tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.method import Method, Newlines, Per
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import (
    Fallback,
    best_first,
    budget_of,
    check_choices,
    check_fallback,
    cls_attention,
    cls_needs,
    select,
    signal_of,
)
from ..shared.raster import views

MergeMode = Literal["add_mean", "average"]
Order = Literal["positional", "official"]
Cls = Literal["absent", "keep"]
KEYS = Signal("mean_keys", None)


@register("visionzip", paper="https://arxiv.org/abs/2412.04467", seam="pre_llm")
@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens by CLS attention, contextual tokens by merging everything else along key similarity.

    Attention and keys are those of the layer that feeds the projector. Contextual tokens are every step-th of the
    tokens left, each takes up those left tokens whose keys are closest to its own, and stands at its own position.
    Deviation from the paper: tokens are merged behind the projector, as the LLM sees them, and the projector is not
    linear; on tower features (`Visual.x` before the projector) the result is the official one. Newlines and other
    tokens outside the rasters are kept last and never merged; as officially they are dropped by default, per crop.

    contextual: merged tokens, a share of the budget rounded half to even or a count, at most budget - 1. 10/64 gives
        the paper's 54 + 10, 108 + 20 and 162 + 30 to the token; the official code takes both counts.
    merge_mode: "add_mean" adds the mean of the tokens taken up, as the official code does (the norm about doubles);
        "average" weighs all of them and the contextual token alike.
    order: "positional", or "official": the kept places are filled with the dominant tokens first and the contextual
        ones behind them, meant for positions="compact".
    cls: "keep" if the unit's first token is the tower's CLS token (vision_feature_select_strategy="full"): it always
        stays and counts in the budget.
    fallback: as for `cls_topk`.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"

    contextual: int | float = 10 / 64
    merge_mode: MergeMode = "add_mean"
    order: Order = "positional"
    cls: Cls = "absent"
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_choices(self, merge_mode=MergeMode, order=Order, cls=Cls)
        if isinstance(self.contextual, bool) or not isinstance(self.contextual, int | float):
            raise TypeError(f"contextual={self.contextual!r}: use a float in [0, 1) (share) or an int >= 0 (count)")
        if not (self.contextual >= 0 and (isinstance(self.contextual, int) or self.contextual < 1)):
            raise ValueError(f"contextual={self.contextual}: use a float in [0, 1) (share) or an int >= 0 (count)")
        check_fallback(self.fallback)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (*cls_needs(None, self.fallback), KEYS)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        scores = [cls_attention(v, None, self.fallback, self.name) for v in units]
        keys = [signal_of(v, KEYS, self.name) for v in units]
        check_finite([*scores, *keys], "attention rows and keys")
        return [self._zip(*unit) for unit in zip(units, budgets, scores, keys)]

    def _zip(self, v: Visual, n: int, scores: Tensor, keys: Tensor) -> Assignment:
        ranked, patches = self._ranked(v, scores)
        share = self.contextual if isinstance(self.contextual, int) else round(self.contextual * n)
        merged = min(share, n - 1) if n < patches else 0
        dominant, rest = ranked[: n - merged], ranked[n - merged : patches].sort().values
        step = max(1, len(rest) // max(1, merged))
        runs = rest[: merged * step].view(merged, step)  # each begins with its contextual token
        targets, others = runs[:, 0], torch.cat([runs[:, 1:].flatten(), rest[merged * step :]])
        return self._assign(dominant, targets, others if merged else others[:0], normalize(keys, dim=1), scores)

    def _ranked(self, v: Visual, scores: Tensor) -> tuple[Tensor, int]:
        """Positions best first, those outside the rasters last, and the number of the others."""
        inside = [raster.flatten() for raster in views(v, torch.arange(v.n, device=scores.device))]
        if inside:
            at = torch.cat(inside)
            scores = torch.full_like(scores, -1.0).scatter(0, at, scores.gather(0, at))
        count = sum(map(len, inside)) or v.n
        if self.cls == "keep":
            scores = torch.cat([torch.full_like(scores[:1], torch.inf), scores[1:]])
            count += bool(v.spans) and all(span.start > 0 for span in v.spans)
        return best_first(scores), count

    def _assign(self, dominant: Tensor, targets: Tensor, others: Tensor, keys: Tensor, scores: Tensor) -> Assignment:
        order = torch.cat([dominant, targets])
        if not len(others) and self.order == "positional":
            return select(order, scores)
        idx = order.sort().values
        shown = torch.cat([dominant.sort().values, targets]) if self.order == "official" else idx
        # The row of every kept token in the output; the other places are never read.
        row = torch.empty_like(scores, dtype=torch.int64).scatter(0, shown, torch.arange(len(idx), device=idx.device))
        joined = (keys[others] @ keys[targets].T).argmax(1) if len(others) else others
        taken = torch.zeros_like(scores[: len(targets)]).index_add(0, joined, torch.ones_like(scores[: len(others)]))
        weight = 1 / (taken.clamp(min=1) if self.merge_mode == "add_mean" else taken + 1)
        own = torch.ones_like(weight) if self.merge_mode == "add_mean" else weight
        src, dst = torch.cat([order, others]), torch.cat([row[order], row[targets[joined]]])
        return Assignment(idx, order, src, dst, torch.cat([own.new_ones(len(dominant)), own, weight[joined]]), scores)
