"""Rows that leave in rounds, those first that have the likest double among the others (VisPruner)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import best_first

NEAR = 16  # likest rows that are remembered of each row
CELLS = 2**21  # products held at a time


def thinned(unit: Tensor, left: int, step: int) -> Tensor:
    """Which of M rows are left, [L] int64, and in which order, once there are `left` of them or half have gone.

    In each round the rows at even places are compared with those at odd places, and up to `step` of the even ones with
    the largest product with any odd one leave. Then the even ones that are left stand first, the most alike first, and
    the odd ones behind them.

    unit: [M, C] float64 rows of length one. No M x M matrix on the CPU; a GPU holds one and is not waited for.
    """
    row = torch.arange(len(unit), device=unit.device)
    doubles: _Remembered | _Matrix = _Matrix(unit) if unit.is_cuda else _Remembered(unit)
    while len(row) > max(left, len(unit) // 2):
        even, odd = row[0::2], row[1::2]
        leave = min(step, len(row) - left, len(even))
        row = torch.cat([even[best_first(doubles.most(even, odd))[leave:]], odd])
    return row


class _Matrix:
    """All products of rows [M, C] at once."""

    def __init__(self, unit: Tensor) -> None:
        self.alike = unit @ unit.T

    def most(self, some: Tensor, others: Tensor) -> Tensor:
        """For each of some rows the largest product with any of the others."""
        return self.alike.index_select(0, some).index_select(1, others).amax(1)


class _Remembered:
    """The likest rows of each row [M, NEAR], best first, looked for again when none of them is among the others."""

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit
        self.near = torch.arange(len(unit))[:, None].repeat(1, min(NEAR, len(unit)))  # itself: nothing is known
        self.products = torch.full_like(self.near, -torch.inf, dtype=unit.dtype)

    def most(self, some: Tensor, others: Tensor) -> Tensor:
        """As `_Matrix.most`; only rows of these two are asked about from now on."""
        asked = torch.zeros(len(self.unit), dtype=torch.bool).index_fill_(0, others, True)
        near = self.near.index_select(0, some)
        hit = asked.index_select(0, near.view(-1)).view(near.shape)
        first = hit.view(torch.uint8).argmax(1, keepdim=True)
        most = self.products.index_select(0, some).gather(1, first)[:, 0]
        gone = ~asked.index_fill(0, some, True)
        for lost in (~hit.gather(1, first)[:, 0]).nonzero()[:, 0].split(max(1, CELLS // len(self.unit))):
            at = some.index_select(0, lost)
            alike = self.unit.index_select(0, at) @ self.unit.T
            alike.masked_fill_(gone, -torch.inf).scatter_(1, at[:, None], -torch.inf)
            products, near = alike.topk(self.near.shape[1])
            self.products.index_copy_(0, at, products)
            self.near.index_copy_(0, at, near)
            most.index_copy_(0, lost, alike.masked_fill_(~asked, -torch.inf).amax(1))
        return most
