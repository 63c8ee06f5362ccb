"""HiPrune: what a middle layer of the tower looks at, its neighbours, and what the last layer summarises into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.kernels import check_finite

from ...core.method import Method, Newlines, Per
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import best_first, budget_of, check_choices, select, signal_of
from ..shared.raster import views

Edges = Literal["grid", "clamp_flat"]
DEEP = Signal("received", None)


@register("hiprune", paper="https://arxiv.org/abs/2508.00553", seam="pre_llm")
@dataclass(frozen=True)
class HiPrune(Method):
    """Anchors, buffers and registers by the attention that tokens receive in two layers of the tower.

    Of a budget of n tokens, round(n * alpha / 5) are anchors: those that receive most attention in the object layer.
    Buffers are the up to four neighbours of every anchor. Registers fill the budget: the tokens that receive most in
    the layer that feeds the projector. No CLS token is needed. As in the official code each crop has its own budget and
    newlines are dropped; with per="image" the neighbours cross the borders of tiles, and newlines have none. Shares are
    rounded to a count, half to even, as is that of the anchors. The official code for LLaVA-NeXT divides a total by the
    number of crops and cuts off, so its crops keep that many each, and keep_total shares out what it loses. A unit
    whose raster is unknown takes its neighbours along the sequence, noted in `Visual.state["note"]`.

    alpha: share of anchors and buffers in the budget, 0..1. Buffers that do not fit are left out, lowest score first.
    object_layer: an int counts tower layers as Python does (the paper's layer 9 is 8), a float is a share of the
        depth as in `Signal`; 0.375 is the paper's layer 9 of CLIP-L's 24 and 16 of Qwen2.5-VL's 32.
    edges: "grid" has no neighbours outside the raster; "clamp_flat" takes them from the flat index as the official
        code does: rows wrap around, and what lies outside becomes the first or the last token.
    exact_budget: False repeats the official Qwen code, which pushes chosen tokens down by one mean score where it
        should exclude them: one that still ranks as a register takes up its place twice, so fewer than n tokens
        may stay (the official LLaVA code never falls short). Needs one transfer to the host per unit.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"

    alpha: float = 0.1
    object_layer: int | float = 0.375
    edges: Edges = "grid"
    exact_budget: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha}: choose a share in 0..1")
        check_choices(self, edges=Edges)
        layer, ways = self.object_layer, "use an int (tower layer) or a float in (0, 1) (share of the depth)"
        if isinstance(layer, bool) or not isinstance(layer, int | float):
            raise TypeError(f"object_layer={layer!r}: {ways}")
        if isinstance(layer, float) and not 0.0 < layer < 1.0:
            raise ValueError(f"object_layer={layer}: {ways}")

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (Signal("received", self.object_layer), DEEP)

    @property
    def exact(self) -> bool:
        return self.exact_budget

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        scores = [[signal_of(v, need, self.name) for need in self.needs] for v in units]
        check_finite([score for pair in scores for score in pair], "attention maps")
        return [self._pick(v, n, *pair) for v, n, pair in zip(units, budgets, scores)]

    def _pick(self, v: Visual, n: int, shallow: Tensor, deep: Tensor) -> Assignment:
        anchors = best_first(shallow)[: round(n * self.alpha / 5)]
        is_anchor = torch.zeros_like(shallow, dtype=torch.bool).index_fill(0, anchors, True)
        tier = torch.where(is_anchor, 2, self._around(v, is_anchor).long())
        by_deep = best_first(deep)
        order = by_deep.gather(0, best_first(tier.gather(0, by_deep)))[:n]  # anchors, buffers, registers
        order = torch.cat([anchors, order[len(anchors) :]])
        return select(order, deep) if self.exact_budget else self._short(order, tier, deep)

    def _short(self, order: Tensor, tier: Tensor, deep: Tensor) -> Assignment:
        """The official Qwen count: registers are ranked among all tokens, the chosen ones merely pushed down."""
        chosen = torch.zeros_like(tier, dtype=torch.bool).index_fill(0, order, True) & (tier > 0)
        mean = deep.mean().clamp(min=torch.finfo(deep.dtype).tiny)
        ranked = best_first(deep / mean - chosen.float())
        free = torch.arange(len(deep), device=deep.device) < len(order) - chosen.sum()
        return Assignment(chosen.scatter(0, ranked, chosen.gather(0, ranked) | free).nonzero()[:, 0], scores=deep)

    def _around(self, v: Visual, anchors: Tensor) -> Tensor:
        """[N] bool: the tokens beside, above and below the anchors."""
        near = torch.zeros_like(anchors)
        rasters = list(zip(views(v, anchors), views(v, near)))
        if not rasters:
            v.state["note"] = f"{self.name}: the raster is unknown, buffers are the neighbours along the sequence"
            rasters = [(anchors.view(1, 1, -1), near.view(1, 1, -1))]
        elif self.edges == "clamp_flat":
            for step in (1, rasters[0][0].shape[2]):
                near[:-step] |= anchors[step:]
                near[step:] |= anchors[:-step]
                near[0] |= anchors[:step].any()
                near[-1] |= anchors[-step:].any()
            return near
        for there, here in rasters:
            here[:, 1:] |= there[:, :-1]
            here[:, :-1] |= there[:, 1:]
            here[:, :, 1:] |= there[:, :, :-1]
            here[:, :, :-1] |= there[:, :, 1:]
        return near
