"""Token recycling, as in SparseVLM: of the tokens that go, the best are clustered, and a mean stays of each cluster.

Of p tokens that go, the int(0.3 p) + 1 best are recycled, and one mean stays for every ten of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.visual import Assignment
from .density_peaks import density_peaks


def recycled(dropped: int) -> int:
    """How many of so many dropped tokens are recycled."""
    return int(0.3 * dropped) + 1


def means_of(dropped: int) -> int:
    """How many means stand for them."""
    return recycled(dropped) // 10 + 1


def kept_beside(budget: int, n: int) -> int:
    """The most of n tokens that can stay as they are, at least one, so that with the means there are `budget`."""
    return next((kept for kept in range(budget, 0, -1) if kept + means_of(n - kept) <= budget), 1)


def recycle(x: Tensor, stay: Tensor, pool: Tensor, count: int, scores: Tensor, behind: bool = False) -> Assignment:
    """Keep the tokens `stay` [K] of x [N, D], in order of choice, and one mean for each of `count` clusters of `pool`.

    A mean stands at its centre's place; behind=True puts the means behind all others, best centre first.
    """
    centres, member = density_peaks(x.index_select(0, pool).float(), count)
    places = pool.index_select(0, centres)
    plain = stay.sort().values
    picked = torch.cat([plain, places])
    idx = picked.sort().values
    row = torch.arange(len(idx), device=idx.device) if behind else torch.searchsorted(idx, picked)
    size = torch.zeros_like(scores[:count]).index_add(0, member, torch.ones_like(scores[: len(pool)]))
    w = torch.cat([torch.ones_like(scores[: len(stay)]), 1 / size[member]])
    dst = torch.cat([row[: len(stay)], row[len(stay) :][member]])
    return Assignment(idx, torch.cat([stay, places]), torch.cat([plain, pool]), dst, w, scores)
