"""Sparse weighted sums of rows, x' = A x: the same bits on every run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import backend_for, full_precision
from . import reference

__all__ = ["merge"]


def merge(x: Tensor, src: Tensor, dst: Tensor, w: Tensor, out_rows: int) -> Tensor:
    """Row `dst` of the answer sums w * x[src]; accumulated in float32, returned in x's dtype.

    x: [N, ...] floating. src, dst: [E] int32 or int64, 0 <= src < N and 0 <= dst < out_rows, in any order; equal pairs
    add up. w: [E] floating. out_rows: rows of the answer [out_rows, ...]; a row no pair names is zero.

    Deterministic, without host transfers on a GPU. Terms of one row are summed in an order that depends on the order
    of its pairs, so shuffling the pairs may change the last bit. An index out of range raises ValueError on the CPU;
    on a device nobody waits for the check, and the row it would have touched becomes NaN.
    Raises ValueError for shapes and dtypes that do not fit, and for tensors on several devices.
    """
    _check(x, src, dst, w, out_rows)
    backend = backend_for("merge", x, src, dst, w)
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    if not (rows.numel() and src.numel() and out_rows):
        return x.new_zeros(out_rows, *x.shape[1:])
    outside = (src < 0) | (src >= x.shape[0]) | (dst < 0) | (dst >= out_rows)
    if x.is_cpu:
        if outside.any():
            raise ValueError(
                f"merge got src in {src.min()}..{src.max()} (valid: 0..{x.shape[0] - 1}) and dst in {dst.min()}.."
                f"{dst.max()} (valid: 0..{out_rows - 1}): an Assignment counts src in the unit's tokens, dst along idx"
            )
        w = w.to(torch.float32)
    else:  # a wild index would end the CUDA context
        src, dst = src.clamp(0, x.shape[0] - 1), dst.clamp(0, out_rows - 1)
        w = w.to(torch.float32).masked_fill(outside, torch.nan)
    if backend == "triton":
        from . import triton

        out = triton.merge(rows, src, dst, w, out_rows)
    else:
        with full_precision(x.device):
            out = reference.merge(rows, src, dst, w, out_rows)
    return out.view(out_rows, *x.shape[1:])


def _check(x: Tensor, src: Tensor, dst: Tensor, w: Tensor, out_rows: int) -> None:
    if x.dim() < 1 or not (x.is_floating_point() and w.is_floating_point()):
        raise ValueError(f"merge takes floating x [N, ...] and w [E], not {x.dtype} {list(x.shape)} and {w.dtype}")
    if {src.dtype, dst.dtype} - {torch.int32, torch.int64}:
        raise ValueError(f"merge takes int32 or int64 src and dst, not {src.dtype} and {dst.dtype}")
    if src.dim() != 1 or not src.shape == dst.shape == w.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (src, dst, w))
        raise ValueError(f"merge takes src, dst and w of one shape [E], not {shapes}")
    if out_rows < 0:
        raise ValueError(f"out_rows={out_rows} must be at least 0")
    if src.numel() and not (x.shape[0] and out_rows):
        raise ValueError(f"merge got {src.numel()} pairs, but x has {x.shape[0]} rows and the answer {out_rows}")
