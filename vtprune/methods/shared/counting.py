"""Ranks and shares as tensors, so that counts which depend on the data never leave the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import best_first


def ranks(scores: Tensor) -> Tensor:
    """Rank of each of scores [N], int64: 0 for the largest, the lower index first among equals.

    >>> ranks(torch.tensor([1.0, 3.0, 3.0]))
    tensor([2, 0, 1])
    """
    return best_first(scores).argsort()


def beyond_best(first: Tensor, n_first: Tensor, second: Tensor, n_second: Tensor) -> Tensor:
    """[N] bool: neither among the best n_first of the scores `first` [N], nor of the others among the best of `second`.

    n_first, n_second: [] int64 on the device.
    """
    picked = ranks(first) < n_first
    return ~picked & (ranks(second.masked_fill(picked, -torch.inf)) >= n_second)


def share_of(whole: Tensor | int, part: Tensor, of: Tensor | int, cut: bool) -> Tensor:
    """whole * part / of [] int64, rounded down; `cut` as int(whole * (part / of)) does, which may be one less."""
    return (whole * (part.double() / of)).long() if cut else whole * part // of


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


def apportion(weights: Tensor, total: int, cap: int) -> Tensor:
    """Share `total` in proportion to weights [P] >= 0, at most `cap` each; largest remainders, ties to the lower index.

    What exceeds a cap goes to the others in proportion to their room. 0 <= total <= P * cap.

    >>> apportion(torch.tensor([3.0, 1.0, 0.0]), 6, cap=4)
    tensor([4, 2, 0])
    """
    tiny = torch.finfo(weights.dtype).tiny
    exact = (weights / weights.sum().clamp(min=tiny) * total).clamp(max=cap)
    room = cap - exact
    exact = exact + room / room.sum().clamp(min=tiny) * (total - exact.sum()).clamp(min=0)
    floor = exact.floor().clamp(max=cap)
    left = torch.where(floor < cap, exact - floor, -1.0)
    return floor.long() + (ranks(left) < total - floor.sum())
