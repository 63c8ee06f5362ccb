"""Ranks and shares as tensors, so that counts which depend on the data never leave the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import best_first


def ranks(scores: Tensor) -> Tensor:
    """Rank of each of scores [N], int64: 0 for the largest, the lower index first among equals.

    >>> ranks(torch.tensor([1.0, 3.0, 3.0]))
    tensor([2, 0, 1])
    """
    return best_first(scores).argsort()


def in_proportion(counts: Tensor, total: int, last: int) -> Tensor:
    """Share `total` in proportion to counts [P] int64, each within one of its exact share; they sum to total.

    The last gets at most `last`; what exceeds it goes to the first.

    >>> in_proportion(torch.tensor([3, 1, 4]), 4, last=1)
    tensor([3, 0, 1])
    """
    whole = counts.sum()
    edges = (2 * total * counts.cumsum(0) + whole) // (2 * whole)  # rounded cumulative shares
    share = edges.diff(prepend=edges.new_zeros(1))
    over = (share[-1:] - last).clamp(min=0)
    return torch.cat([share[:1] + over, share[1:-1], share[-1:] - over])
