"""Which crop each token of a unit belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Span, Visual


def crops(v: Visual) -> Tensor:
    """[N] int64 on the CPU: the crop of each token, counted from 0; -1 for newlines and separators.

    A crop is one frame of one span, or one tile of a mosaic whose tiles are known. A unit without spans is its grid;
    without either it is one crop.

    >>> crops(Visual(torch.zeros(7, 8), None, spans=(Span(0, (1, 1, 2)), Span(3, (1, 2, 1), newline=True))))
    tensor([ 0,  0, -1,  1, -1,  1, -1])
    """
    number = torch.full((v.n,), -1)
    known = 0
    for span in v.spans or (Span(0, v.grid or (1, 1, v.n)),):
        t, h, w = span.grid
        heights, widths = span.tiles or ((h,), (w,))
        tile = _which(heights)[:, None] * len(widths) + _which(widths)
        tiles = len(heights) * len(widths)
        frames = known + tiles * torch.arange(t)[:, None, None] + tile
        rows = torch.nn.functional.pad(frames, (0, int(span.newline)), value=-1)
        number[span.start : span.start + len(span)] = rows.flatten()
        known += t * tiles
    return number


def _which(sizes: tuple[int, ...]) -> Tensor:
    """(2, 3) -> [0, 0, 1, 1, 1]."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
