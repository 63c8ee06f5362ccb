"""Evenly spaced tokens: the control that knows the grid and nothing of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vtprune.kernels import check_finite, to_device

from ...core.method import Method, spread
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of
from ..shared.raster import blocks, evenly


@register("uniform", paper="https://arxiv.org/abs/2403.15388", seam="pre_llm")
@dataclass(frozen=True)
class Uniform(Method):
    """A regular lattice of exactly `budget` tokens in space, frames sharing the budget evenly.

    Each raster of a unit (crop, mosaic, its newline column, a run of separators) gets a share of the budget in
    proportion to its tokens, largest remainder first. Within a frame the lattice is as square as it can be:
    evenly spaced rows of evenly spaced tokens, the same number in each up to one. ("Spatial sampling" of the paper.)
    """

    def __call__(self, v: Visual) -> Assignment:
        check_finite([v.x])
        rasters = blocks(v)
        shares = spread(budget_of(v, self.name), [raster.numel() for raster in rasters])
        picked = [raster.flatten()[_lattice(raster, share)] for raster, share in zip(rasters, shares) if share]
        return Assignment(idx=to_device(torch.cat(picked).sort().values, v.x.device))


def _lattice(raster: Tensor, count: int) -> Tensor:
    """`count` flat indices into raster [t, h, w], evenly spaced over frames, then rows, then columns."""
    t, h, w = raster.shape
    frames = evenly(min(count, t), t).tolist()
    return torch.cat([frame * h * w + _frame(h, w, share) for frame, share in zip(frames, _shares(count, len(frames)))])


def _frame(h: int, w: int, count: int) -> Tensor:
    rows = max(math.ceil(count / w), min(round(math.sqrt(count * h / w)), h, count), 1)
    return torch.cat([row * w + evenly(n, w) for row, n in zip(evenly(rows, h).tolist(), _shares(count, rows))])


def _shares(count: int, parts: int) -> list[int]:
    """Split count into parts that differ by at most one, the larger ones spaced evenly.

    >>> _shares(8, 3)
    [2, 3, 3]
    """
    edges = [i * count // parts for i in range(parts + 1)]
    return [b - a for a, b in pairwise(edges)]
