"""Windows of a raster: how its sides are cut, and how tokens rank in the window that they are in."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from ...core.visual import Visual
from .. import best_first
from .crops import numbered
from .raster import views
from .text import note

SIDE = 4


def parts(length: int, equal: bool) -> list[int]:
    """A side of the raster in parts: SIDE equal ones, or as many of SIDE tokens as fit, the last one longer."""
    if equal:
        count = min(SIDE, length)
        return [(i + 1) * length // count - i * length // count for i in range(count)]
    count = max(1, length // SIDE)
    return [SIDE] * (count - 1) + [length - SIDE * (count - 1)]


def windows_of(v: Visual, equal: bool, name: str) -> tuple[Tensor, list[int]]:
    """The window [N] int64 that each token is in, -1 outside the rasters, and how many tokens each window has.

    equal: True cuts a raster into SIDE x SIDE windows, False into windows of SIDE x SIDE tokens. name: of the method,
    for the note on a unit of unknown raster, whose windows are runs of the sequence.
    """
    number = torch.full((v.n,), -1, device=v.x.device)
    sizes: list[int] = []
    rasters = views(v, number)
    if not rasters:
        note(v, f"{name}: the raster is unknown, windows are runs of the sequence")
        rasters = [number.view(1, 1, -1)]
    for raster in rasters:
        t, h, w = raster.shape
        rows, columns = (parts(length, equal) for length in (h, w))
        row, column = numbered(rows, number.device), numbered(columns, number.device)
        frame = len(sizes) + torch.arange(t, device=number.device)[:, None, None] * len(rows) * len(columns)
        raster.copy_(frame + row[:, None] * len(columns) + column)
        sizes += [a * b for a, b in product(rows, columns)] * t
    return number, sizes


def ranks_within(number: Tensor, scores: Tensor) -> Tensor:
    """[N] int64: the rank of each of scores [N] among those of its window number [N], 0 for the highest."""
    order = best_first(scores)
    window, at = number[order].sort(stable=True)
    rank = torch.arange(len(at), device=at.device) - torch.searchsorted(window, window)
    return torch.empty_like(rank).scatter(0, order[at], rank)
