"""Attention rows and column sums as Triton kernels: scores live in tiles, nothing of size N x N is written.

A program works on one head group (or head) and stacks the queries of its heads along the rows of a tile, so grouped
keys are read once. Products of half-precision inputs are exact and accumulate in float32; float32 inputs are
multiplied in full ("ieee"), but where a whole row is summed up: "tf32x3", three products on the tensor cores, is off
by about as much as a sum in another order. No atomics: every sum has a fixed order. Grids are one-dimensional and
offsets 64-bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted

TILE = 64  # queries and keys of a tile; half of it where their channels would fill the chip
TILE_BYTES = 256  # of one row of a full tile
SPREAD = (4, 512)  # rows and columns one program of the second softmax pass writes


@triton.jit
def _queries(q_ptr, head, rows, count, ok, q_h, q_m, q_d, D, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Tile [rows, BLOCK_D] of the queries of `head` and the heads after it, `count` rows each."""
    width = tl.arange(0, BLOCK_D)
    at = (head + rows // count) * q_h + (rows % count) * q_m
    tile = tl.load(q_ptr + at[:, None] + width[None, :] * q_d, mask=ok[:, None] & (width < D)[None, :], other=0.0)
    if not HALF:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _keys(k_ptr, cols, N, k_n, k_d, D, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Tile [cols, BLOCK_D] of one group's keys."""
    width = tl.arange(0, BLOCK_D)
    at = cols[:, None].to(tl.int64) * k_n + width[None, :] * k_d
    tile = tl.load(k_ptr + at, mask=(cols < N)[:, None] & (width < D)[None, :], other=0.0)
    if not HALF:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _scores(
    q, k, mask_ptr, head, rows, count, ok, cols, N, m_h, m_m, m_n, scaling, lowest,
    MASK: tl.constexpr, PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    """Tile of scaled, masked scores in float32, -inf where the mask or the end of the keys blocks."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    inside = (cols < N)[None, :]
    if MASK != 0:
        at = (head + rows // count) * m_h + (rows % count) * m_m
        at = at[:, None] + cols[None, :].to(tl.int64) * m_n
        mask = tl.load(mask_ptr + at, mask=ok[:, None] & inside, other=0)
        if MASK == 1:
            scores = tl.where(mask != 0, scores, float("-inf"))
        else:
            mask = mask.to(tl.float32)
            scores = tl.where(mask <= lowest, float("-inf"), scores + mask)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def row_sums(
    q_ptr, k_ptr, mask_ptr, head, rows, count, ok, q_h, q_m, q_d, k_n, k_d, m_h, m_m, m_n, N, D, scaling, lowest,
    MASK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of rows over all keys; +inf for a query that sees none.

    So exp(score - lse) is the weight of a key, or 0.
    """
    q = _queries(q_ptr, head, rows, count, ok, q_h, q_m, q_d, D, BLOCK_D, HALF)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        k = _keys(k_ptr, cols, N, k_n, k_d, D, BLOCK_D, HALF)
        scores = _scores(
            q, k, mask_ptr, head, rows, count, ok, cols, N, m_h, m_m, m_n, scaling, lowest, MASK, "tf32x3"
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        top = higher
    return tl.where(total == 0, float("inf"), top + tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def column_sums(
    q_ptr, k_ptr, mask_ptr, lse_ptr, weight_ptr, head, cols, q_h, q_m, q_d, k_n, k_d, m_h, m_m, m_n, w_m,
    M, N, D, scaling, lowest, MASK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over all queries m of weight[m] * exp(score[m, n] - lse[m]), for a tile of columns n of one head."""
    k = _keys(k_ptr, cols, N, k_n, k_d, D, BLOCK_D, HALF)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, M, BLOCK):
        rows = (start + tl.arange(0, BLOCK)).to(tl.int64)
        ok = rows < M
        q = _queries(q_ptr, head, rows, M, ok, q_h, q_m, q_d, D, BLOCK_D, HALF)
        scores = _scores(q, k, mask_ptr, head, rows, M, ok, cols, N, m_h, m_m, m_n, scaling, lowest, MASK)
        lse = tl.load(lse_ptr + rows, mask=ok, other=float("inf"))
        weight = tl.load(weight_ptr + rows * w_m, mask=ok, other=0.0)
        total += tl.sum(tl.exp(scores - lse[:, None]) * weight[:, None], 0)
    return total


@triton.jit
def _log_sum_exp_kernel(
    q_ptr, k_ptr, mask_ptr, lse_ptr, q_b, q_h, q_m, q_d, k_b, k_g, k_n, k_d, m_b, m_h, m_m, m_n,
    groups, share, M, N, D, scaling, lowest,
    MASK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse[b, h, m], for the heads of one group together."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(share * M, BLOCK)
    problem, tile = pid // tiles, pid % tiles
    b, group = problem // groups, problem % groups
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    ok = rows < share * M
    lse = row_sums(
        q_ptr + b * q_b, k_ptr + b * k_b + group * k_g, mask_ptr + b * m_b, group * share, rows, M, ok,
        q_h, q_m, q_d, k_n, k_d, m_h, m_m, m_n, N, D, scaling, lowest, MASK, HALF, BLOCK, BLOCK_D,
    )  # fmt: skip
    tl.store(lse_ptr + problem * share * M + rows, lse, mask=ok)


@triton.jit
def _columns_kernel(
    q_ptr, k_ptr, mask_ptr, lse_ptr, weight_ptr, out_ptr,
    q_b, q_h, q_m, q_d, k_b, k_g, k_n, k_d, m_b, m_h, m_m, m_n, w_b, w_h, w_m,
    heads, share, M, N, D, scaling, lowest,
    MASK: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, h, n] = sum over queries m of weight[b, h, m] * exp(score[b, h, m, n] - lse[b, h, m])."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, BLOCK)
    problem, tile = pid // tiles, pid % tiles
    b, head = problem // heads, problem % heads
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    total = column_sums(
        q_ptr + b * q_b, k_ptr + b * k_b + (head // share) * k_g, mask_ptr + b * m_b, lse_ptr + problem * M,
        weight_ptr + b * w_b + head * w_h, head, cols, q_h, q_m, q_d, k_n, k_d, m_h, m_m, m_n, w_m,
        M, N, D, scaling, lowest, MASK, HALF, BLOCK, BLOCK_D,
    )  # fmt: skip
    tl.store(out_ptr + problem * N + cols, total, mask=cols < N)


@triton.jit
def _rows_kernel(
    q_ptr, k_ptr, mask_ptr, out_ptr, part_ptr, q_b, q_h, q_m, q_d, k_b, k_g, k_n, k_d, m_b, m_h, m_m, m_n,
    groups, share, M, N, D, scaling, lowest,
    MASK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Masked scores of one tile of keys, and its share of every row's log-sum-exp (-inf: nothing seen here)."""
    pid = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(N, BLOCK)
    tiles = tl.cdiv(share * M, ROWS)
    part, tile, problem = pid % parts, pid // parts % tiles, pid // parts // tiles
    b, group = problem // groups, problem % groups
    head = group * share
    rows = tile * ROWS + tl.arange(0, ROWS)
    ok = rows < share * M
    cols = part * BLOCK + tl.arange(0, BLOCK)
    q = _queries(q_ptr + b * q_b, head, rows, M, ok, q_h, q_m, q_d, D, BLOCK_D, HALF)
    k = _keys(k_ptr + b * k_b + group * k_g, cols, N, k_n, k_d, D, BLOCK_D, HALF)
    scores = _scores(
        q, k, mask_ptr + b * m_b, head, rows, M, ok, cols, N, m_h, m_m, m_n, scaling, lowest, MASK
    )  # fmt: skip
    top = tl.max(scores, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(scores - shift[:, None]), 1)
    lse = tl.where(total == 0, float("-inf"), shift + tl.log(tl.where(total == 0, 1.0, total)))
    at = problem * share * M + rows
    tl.store(part_ptr + at * parts + part, lse, mask=ok)
    tl.store(out_ptr + at[:, None] * N + cols[None, :], scores, mask=ok[:, None] & (cols < N)[None, :])


@triton.jit
def _normalise_kernel(
    out_ptr, part_ptr, count, parts, N, ROWS: tl.constexpr, PARTS: tl.constexpr, SPREAD: tl.constexpr
):  # fmt: skip
    """Scores to weights, in place, with the log-sum-exp of a whole row put together from its parts."""
    pid = tl.program_id(0).to(tl.int64)
    pieces = tl.cdiv(N, SPREAD)
    rows = pid // pieces * ROWS + tl.arange(0, ROWS)
    cols = pid % pieces * SPREAD + tl.arange(0, SPREAD)
    part = tl.arange(0, PARTS)
    ok = (rows < count)[:, None]
    inside = ok & (part < parts)[None, :]
    lse = tl.load(part_ptr + rows[:, None] * parts + part[None, :], mask=inside, other=float("-inf"))
    top = tl.max(lse, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - shift[:, None]), 1)
    whole = tl.where(total == 0, float("inf"), shift + tl.log(tl.where(total == 0, 1.0, total)))
    at = rows[:, None] * N + cols[None, :]
    inside = ok & (cols < N)[None, :]
    scores = tl.load(out_ptr + at, mask=inside, other=float("-inf"))
    tl.store(out_ptr + at, tl.exp(scores - whole[:, None]), mask=inside)


class Call(NamedTuple):
    """What all kernels are told about their inputs."""

    tensors: tuple[Tensor, Tensor, Tensor]
    strides: tuple[int, ...]
    numbers: tuple[Any, ...]  # M, N, D, scaling, lowest
    constants: dict[str, Any]


def call_of(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Call:
    (batch, heads, m, d), n = q.shape, k.shape[2]
    kind, lowest, masked = 0, 0.0, q  # without a mask nobody reads the pointer
    m_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        if mask.dtype == torch.bool:
            kind, masked = 1, mask.view(torch.uint8)
        else:
            kind, masked = 2, mask.float() if mask.dtype == torch.float64 else mask
            lowest = torch.finfo(masked.dtype).min
        m_strides = masked.expand(batch, heads, m, n).stride()
    exact = (torch.float16,) if interpreted() else (torch.float16, torch.bfloat16)  # its tl.dot has no bfloat16
    half = q.dtype in exact and q.dtype == k.dtype
    block_d = max(16, triton.next_power_of_2(d))
    block = TILE if block_d * (2 if half else 4) <= TILE_BYTES else TILE // 2
    constants = {"MASK": kind, "HALF": half, "BLOCK": block, "BLOCK_D": block_d, "num_stages": 2}
    strides = (*q.stride(), *k.stride(), *m_strides)
    return Call((q, k, masked), strides, (m, n, d, float(scaling), lowest), constants)


def attention_rows(q_rows: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`kernels.attention_rows` for checked arguments, in two launches."""
    (batch, heads, m, _), (_, groups, n, _) = q_rows.shape, k.shape
    call = call_of(q_rows, k, mask, scaling)
    share = heads // groups
    rows = min(64, max(16, triton.next_power_of_2(share * m)))
    parts = triton.cdiv(n, call.constants["BLOCK"])
    out = torch.empty(batch, heads, m, n, dtype=torch.float32, device=k.device)
    part = torch.empty(batch, heads, m, parts, dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        _rows_kernel[(batch * groups * triton.cdiv(share * m, rows) * parts,)](
            *call.tensors, out, part, *call.strides, groups, share, *call.numbers, ROWS=rows, **call.constants
        )
        count = batch * heads * m
        _normalise_kernel[(triton.cdiv(count, SPREAD[0]) * triton.cdiv(n, SPREAD[1]),)](
            out, part, count, parts, n, ROWS=SPREAD[0], PARTS=triton.next_power_of_2(parts), SPREAD=SPREAD[1]
        )
    return out


def attention_received(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, weights: Tensor | None) -> Tensor:
    """`kernels.attention_received` for checked arguments: two kernels and a mean over heads."""
    if weights is None:
        weights = q.new_full((1, 1, 1), 1 / q.shape[2], dtype=torch.float32)
    else:
        weights = weights[:, None].float()
    lse = log_sum_exp(q, k, mask, scaling)
    return columns(q, k, mask, scaling, lse, weights.expand(*q.shape[:3])).mean(1)


def log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[B, H, M] float32: log of the sum of exp(score) over the keys, +inf where the mask blocks all of them."""
    (batch, heads, m, _), groups = q.shape, k.shape[1]
    call = call_of(q, k, mask, scaling)
    share = heads // groups
    lse = torch.empty(batch, heads, m, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _log_sum_exp_kernel[(batch * groups * triton.cdiv(share * m, call.constants["BLOCK"]),)](
            *call.tensors, lse, *call.strides, groups, share, *call.numbers, **call.constants
        )
    return lse


def columns(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, lse: Tensor, weights: Tensor) -> Tensor:
    """[B, H, N] float32: for each head the rows of its map, times their weights [B, H, M] float32, added up.

    lse: what `log_sum_exp` gave for the same arguments.
    """
    batch, heads, n = q.shape[0], q.shape[1], k.shape[2]
    call = call_of(q, k, mask, scaling)
    out = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _columns_kernel[(batch * heads * triton.cdiv(n, call.constants["BLOCK"]),)](
            *call.tensors, lse, weights, out, *call.strides, *weights.stride(),
            heads, heads // k.shape[1], *call.numbers, **call.constants,
        )  # fmt: skip
    return out
