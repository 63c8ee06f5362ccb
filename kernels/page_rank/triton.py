"""Weighted PageRank with Triton: the rows' log-sum-exp once, then one launch a step for all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.triton import columns, log_sum_exp


def page_rank(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, steps: int, start: Tensor, damping: float
) -> Tensor:
    """`kernels.page_rank` for checked arguments, start [B, H, N] float32; O(N) memory."""
    score = start
    if steps:
        lse = log_sum_exp(q, k, mask, scaling)
    for _ in range(steps):
        score = columns(q, k, mask, scaling, lse, score)
        if damping:
            score = torch.lerp(score, start, damping)
    return score.clone() if score is start else score
