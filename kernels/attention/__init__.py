"""Exact attention rows and column means without the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import backend_for
from . import reference

MAX_WIDTH = 256  # a tile of wider heads does not fit in a streaming multiprocessor's memory


def attention_rows(q_rows: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention weights of the given query rows over all keys.

    q_rows: [B, H, R, d] queries as the attention product sees them (after RoPE and norms), any float dtype.
    k: [B, G, N, d] keys; G divides H (grouped-query attention), head h reads group h // (H / G).
    mask: None, or broadcastable to [B, H, R, N]; boolean (True = attend) or additive. Additive values at or below the
        lowest finite number of the mask's dtype block.
    scaling: factor on q.k, usually d ** -0.5.
    Returns [B, H, R, N] float32. A query that may attend to nothing gets a row of zeros, never NaN.
    Never waits for the device. Gradients flow (the reference runs then).
    Raises ValueError for shapes, dtypes or devices that do not fit together, and for empty ones.
    """
    mask = checked(q_rows, k, mask)
    if backend_for("attention_rows", *_given(q_rows, k, mask), limit=too_wide(q_rows)) == "triton":
        from .triton import attention_rows as kernel

        return kernel(q_rows, k, mask, scaling)
    return reference.attention_rows(q_rows, k, mask, scaling)


def attention_received(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scaling: float,
    block: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean attention weight each key receives, over all heads and queries, in O(N) memory.

    q [B, H, M, d], k [B, G, N, d], mask as in `attention_rows` with M query rows (or one for all of them).
    block: queries the reference handles at a time; None picks it by the size of the cache. The result does not depend
        on it beyond rounding.
    weights: [B, M], how much each query counts; None: 1 / M each. Zeros leave padded queries out.
    Returns [B, N] float32; every row sums to 1 (or to its weights) when no query is masked out entirely.
    Deterministic; never waits for the device. Raises ValueError as `attention_rows` does.
    """
    mask = checked(q, k, mask)
    if block is not None and block < 1:
        raise ValueError(f"block={block}: choose at least 1 query, or None")
    if weights is not None and weights.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"weights {tuple(weights.shape)}: pass one a query, [B, M] = {(q.shape[0], q.shape[2])}")
    if backend_for("attention_received", *_given(q, k, mask, weights), limit=too_wide(q)) == "triton":
        from .triton import attention_received as kernel

        return kernel(q, k, mask, scaling, weights)
    return reference.attention_received(q, k, mask, scaling, block, weights)


def checked(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask with its leading dimensions spelled out, [B or 1, H or 1, M or 1, N or 1].

    Raises ValueError if q [B, H, M, d], k [B, G, N, d] and the mask do not fit together or hold nothing.
    """
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or 0 in tensor.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} {tuple(tensor.shape)} of {tensor.dtype}: pass floating point [batch, heads, tokens, d], "
                "each of them at least 1"
            )
    (batch, heads, rows, d), (key_batch, groups, n, key_d) = q.shape, k.shape
    if (batch, d) != (key_batch, key_d):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and d")
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads: pass keys whose head count divides it")
    if mask is None:
        return None
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    wanted = (batch, heads, rows, n)
    if len(shape) > 4 or any(has not in (1, want) for has, want in zip(shape, wanted)):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to [B, H, queries, keys] = {wanted}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask of {mask.dtype}: pass a boolean one (True = attend) or an additive floating point one")
    return mask.reshape(shape)


def too_wide(q: Tensor) -> str:
    """Why the Triton kernels cannot take these heads; empty if they can."""
    if q.shape[-1] <= MAX_WIDTH:
        return ""
    return f"heads of {q.shape[-1]} channels do not fit on chip (at most {MAX_WIDTH})"


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


__all__ = ["attention_received", "attention_rows"]
