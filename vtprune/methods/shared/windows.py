"""Windows of a raster: how its sides are cut, and how tokens rank in the window that they are in."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import best_first

SIDE = 4


def parts(length: int, equal: bool) -> list[int]:
    """A side of the raster in parts: SIDE equal ones, or as many of SIDE tokens as fit, the last one longer."""
    if equal:
        count = min(SIDE, length)
        return [(i + 1) * length // count - i * length // count for i in range(count)]
    count = max(1, length // SIDE)
    return [SIDE] * (count - 1) + [length - SIDE * (count - 1)]


def ranks_within(number: Tensor, scores: Tensor) -> Tensor:
    """[N] int64: the rank of each of scores [N] among those of its window number [N], 0 for the highest."""
    order = best_first(scores)
    window, at = number[order].sort(stable=True)
    rank = torch.arange(len(at), device=at.device) - torch.searchsorted(window, window)
    return torch.empty_like(rank).scatter(0, order[at], rank)
