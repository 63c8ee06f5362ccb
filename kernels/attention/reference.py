"""Softmax rows of attention without the N x N matrix: O(R N d) for R query rows, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # 64 MiB of float32 scores at a time


def attention_rows(q_rows: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention weights of the given query rows over all keys.

    q_rows: [B, H, R, d] queries as the attention product sees them (after RoPE and norms).
    k: [B, G, N, d] keys; G divides H (grouped-query attention), head h reads group h // (H / G).
    mask: None, or broadcastable to [B, H, R, N]; boolean (True = attend) or additive.
    scaling: factor on q.k, usually d ** -0.5.
    Returns [B, H, R, N] float32. A query that may attend to nothing gets a row of zeros, never NaN.
    Raises ValueError if G does not divide H.
    """
    heads, groups = q_rows.shape[1], k.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads: pass keys whose head count divides it")
    # Heads of one group are stacked along the rows: the keys are read once and never repeated.
    stacked = q_rows.float().reshape(q_rows.shape[0], groups, -1, q_rows.shape[-1])
    scores = (stacked @ k.float().transpose(-1, -2)).reshape(*q_rows.shape[:3], k.shape[2]) * scaling
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        blocked = ~mask
    else:
        blocked = mask <= torch.finfo(mask.dtype).min
        scores = scores + mask.float()
    lowest = torch.finfo(torch.float32).min
    return scores.masked_fill(blocked, lowest).softmax(-1).masked_fill(blocked, 0.0)


def attention_received(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, block: int | None = None) -> Tensor:
    """Mean attention weight each key receives, over all heads and queries.

    q [B, H, M, d], k [B, G, N, d], mask as in `attention_rows` with M query rows (or one for all of them).
    block: queries handled at a time; None picks it so that the scores take about 64 MiB.
    Returns [B, N] float32; every row sums to 1 when no query is masked out entirely.
    """
    batch, heads, rows, _ = q.shape
    step = block or max(1, BLOCK_ELEMENTS // max(1, batch * heads * k.shape[2]))
    total = q.new_zeros(batch, k.shape[2], dtype=torch.float32)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        cut = mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., part, :]
        total += attention_rows(q[:, :, part], k, cut, scaling).sum(dim=(1, 2))
    return total / (heads * rows)
