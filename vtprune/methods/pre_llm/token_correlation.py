"""Token correlation: crops that say more keep more; inside a crop the CLS token chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.kernels import check_finite, to_device

from ...core.method import Method
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import Fallback, best_first, budget_of, check_fallback, cls_attention, cls_needs, select, signal_of
from ..shared.crops import crops

ROWS = 1024  # similarities held at once: ROWS x the tokens of a crop


@register("token_correlation", paper="https://arxiv.org/abs/2407.14439", seam="pre_llm")
@dataclass(frozen=True)
class TokenCorrelation(Method):
    """Density of every crop from the likeness of its keys, then the tokens of highest CLS attention in it.

    Our parameterisation of a published idea (token-level correlation for documents cut into many crops): no official
    code exists, theta, m, gamma and n_min are not the paper's, and results are not the paper's results.

    A token is redundant if the keys (all heads side by side) of at least m others of its crop have a cosine above
    theta with its own. Crops are the tiles of a mosaic, the overview, the frames of a video. Without keep, a crop of n
    tokens of which u are not redundant keeps round(gamma * u), within n_min..n; the host reads their sum once a batch.
    With keep, the crops share the budget in proportion to u (Webster's method, on the device), n_min each if it
    suffices. Newlines and separators belong to no crop: they stay only when nothing else is left to keep.

    layer: of the tower, for both signals. sample: seed of a draw without replacement, chances as the CLS attention;
        None takes the highest.
    fallback: as for `cls_attention`.
    """

    theta: float = 0.8
    m: int = 8
    gamma: float = 1.0
    n_min: int = 1
    layer: int | float | None = None
    sample: int | None = None
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_fallback(self.fallback)
        Signal("keys", self.layer)  # checks a share
        if not 0.0 <= self.theta < 1.0:
            raise ValueError(f"theta={self.theta} is outside the valid range: use a cosine in [0, 1)")
        if self.m < 1 or self.n_min < 1 or not self.gamma > 0:
            raise ValueError(f"m={self.m}, n_min={self.n_min}, gamma={self.gamma}: use m >= 1, n_min >= 1, gamma > 0")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return *cls_needs(self.layer, self.fallback), Signal("keys", self.layer)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        scores = [cls_attention(v, self.layer, self.fallback, self.name) for v in units]
        keys = [signal_of(v, Signal("keys", self.layer), self.name) for v in units]
        check_finite(scores, "CLS attention rows")
        check_finite(keys, "keys")
        ranked = [self._rank(*unit) for unit in zip(units, scores, keys)]
        own = [count for v, (_, count) in zip(units, ranked) if v.budget is None]
        read = iter(torch.stack(own).tolist() if own else [])
        budgets = [next(read) if v.budget is None else budget_of(v, self.name) for v in units]
        return [select(turn.argsort(stable=True)[:k], row) for (turn, _), row, k in zip(ranked, scores, budgets)]

    def _rank(self, v: Visual, scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Turn of every token [N], the lowest is picked first; and how many the unit keeps on its own [].

        With a budget the r-th best token of a crop with u distinct ones has its turn at (r + 1/2) / u.
        """
        number, sizes = crops(v)
        by_crop = F.normalize(keys, dim=1)[number.argsort(stable=True)].split(sizes)[:-1]
        distinct = torch.stack([*(self._distinct(crop) for crop in by_crop), keys.new_zeros(())])
        best = best_first(scores if self.sample is None else self._drawn(scores, self.sample))
        best = best[number[best].argsort(stable=True)]
        crop = number[best]
        outside, u = crop == len(sizes) - 1, distinct[crop]
        rank = torch.arange(v.n, device=crop.device) - torch.searchsorted(crop, crop)
        turn = ((rank + 0.5) / u.clamp(min=1e-6)).masked_fill(outside, torch.inf)
        own = (rank < (self.gamma * u).round().clamp(min=self.n_min)) & ~outside
        if v.budget is None:
            turn = turn.masked_fill(~own, torch.inf)
        else:  # first n_min for every crop, the densest crop first
            turn = torch.where((rank < self.n_min) & ~outside, rank - self.n_min - u / (v.n + 1), turn)
        return torch.empty_like(turn).scatter(0, best, turn), own.sum()

    def _distinct(self, keys: Tensor) -> Tensor:
        """Tokens [] float32 of one crop [n, C], unit keys, that fewer than m others resemble."""
        itself = keys.square().sum(1) > self.theta
        alike = torch.cat([(rows @ keys.mT > self.theta).sum(1) for rows in keys.split(ROWS)])
        return (alike - itself.long() < self.m).sum().float()

    def _drawn(self, scores: Tensor, seed: int) -> Tensor:
        """Log scores plus Gumbel noise: the best k of them are a draw of k without replacement."""
        generator = torch.Generator().manual_seed(seed)
        noise = -torch.empty(len(scores)).exponential_(generator=generator).log()
        return scores.clamp(min=torch.finfo(scores.dtype).tiny).log() + to_device(noise, scores.device)
