"""Groups of tokens with doubles: who survives in each, and how a budget is shared out among the groups (PruneSID)."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from .. import best_first

ROWS = 128  # products of doubles held at once: ROWS x the tokens of a group


def survivors(unit: Tensor, group: Tensor, theta: Tensor) -> Tensor:
    """[M] bool: who is left if each of M in turn, unless it is out, throws out its later doubles.

    unit: [M, C] rows of length one; those of the same group [M] whose product is above theta [] are doubles.
    """
    alive = torch.ones_like(unit[:, 0], dtype=torch.bool)
    for start in range(0, len(unit), ROWS):
        some = slice(start, start + ROWS)
        doubles = ((unit[some] @ unit[start:].T > theta) & (group[some, None] == group[start:])).triu(1)
        rest = alive[start:]
        for i, later in enumerate(doubles):
            rest &= ~(later & rest[i])
    return alive


def mean_likeness(unit: Tensor, itself: bool) -> Tensor:
    """[] mean cosine of two different rows of unit [N, C], or of the whole matrix with zeros below its diagonal.

    The sum over all pairs is the square of the sum of the rows: no N x N matrix is made.
    """
    pairs, own = unit.sum(0).square().sum(), torch.linalg.vector_norm(unit).square()
    n = len(unit)
    mean: Tensor = (pairs + own) / (2 * n * n) if itself else (pairs - own) / (n * (n - 1))
    return mean


def survivor_quota(alive: Tensor, size: Tensor, budget: int, n: int) -> Tensor:
    """[G] int64: tokens of each group, n in all (one for each that has any, if these are more).

    alive, size: [G] int64, survivors and tokens of each group.
    """
    least = size.clamp(max=1)
    most = alive.minimum(size).clamp(max=5 * -(-budget // 64))
    low = torch.zeros_like(size[0])
    high = low + budget  # each raise makes room for one token at least
    for _ in range(budget.bit_length() + 1):
        middle = (low + high) // 2
        enough = (most + middle).minimum(size).sum() >= budget
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    most = (most + high).minimum(size)
    extra = (n - least.sum()).clamp(min=0)
    # One after the other: a parallel sum rounds in an order of its own, and shares of exactly a half are common.
    shares = torch.stack(list(accumulate((alive.double() / alive.sum()).unbind())))
    edges = (shares * extra).round().long()
    given = (least + edges.diff(prepend=edges.new_zeros(1))).minimum(most)
    by = best_first(alive)
    room = (most - given)[by]
    more = (extra + least.sum() - given.sum() - room.cumsum(0) + room).clamp(min=0).minimum(room)
    return given.scatter_add(0, by, more)
