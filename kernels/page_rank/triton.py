"""Weighted PageRank with Triton: all steps of a small head in one launch, else the rows' sums and a launch a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.triton import call_of, column_sums, columns, log_sum_exp, row_sums

ALONE = 256  # tokens of a head that one program handles; the columns of more are spread over many, a launch a step


def page_rank(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, steps: int, start: Tensor, damping: float
) -> Tensor:
    """`kernels.page_rank` for checked arguments, start [B, H, N] float32; O(N) memory."""
    if not steps:
        return start.clone()
    if q.shape[2] <= ALONE:
        return _in_one_launch(q, k, mask, scaling, steps, start, damping)
    score, lse = start, log_sum_exp(q, k, mask, scaling)
    for _ in range(steps):
        score = columns(q, k, mask, scaling, lse, score)
        if damping:
            score = torch.lerp(score, start, damping)
    return score


def _in_one_launch(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, steps: int, start: Tensor, damping: float
) -> Tensor:
    """As `page_rank`, by one program a head."""
    batch, heads, n, _ = q.shape
    call = call_of(q, k, mask, scaling)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    score = torch.empty(2, batch, heads, n, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _page_rank_kernel[(batch * heads,)](
            *call.tensors, lse, score, start, *call.strides, *start.stride(),
            steps, float(damping), heads, heads // k.shape[1], *call.numbers[1:], **call.constants,
        )  # fmt: skip
    return score[steps % 2]


@triton.jit(do_not_specialize=["steps"])
def _page_rank_kernel(
    q_ptr, k_ptr, mask_ptr, lse_ptr, score_ptr, start_ptr,
    q_b, q_h, q_m, q_d, k_b, k_g, k_n, k_d, m_b, m_h, m_m, m_n, s_b, s_h, s_n,
    steps, damping, heads, share, N, D, scaling, lowest,
    MASK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All steps of one head: score [2, B, H, N], of which step s reads half s % 2 and writes the other one.

    What a program writes to memory its own threads may read behind a barrier.
    """
    problem = tl.program_id(0).to(tl.int64)
    half = tl.num_programs(0).to(tl.int64) * N
    b, head = problem // heads, problem % heads
    q_ptr, k_ptr, mask_ptr = q_ptr + b * q_b, k_ptr + b * k_b + (head // share) * k_g, mask_ptr + b * m_b
    lse_ptr, score_ptr, start_ptr = lse_ptr + problem * N, score_ptr + problem * N, start_ptr + b * s_b + head * s_h
    for first in range(0, N, BLOCK):
        rows = (first + tl.arange(0, BLOCK)).to(tl.int64)
        ok = rows < N
        lse = row_sums(
            q_ptr, k_ptr, mask_ptr, head, rows, N, ok, q_h, q_m, q_d, k_n, k_d, m_h, m_m, m_n, N, D, scaling, lowest,
            MASK, HALF, BLOCK, BLOCK_D,
        )  # fmt: skip
        tl.store(lse_ptr + rows, lse, mask=ok)
        tl.store(score_ptr + rows, tl.load(start_ptr + rows * s_n, mask=ok), mask=ok)
    for step in range(steps):
        tl.debug_barrier()
        for first in range(0, N, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            score = column_sums(
                q_ptr, k_ptr, mask_ptr, lse_ptr, score_ptr + step % 2 * half, head, cols,
                q_h, q_m, q_d, k_n, k_d, m_h, m_m, m_n, 1, N, N, D, scaling, lowest, MASK, HALF, BLOCK, BLOCK_D,
            )  # fmt: skip
            if damping > 0:
                start = tl.load(start_ptr + cols.to(tl.int64) * s_n, mask=cols < N, other=0.0)
                score = score * (1 - damping) + start * damping
            tl.store(score_ptr + (step + 1) % 2 * half + cols, score, mask=cols < N)
