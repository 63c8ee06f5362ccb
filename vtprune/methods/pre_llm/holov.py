"""HoloV: a share of the budget for each part of the image, by its attention, and the best of each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.kernels import check_finite

from ...core.method import Method, Newlines, Rounding
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import Fallback, best_first, budget_of, check_choices, check_fallback, cls_attention, cls_needs
from ..shared.arrange import Order, arranged
from ..shared.quota import quota

Inside = Literal["attention", "score"]
EPS = 1e-6


@register("holov", paper="https://arxiv.org/abs/2510.02912", seam="pre_llm")
@dataclass(frozen=True)
class HoloV(Method):
    """Runs of the token list share the budget by their mean score, and keep the tokens that CLS attends to most.

    a: [N] attention of the CLS token in the layer that feeds the projector, x: [N, D] projected tokens. The list of all
    tokens of an image, crops one after another, is cut into `runs` runs whose sizes differ by at most one. With the
    cosines S of a run of n tokens, its diagonal set to 0, m_i = sum_j S_ij / (n - 1) and v_i = sum_j (S_ij - m_i)^2 /
    (n - 1), the score of token i is 1000 a_i + alpha v_i * mean(1000 a) / mean(v), means over the run. Runs share the
    budget in proportion to their mean scores, rounded down, and the highest scores get one more each. The mean of the
    second term is alpha times that of the first by construction, so alpha changes no share.

    Newlines are dropped, as there are none in the official code. A share is cut off to a count, as officially for
    Qwen2.5-VL; the official code for LLaVA always keeps 64 tokens. Official position ids are renumbered for LLaVA
    (positions="compact") and kept for Qwen2.5-VL.

    runs: how many; None takes int(1024 / 576 * N / budget), as the official code for Qwen2.5-VL.
    alpha: weight of the diversity v.
    inside: what ranks the tokens of a run: "attention", as officially, or the "score" in which v has a say.
    redistribute: give what exceeds the size of a run to the other runs. False repeats the official code, which loses
        it: fewer tokens than the budget may stay (there it fills up with rows of zeros), and the host reads how many.
    order: "positional", or "official": the kept places are filled run by run, the highest attention first.
    fallback: as for `cls_topk`.
    """

    newlines: ClassVar[Newlines] = "drop"
    rounding: ClassVar[Rounding] = "down"

    runs: int | None = 16
    alpha: float = 0.09
    inside: Inside = "attention"
    redistribute: bool = True
    order: Order = "positional"
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_choices(self, inside=Inside, order=Order)
        check_fallback(self.fallback)
        if self.runs is not None and (isinstance(self.runs, bool) or not isinstance(self.runs, int) or self.runs < 1):
            raise ValueError(f"runs={self.runs!r}: use an int >= 1, or None to choose by the budget")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}: use a finite number >= 0, such as 0.09")

    @property
    def needs(self) -> tuple[Signal, ...]:
        return cls_needs(None, self.fallback)

    @property
    def exact(self) -> bool:
        return self.redistribute

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        attention = [cls_attention(v, None, self.fallback, self.name) for v in units]
        check_finite([*attention, *(v.x for v in units)], "attention rows and features")
        return [self._pick(v.x.float(), a, n) for v, a, n in zip(units, attention, budgets)]

    def _pick(self, x: Tensor, a: Tensor, budget: int) -> Assignment:
        n = len(a)
        count = min(n, max(1, int(1024 / 576 * n / budget)) if self.runs is None else self.runs)
        length, longer = divmod(n, count)
        run, place = torch.arange(count, device=a.device), torch.arange(length + (longer > 0), device=a.device)
        sizes, starts = length + (run < longer).long(), run * length + run.clamp(max=longer)
        held = place < sizes[:, None]  # [runs, longest]
        at = (starts[:, None] + place).clamp(max=n - 1)
        score, mean = self._scores(x[at] * held[..., None], a[at] * held, held, sizes)
        counts = quota(mean, budget, sizes, leftover="weight", redistribute=self.redistribute)
        ranked = best_first((a[at] if self.inside == "attention" else score).masked_fill(~held, -torch.inf))
        ranked = torch.where((counts >= sizes)[:, None], place, ranked)  # a run that stays whole keeps its order
        kept = place < counts[:, None]
        # What is not kept comes behind all that is: a stable sort, and a count that the host knows.
        order = (starts[:, None] + ranked).flatten()[best_first(kept.flatten().float())]
        order = order[: budget if self.redistribute else int(kept.sum())]
        scores = torch.zeros_like(a).scatter_add(0, at.flatten(), (score * held).flatten())
        return arranged(order, scores, self.order)

    def _scores(self, x: Tensor, a: Tensor, held: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Score of every token [P, L], and its mean over each run [P]; x: [P, L, D], 0 where nothing is held."""
        x = x / (x.norm(dim=-1, keepdim=True) + EPS)
        others, each = (sizes - 1).clamp(min=1)[:, None], sizes[:, None]
        own = x.square().sum(-1)  # cosine with itself, in the place of which the score has a 0
        middle = x.sum(1, keepdim=True) / each[..., None]
        about = (x * middle).sum(-1)
        mean = (each * about - own) / others
        spread = _squares(x, (x - middle) * held[..., None]) + each * (about - mean).square()
        spread = (spread + own * (2 * mean - own)).clamp(min=0) / others * held
        attention = 1000 * a
        scale = attention.sum(1, keepdim=True).abs() / each / (spread.sum(1, keepdim=True) / each + EPS)
        score = attention + self.alpha * spread * scale
        return score, score.sum(1) / sizes


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """[P, L]: for each row of x [P, L, D] the sum of its squared products with the rows of y; at most L x 2 D held."""
    if x.shape[1] <= 2 * x.shape[2]:  # beyond, two products with a [D, D] take less than one with all rows
        return (x @ y.mT).square().sum(2)
    return ((x @ (y.mT @ y)) * x).sum(2)
