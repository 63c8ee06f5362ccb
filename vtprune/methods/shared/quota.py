"""Shares of a budget: in proportion to weights, with a cap on each, as counts that sum to the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .counting import ranks

Leftover = Literal["remainder", "weight"]
LEAST = 1e-12  # weights below it, in proportion to the largest, count as this


def quota(
    weights: Tensor, total: int, caps: Tensor, *, leftover: Leftover = "remainder", redistribute: bool = True
) -> Tensor:
    """[P] int64 on the device of the weights: counts in proportion to weights [P] >= 0, at most caps [P] int64 each.

    The counts sum to `total`, or to the sum of the caps where that is less. What exceeds a cap goes to the others in
    proportion to their weights, and to weights of 0 only where nobody else has room. Shares are rounded down; what is
    left over goes, one each, to the largest remainders or to the largest weights, ties to the lower index.

    redistribute: False cuts off what exceeds a cap, and the counts sum to less.

    >>> quota(torch.tensor([3.0, 1.0, 0.0]), 6, torch.tensor([4, 4, 4]))
    tensor([4, 2, 0])
    >>> quota(torch.tensor([3.0, 1.0, 0.0]), 7, torch.tensor([4, 4, 4]), redistribute=False)
    tensor([4, 2, 0])
    """
    room = caps.double()
    weights = weights.double()
    weights = (weights / weights.amax().clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=LEAST)
    if redistribute:
        shares = torch.minimum(room, _level(weights, total, room) * weights)
    else:
        shares = weights / weights.sum() * total
    counts = shares.floor()
    able = (counts < room) if redistribute else torch.ones_like(caps, dtype=torch.bool)
    key = shares - counts if leftover == "remainder" else weights
    counts = counts.long() + (able & (ranks(key.masked_fill(~able, -1.0)) < total - counts.sum()))
    return torch.minimum(counts, caps)


def _level(weights: Tensor, total: int, room: Tensor) -> Tensor:
    """[] float64: the level l at which min(room, l * weights) sums to the total; inf where there is room for all."""
    full_at = room / weights
    order = full_at.argsort(stable=True)
    room, weights = room[order], weights[order]
    # If those before j are full, the others fill up to this level: the answer at the first j that is not full by it.
    level = (total - room.cumsum(0) + room) / weights.flip(0).cumsum(0).flip(0)
    fits = level <= full_at[order]
    return torch.where(fits.any(), level.gather(0, fits.long().argmax(0, keepdim=True))[0], torch.inf)


def shares_of_cells(scores: Tensor, cells: tuple[int, int], temperature: float) -> Tensor:
    """[rows * columns]: how much more or less than an equal share the cells of a grid over an image deserve, mean 1.

    scores: [h, w] of an overview of the image, such as the attention of its tokens. cells: rows and columns of the
    grid; a cell is h // rows by w // columns, and the last ones take what remains. With the softmax p over the sums of
    the cells / temperature, the share of cell i is 1 + p_i - mean(p) (GlobalCom2, https://arxiv.org/abs/2501.05179).
    """
    sums = [band.split(_cuts(scores.shape[1], cells[1]), 1) for band in scores.split(_cuts(scores.shape[0], cells[0]))]
    p = (torch.stack([cell.sum() for band in sums for cell in band]) / temperature).softmax(0)
    return 1 + p - p.mean()


def _cuts(size: int, parts: int) -> Sequence[int]:
    return [*[size // parts] * (parts - 1), size - size // parts * (parts - 1)]
