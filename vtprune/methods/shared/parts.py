"""An any-resolution image in parts: its overview, its crops, and what stands outside of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...core.method import Method
from ...core.visual import Assignment, Visual
from .. import best_first
from .raster import views


class Parts(NamedTuple):
    """The parts of a unit: the overview, the crops row by row, and the tokens outside every raster.

    at: [n_p] int64 each, positions in raster order. grids: rows and columns of the overview and of the crops.
    cells: rows and columns of crops; (0, 0) where the overview is all there is.
    """

    at: list[Tensor]
    grids: list[tuple[int, int]]
    cells: tuple[int, int]

    @property
    def heights(self) -> list[int]:
        """Of the rows of crops, in tokens."""
        return [h for h, _ in self.grids[1 :: max(1, self.cells[1])]]

    @property
    def widths(self) -> list[int]:
        """Of the columns of crops, in tokens."""
        return [w for _, w in self.grids[1 : 1 + self.cells[1]]]


def parts_of(v: Visual) -> Parts:
    """The parts of a unit. All rasters of one that is no overview beside one mosaic of tiles are its overview."""
    positions = torch.arange(v.n, device=v.x.device)
    rasters = views(v, positions) or [positions.view(1, 1, -1)]
    tiled = [i for i, span in enumerate(v.spans) if span.tiles]
    grids, cells, at = [(1, v.n)], (0, 0), [torch.cat([raster.flatten() for raster in rasters])]
    if len(v.spans) == 2 and len(tiled) == 1 and all(span.grid[0] == 1 for span in v.spans):
        heights, widths = v.spans[tiled[0]].tiles  # type: ignore[misc]
        overview, mosaic = rasters[1 - tiled[0]][0], rasters[tiled[0]][0]
        tiles = [tile for band in mosaic.split(list(heights)) for tile in band.split(list(widths), 1)]
        at = [part.flatten() for part in (overview, *tiles)]
        grids, cells = [(part.shape[0], part.shape[1]) for part in (overview, *tiles)], (len(heights), len(widths))
    inside = torch.cat(at)
    outside = torch.ones_like(positions).index_fill(0, inside, 0)
    return Parts([*at, best_first(outside)[: v.n - len(inside)]], grids, cells)


def enlarged(scores: Tensor, parts: Parts) -> list[Tensor]:
    """Scores [n] of the overview enlarged to the mosaic (bilinear), cut into one [n_p] for each crop."""
    size = (sum(parts.heights), sum(parts.widths))
    seen = interpolate(scores.view(1, 1, *parts.grids[0]), size, mode="bilinear", align_corners=False)[0, 0]
    return [cell.flatten() for band in seen.split(parts.heights) for cell in band.split(parts.widths, 1)]


def raster_turns(parts: Parts, device: torch.device) -> Tensor:
    """[tokens behind the overview] int64: the order in which the official code has those of the crops, then others."""
    (height, width), columns = parts.grids[0], parts.cells[1]
    turns = []
    for number, (h, w) in enumerate(parts.grids[1:]):
        i = torch.arange(h * w, device=device)
        turns.append(((number // columns * height + i // width) * columns + number % columns) * width + i % width)
    last = height * width * parts.cells[0] * columns
    return torch.cat([*turns, last + torch.arange(len(parts.at[-1]), device=device)])


def ask_each(method: Method, v: Visual, parts: Parts, counts: Sequence[int]) -> Assignment:
    """The answers of a method about each part of a unit on its own, side by side.

    counts: how many tokens each part keeps; a part of none is not asked about, and of those outside the first stay.
    """
    idx, order, merged, merges = [], [], [], False
    for at, grid, n in zip(parts.at, [*parts.grids, None], counts):
        if not n:
            continue
        answer = Assignment(torch.arange(n, device=at.device))
        if grid is not None:
            signals = {need: s.index_select(0, at) if len(s) == v.n else s for need, s in v.signals.items()}
            part = replace(v, x=v.x[at], budget=n, grid=(1, *grid), spans=(), video=False, signals=signals)
            answer = method(part)
        src, to, w = answer.src, answer.dst, answer.w
        if src is None or to is None or w is None:
            src, to = answer.idx, torch.arange(len(answer.idx), device=at.device)
            w = torch.ones_like(to, dtype=torch.float32)
        idx.append(at[answer.idx])
        order.append(idx[-1] if answer.order is None else at[answer.order])
        merged.append((at[src], idx[-1][to], w))
        merges |= answer.merges
    kept = torch.cat(idx).sort().values
    if not merges:
        return Assignment(kept, torch.cat(order))
    src, to, w = (torch.cat(part) for part in zip(*merged))
    return Assignment(kept, torch.cat(order), src, torch.searchsorted(kept, to), w)
