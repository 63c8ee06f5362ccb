"""Average pooling: merge neighbouring tokens, the test-time baseline of LLaVolta."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.kernels import check_finite, to_device

from ...core.method import Method, spread
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, check_choices
from ..shared.raster import Mode, blocks, resample


@register("average_pool", paper="https://arxiv.org/abs/2406.20092", seam="pre_llm")
@dataclass(frozen=True)
class AveragePool(Method):
    """Mean of the tokens of each cell; a cell stands at the position of its centre token.

    With a budget: a raster whose share is frames x rows x columns that fit its grid is pooled in 2-D cells, the
    most square ones; any other share in that many runs of the raster order, equal in length up to one token
    (LLaVolta's rule where the share divides the token count). The rasters of a unit share the budget in
    proportion to their tokens; newlines and separators are pooled among themselves, dropped at a share of 0.

    mode: "average", or "bilinear" (interpolation at the cell centres, corners not aligned).
    stride: fixed spatial stride instead of a budget (leave keep unset), as LLaVA's video models pool their
        frames: "average" drops a remainder, "bilinear" rounds the size up. Newlines and separators stay.
    """

    mode: Mode = "average"
    stride: int | None = None

    def __post_init__(self) -> None:
        check_choices(self, mode=Mode)
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride={self.stride}: choose an int >= 1, or None to pool to a budget")

    @property
    def adaptive(self) -> bool:
        return self.stride is not None

    def __call__(self, v: Visual) -> Assignment:
        check_finite([v.x])
        plan = _to_budget(v, budget_of(v, self.name)) if self.stride is None else self._to_stride(v, self.stride)
        parts = [resample(raster, size, self.mode) for raster, size in plan]
        idx, order = torch.cat([p.centre for p in parts]).sort()
        rank = order.argsort()  # row of each cell once the cells stand in positional order
        first = torch.tensor([0, *(len(p.centre) for p in parts)]).cumsum(0)
        src, w = torch.cat([p.src for p in parts]), torch.cat([p.w for p in parts]).float()
        dst = rank[torch.cat([p.dst + start for p, start in zip(parts, first)])]
        idx, src, dst, w = (to_device(t, v.x.device) for t in (idx, src, dst, w))
        return Assignment(idx, src=src, dst=dst, w=w)

    def _to_stride(self, v: Visual, stride: int) -> list[tuple[Tensor, tuple[int, int]]]:
        plan = []
        for raster in blocks(v):
            _, h, w = raster.shape
            if min(h, w) < stride:
                plan.append((raster, (h, w)))
            elif self.mode == "average":
                size = h // stride, w // stride
                plan.append((raster[:, : size[0] * stride, : size[1] * stride], size))
            else:
                plan.append((raster, (-(-h // stride), -(-w // stride))))
        count = sum(raster.shape[0] * h * w for raster, (h, w) in plan)
        if stride > 1 and count == v.n:
            raise ValueError(f"stride={stride}: this unit has no grid that large; pass keep=... instead of stride")
        if v.budget not in (None, count):
            raise ValueError(f"stride={stride} gives {count} tokens, not {v.budget}: leave out keep or stride")
        return plan


def _to_budget(v: Visual, budget: int) -> list[tuple[Tensor, tuple[int, int]]]:
    rasters = blocks(v)
    plan = []
    for raster, share in zip(rasters, spread(budget, [raster.numel() for raster in rasters])):
        cells = _cells(raster.shape, share)
        if share:
            plan.append((raster, cells) if cells else (raster.reshape(1, 1, -1), (1, share)))
    return plan


def _cells(shape: torch.Size, share: int) -> tuple[int, int] | None:
    """Rows and columns of cells per frame, the cells as square as possible; None if no layout has `share`."""
    t, h, w = shape
    layouts = [(a, share // (t * a)) for a in range(1, h + 1) if share % (t * a) == 0]
    fits = [(a, b) for a, b in layouts if 1 <= b <= w]
    return min(fits, key=lambda cells: abs(math.log(h * cells[1] / (w * cells[0]))), default=None)
