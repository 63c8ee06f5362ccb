"""Weighted PageRank in plain torch: maps that fit in a fixed memory are made once, larger ones again at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.reference import blocks, columns

MAP_ELEMENTS = 1 << 24  # 64 MiB of float32: the largest map that is kept between steps
TOGETHER = 1 << 20  # small maps are worked on together as long as they stay in the cache


def page_rank(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, steps: int, start: Tensor, damping: float
) -> Tensor:
    """`kernels.page_rank` for checked arguments, start [B, H, N] float32."""
    n = q.shape[2]
    if n * n > MAP_ELEMENTS:
        score = start
        for _ in range(steps):
            score = _damped(columns(q, k, mask, scaling, score), start, damping)
        return score.clone()
    out = torch.empty_like(start, memory_format=torch.contiguous_format)
    for part in blocks(q, k, mask, rows=n, elements=max(n * n, TOGETHER)):
        at = part.at[:2]
        first = start[at][..., None, :]
        score, weights = first, part.rows(scaling)
        if part.seen is not None:
            weights = weights * part.seen
        for _ in range(steps):
            score = _damped(score @ weights, first, damping)
        out[at] = score[..., 0, :]
    return out


def _damped(score: Tensor, start: Tensor, damping: float) -> Tensor:
    return torch.lerp(score, start, damping) if damping else score
