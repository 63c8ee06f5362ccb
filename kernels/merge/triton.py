"""`merge` as one Triton program per output row and block of columns: no atomics, so the same bits on every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import segments

BLOCK_E, BLOCK_D = 8, 128  # rows fetched at once by a program, and its columns


def merge(x: Tensor, src: Tensor, dst: Tensor, w: Tensor, out_rows: int) -> Tensor:
    """As `reference.merge`."""
    src, w, bounds = segments(src, dst, w, out_rows)
    out = x.new_empty(out_rows, x.shape[1])
    grid = (out_rows, triton.cdiv(x.shape[1], BLOCK_D))
    with torch.cuda.device_of(x):
        _merge[grid](out, x, *x.stride(), src, w, bounds, x.shape[1], BLOCK_E=BLOCK_E, BLOCK_D=BLOCK_D)
    return out


@triton.jit
def _merge(out, x, stride_n, stride_d, src, w, bounds, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    start, stop = tl.load(bounds + row), tl.load(bounds + row + 1)
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(start, stop, BLOCK_E):
        pair = first + tl.arange(0, BLOCK_E)
        mine = pair < stop
        at = tl.load(src + pair, mask=mine, other=0)  # int64, so offsets beyond 2^31 elements are too
        weight = tl.load(w + pair, mask=mine, other=0.0)
        tile = tl.load(
            x + at[:, None] * stride_n + cols.to(tl.int64)[None, :] * stride_d,
            mask=mine[:, None] & inside[None, :],
            other=0.0,
        )
        total += weight[:, None] * tile.to(tl.float32)
    tl.store(out + row * D + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)
