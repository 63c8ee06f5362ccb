"""Weighted PageRank on attention maps, without the N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import checked, too_wide
from ..dispatch import backend_for
from . import reference


def page_rank(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scaling: float,
    steps: int,
    start: Tensor | None = None,
    damping: float = 0.0,
) -> Tensor:
    """Importance of every token of every head: `steps` times, each token hands its score to what it attends to.

    With A = softmax(scaling * q k^T + mask), one step is s <- (1 - damping) A^T s + damping * start: token j is
    important if important tokens attend to it. Zero-TPrune (https://arxiv.org/abs/2305.17328) and AIM
    (https://arxiv.org/abs/2412.03248) run a few steps with damping 0; AIM sharpens the map, scaling / 0.1.

    q [B, H, N, d], k [B, G, N, d], mask as in `attention_rows`; queries and keys are the same N tokens.
    start: scores before the first step, broadcastable to [B, H, N]; None: 1 / N each. Zeros keep padding (whose
        columns the mask blocks) out.
    Returns [B, H, N] float32. A step keeps the sum of a head's scores, apart from the score of tokens that may attend
    to nothing, which is lost (damping 0) or shrinks. Deterministic; never waits for the device.
    Raises ValueError as `attention_rows` does, and for steps < 0, damping outside 0..1, or a start of another shape.
    """
    mask = checked(q, k, mask)
    shape = q.shape[:3]
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys: PageRank needs the same tokens as both")
    if steps < 0:
        raise ValueError(f"steps={steps}: choose 0 or more")
    if not 0 <= damping <= 1:
        raise ValueError(f"damping={damping}: choose a share from 0 to 1")
    if start is None:
        start = q.new_full((1,), 1 / q.shape[2], dtype=torch.float32)
    if start.dim() > 3 or any(has not in (1, want) for has, want in zip(start.shape[::-1], shape[::-1])):
        raise ValueError(f"start {tuple(start.shape)} does not broadcast to [B, H, N] = {tuple(shape)}")
    given = [t for t in (q, k, mask, start) if t is not None]
    begin = start.float().expand(shape)
    if backend_for("page_rank", *given, limit=too_wide(q)) == "triton":
        from .triton import page_rank as kernel

        return kernel(q, k, mask, scaling, steps, begin, damping)
    return reference.page_rank(q, k, mask, scaling, steps, begin, damping)


__all__ = ["page_rank"]
