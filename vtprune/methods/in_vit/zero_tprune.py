"""Zero-TPrune: PageRank on the attention map says what matters; of similar tokens the less important one goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.kernels import best_first, page_rank

from ...core.reduction import Reads, Reduction, Tokens, keep_rows
from ...registry import register_own as register
from .schedule import AtPlaces


@register("zero_tprune", paper="https://arxiv.org/abs/2305.17328", seam="in_vit")
@dataclass(frozen=True)
class ZeroTPrune(AtPlaces):
    """I'-S-I: importance from one PageRank step guides the S-stage, importance from all steps then prunes the rest.

    Importance of a token: root mean square over heads of its PageRank on softmax(q.k). S-stage: patches in two halves
    by importance, every token of the lower half with its most similar one of the upper (cosine of mean keys), the lower
    ones of the most similar pairs go. The second importance is that of the map restricted to what is left, rows summing
    to 1 again. No code is public: this follows the paper's description, and what is uncertain is an option.

    at: where tokens go, as shares of the depth (behind blocks 2, 4, 7, 10 and 12 of 12). similar: share of the tokens
        to drop that the S-stage takes. steps: PageRank steps in the first three blocks, between, and in the last three.
    first_steps: those of I'. v_min, v_max: a head counts if the variance of its scores over patches is within these
        limits, where no head passes all count; None: all count. The paper has 0.01 and 0.7, but not on which scale. On
        scores of mean 1 they shut out the heads that look at few things: the embedded image model then answers 82.7 %
        at 25 %, with all heads 85.1 %, and 77.3 and 87.4 % where all tokens go behind block 9 of 12.
    scale: of those scores: mean 1 ("mean1") or sum 1 ("raw"), on which no head of 100 tokens or more reaches 0.01.
    cls_start: a CLS token starts PageRank "sqrt_n" times as high as the others, or at the same score ("uniform").
    """

    reads: ClassVar[tuple[Reads, ...]] = ("queries", "keys")
    at: tuple[float, ...] = (1 / 12, 3 / 12, 6 / 12, 9 / 12, 11 / 12)
    similar: float = 0.25
    steps: tuple[int, int, int] = (30, 5, 1)
    first_steps: int = 1
    v_min: float | None = None
    v_max: float | None = None
    scale: str = "mean1"
    cls_start: str = "sqrt_n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.similar <= 1:
            raise ValueError(f"similar={self.similar}: a share from 0 to 1")
        for name, valid in (("scale", ("mean1", "raw")), ("cls_start", ("sqrt_n", "uniform"))):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, valid))}")

    def reduce(self, t: Tokens, left: int) -> Reduction:
        q, k, p = t.read("queries"), t.read("keys"), t.prefix
        drop = min(int(self.similar * (t.n - left)), t.n // 2)
        rows, stats = keep_rows(t, torch.arange(t.n, device=q.device).expand(q.shape[0], -1)), {}
        if drop:
            guide, _ = self._importance(t, q, k, self.first_steps)
            gone, _ = similar_pairs(k.mean(1)[:, p:], guide[:, p:], drop)
            rows = without(rows, gone + p)
            q, k = (x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k))
        if rows.shape[1] - p > left:
            importance, stats["heads_passed"] = self._importance(t, q, k, self._steps(t))
            best = best_first(importance[:, p:])[:, :left] + p
            kept = torch.cat([rows[:, :p], rows.gather(1, best.sort(1).values)], 1)
        else:
            kept = rows
        return Reduction(kept, stats=stats)

    def _steps(self, t: Tokens) -> int:
        k, depth = t.block
        return self.steps[0] if k < 3 else self.steps[2] if k >= depth - 3 else self.steps[1]

    def _importance(self, t: Tokens, q: Tensor, k: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """[B, N] and the share of heads that passed, [B]."""
        n = q.shape[2]
        start = torch.full((n,), 1 / n, device=q.device)
        if t.has_cls and self.cls_start == "sqrt_n":
            start[0] *= n**0.5
            start = start / start.sum()
        scores = page_rank(q, k, None, t.scaling, steps, start)
        passed = heads(scores[..., t.prefix :] * (n if self.scale == "mean1" else 1), self.v_min, self.v_max)
        return root_mean_square(scores, passed), passed.float().mean(1)


def heads(scores: Tensor, v_min: float | None, v_max: float | None) -> Tensor:
    """[B, H] bool: heads whose scores [B, H, n] have a (population) variance within the limits; all where none has."""
    variance = scores.var(dim=-1, correction=0)
    passed = torch.ones_like(variance, dtype=torch.bool)
    if v_min is not None:
        passed &= variance >= v_min
    if v_max is not None:
        passed &= variance <= v_max
    return passed | ~passed.any(1, keepdim=True)


def root_mean_square(scores: Tensor, passed: Tensor) -> Tensor:
    """scores [B, H, N] -> [B, N], over the heads that passed [B, H]."""
    weight = passed.float()[..., None]
    return ((scores.square() * weight).sum(1) / weight.sum(1)).sqrt()


def similar_pairs(features: Tensor, importance: Tensor, drop: int) -> tuple[Tensor, Tensor]:
    """The `drop` patches of the less important half that are most similar to one of the other half, and these.

    features [B, n, d], importance [B, n] -> two [B, drop], most similar first; the upper half has the odd patch.
    """
    order = best_first(importance)
    half = (order.shape[1] + 1) // 2
    upper, lower = order[:, :half].sort(1).values, order[:, half:].sort(1).values
    unit = torch.nn.functional.normalize(features, dim=-1)
    a, b = (unit.gather(1, rows[..., None].expand(-1, -1, unit.shape[-1])) for rows in (lower, upper))
    best, partner = (a @ b.transpose(-1, -2)).max(-1)
    top = best_first(best)[:, :drop]
    return lower.gather(1, top), upper.gather(1, partner.gather(1, top))


def without(rows: Tensor, gone: Tensor) -> Tensor:
    """rows [B, N] (0..N-1) without those in gone [B, E], in order: [B, N - E]."""
    mark = torch.zeros_like(rows, dtype=torch.int8).scatter_(1, gone, 1)
    return best_first(-mark)[:, : rows.shape[1] - gone.shape[1]]
