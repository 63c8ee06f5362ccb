"""Farthest point selection in Triton: one program picks all tokens of a problem, many programs prepare its matrix.

With the Gram matrix, a batch takes one launch for its greedy loops, whatever its sizes, and three per distinct size:
rows to norms, the product by cuBLAS, products to cosines. Without it, every pick is one launch over all rows.
Nothing is read back and the shapes alone decide what is launched, so that a CUDA graph can record all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..host import check, not_finite
from . import reference
from .reference import Memory, Objective

TILE_ROWS, TILE_COLS = 4, 1024
STEP_ROWS, STEP_COLS = 64, 128
ALIGN = 16  # half precision problems are padded to this many rows: cuBLAS is slow on unaligned matrices


@triton.jit(do_not_specialize=["n", "padded"])
def _measure(
    x,
    rows,
    inverse,
    largest,
    n,
    padded,
    d,
    x_unit,
    x_row,
    x_col,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """x [units, n, d] -> rows [units, padded, d] with zeros below, inverse [units, padded] of their lengths.

    SCALE multiplies each row by a power of two, which is exact, so that no square leaves the range of float32. Rows
    with NaN or Inf get an infinite `largest` [units, n] and inverse 0: the loop sees them as zero rows.
    """
    unit = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source = x + unit * x_unit + i[:, None] * x_row
    top = tl.zeros([ROWS], tl.float32)
    for start in range(0, d, COLS):
        j = start + tl.arange(0, COLS).to(tl.int64)
        inside = (i < n)[:, None] & (j < d)[None, :]
        size = tl.abs(tl.load(source + j[None, :] * x_col, mask=inside, other=0.0).to(tl.float32))
        size = tl.where(size < float("inf"), size, float("inf"))  # NaN compares false
        top = tl.maximum(top, tl.max(size, axis=1))
    scale = tl.full([ROWS], 1.0, tl.float32)
    if SCALE:
        exponent = top.to(tl.int32, bitcast=True) >> 23
        scale = (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, d, COLS):
        j = start + tl.arange(0, COLS).to(tl.int64)
        inside = (i < n)[:, None] & (j < d)[None, :]
        value = tl.load(source + j[None, :] * x_col, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        squares += tl.sum(value * value, axis=1)
        kept = (i < padded)[:, None] & (j < d)[None, :]
        tl.store(rows + (unit * padded + i)[:, None] * d + j[None, :], value.to(rows.dtype.element_ty), mask=kept)
    usable = (squares > 0) & (top < float("inf"))
    # Correctly rounded: a row and three times that row tie here as they do in the reference.
    length = tl.sqrt_rn(tl.where(usable, squares, 1.0))
    reciprocal = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), length)
    tl.store(inverse + unit * padded + i, tl.where(usable, reciprocal, 0.0), mask=i < padded)
    tl.store(largest + unit * n + i, top, mask=i < n)


@triton.jit(do_not_specialize=["start", "here", "n", "width"])
def _cosines(
    product,
    inverse,
    gram,
    nearest,
    start,
    here,
    n,
    width,
    product_unit,
    product_row,
    gram_unit,
    gram_row,
    inverse_unit,
    nearest_unit,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rows start..start+here of the products [units, here, n] -> cosines in gram [units, here, width].

    Own entries and columns from n on become +inf. nearest [units, *] takes each row's largest cosine to another row.
    gram may be product itself: every entry is read and written by one program, in this order.
    """
    unit = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = start + local
    mine = tl.load(inverse + unit * inverse_unit + i, mask=local < here, other=0.0)
    near = tl.full([ROWS], -float("inf"), tl.float32)
    for first in range(0, width, COLS):
        j = first + tl.arange(0, COLS).to(tl.int64)
        inside = (local < here)[:, None] & (j < n)[None, :]
        value = tl.load(product + unit * product_unit + local[:, None] * product_row + j[None, :], mask=inside, other=0)
        scale = mine[:, None] * tl.load(inverse + unit * inverse_unit + j, mask=j < n, other=0.0)[None, :]
        value = tl.where(scale > 0, value * scale, 0.0)  # not NaN * 0, which is NaN
        other = inside & (i[:, None] != j[None, :])
        near = tl.maximum(near, tl.max(tl.where(other, value, -float("inf")), axis=1))
        target = gram + unit * gram_unit + local[:, None] * gram_row + j[None, :]
        tl.store(target, tl.where(other, value, float("inf")), mask=(local < here)[:, None] & (j < width)[None, :])
    tl.store(nearest + unit * nearest_unit + i, near, mask=local < here)


@triton.jit(do_not_specialize=["budget", "width"])
def _greedy(
    gram,
    nearest,
    first,
    picks,
    budget,
    width,
    gram_unit,
    gram_row,
    GIVEN: tl.constexpr,
    MAXMIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loop of `reference.greedy` for one problem: gram [units, width, width] -> picks [units, budget].

    +inf on the diagonal takes a picked row out. Once nothing is left, argmin returns row 0: never out of range.
    """
    unit = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    if GIVEN:
        pick = tl.load(first + unit)
    else:
        near = tl.load(nearest + unit * width + lanes, mask=inside, other=float("inf"))
        pick = tl.argmin(near, axis=0).to(tl.int64)
    running = tl.full([BLOCK], -float("inf") if MAXMIN else 0.0, tl.float32)
    for step in range(0, budget):
        tl.store(picks + unit * budget + step, pick)
        row = tl.load(gram + unit * gram_unit + pick * gram_row + lanes, mask=inside, other=float("inf"))
        running = tl.maximum(running, row) if MAXMIN else running + row
        pick = tl.argmin(running, axis=0).to(tl.int64)


@triton.jit(do_not_specialize=["step", "budget", "n", "padded", "parts"])
def _step(
    rows,
    inverse,
    running,
    best,
    where,
    picks,
    step,
    budget,
    n,
    padded,
    d,
    parts,
    MAXMIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One pick without a matrix: rows [units, padded, d], running score [units, padded], picks [units, budget].

    best and where [2, units, parts] hold the winner of every part of the rows: the previous launch's half is read, by
    all programs alike, to know which row was picked; the other half is written for the next launch.
    """
    unit = tl.program_id(1).to(tl.int64)
    units = tl.num_programs(1)
    part = tl.program_id(0)
    lanes = tl.arange(0, PARTS)
    before = (((step + 1) % 2) * units + unit) * parts
    after = ((step % 2) * units + unit) * parts
    winner = tl.argmin(tl.load(best + before + lanes, mask=lanes < parts, other=float("inf")), axis=0)
    pick = tl.load(where + before + winner)
    tl.store(picks + unit * budget + step, pick, mask=part == 0)
    i = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dot = tl.zeros([ROWS], tl.float32)
    for start in range(0, d, COLS):
        j = start + tl.arange(0, COLS).to(tl.int64)
        theirs = tl.load(rows + (unit * padded + pick) * d + j, mask=j < d, other=0.0).to(tl.float32)
        inside = (i < n)[:, None] & (j < d)[None, :]
        ours = tl.load(rows + (unit * padded + i)[:, None] * d + j[None, :], mask=inside, other=0.0).to(tl.float32)
        dot += tl.sum(ours * theirs[None, :], axis=1)
    scale = tl.load(inverse + unit * padded + pick) * tl.load(inverse + unit * padded + i, mask=i < n, other=0.0)
    dot = tl.where(scale > 0, dot * scale, 0.0)
    score = tl.load(running + unit * padded + i, mask=i < n, other=float("inf"))
    score = tl.maximum(score, dot) if MAXMIN else score + dot
    score = tl.where(i == pick, float("inf"), score)
    tl.store(running + unit * padded + i, score, mask=i < n)
    tl.store(best + after + part, tl.min(score, axis=0))
    tl.store(where + after + part, part.to(tl.int64) * ROWS + tl.argmin(score, axis=0))


class Run(NamedTuple):
    """Problems of one shape and dtype, prepared: cosine of rows i and j = rows[i] . rows[j] * inverse[i] * inverse[j].

    members: positions in the batch. rows: [units, padded, D] raw half precision (bfloat16 scaled by powers of two) or
    unit rows in float32; inverse: [units, padded] float32; largest: [units, N], not finite where a row is not.
    """

    members: list[int]
    rows: Tensor
    inverse: Tensor
    largest: Tensor


@torch.no_grad()
def farthest_point(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    objective: Objective = "maxmin",
    first: Sequence[int | Tensor] | None = None,
    memory: Memory = "auto",
) -> list[Tensor]:
    """As `vtprune.kernels.farthest_point`, by Triton; see there.

    float16 and bfloat16 rows are multiplied as they are (exact products, summed in float32) and divided by their
    lengths afterwards. A first pick given as a tensor is brought into range. With memory="fast" at most MAX_ROWS rows.
    """
    reference.check_arguments(features, budgets, objective, first, memory)
    sizes = [x.shape[0] for x in features]
    low = [i for i, n in enumerate(sizes) if reference.without_gram(n, memory)]
    fast = reference.groups([i for i, n in enumerate(sizes) if not reference.without_gram(n, memory)], sizes)
    launches = [(group, _with_gram) for group in fast] + [(same, _without_gram) for same in _alike(low, features)]
    runs: list[Run] = []
    picks: dict[int, Tensor] = {}
    for members, form in launches:
        with torch.cuda.device_of(features[members[0]]):
            prepared = [_prepare(same, features) for same in _alike(members, features)]
            order = [i for run in prepared for i in run.members]
            starts = None
            if first is not None:
                given = [reference.first_pick(first[i], features[i]) for i in order]
                starts = torch.stack([index.clamp(0, sizes[i] - 1) for i, index in zip(order, given)])
            table = form(prepared, max(budgets[i] for i in members), objective, starts)
        picks.update({i: row[: budgets[i]] for i, row in zip(order, table)})
        runs += prepared
    _check_finite(runs)
    return [picks[i] for i in range(len(sizes))]


def _alike(members: Sequence[int], features: Sequence[Tensor]) -> list[list[int]]:
    """Members of one shape and dtype together."""
    alike: dict[object, list[int]] = {}
    for i in members:
        alike.setdefault((features[i].shape, features[i].dtype), []).append(i)
    return list(alike.values())


def _prepare(members: list[int], features: Sequence[Tensor]) -> Run:
    """Rows, inverse lengths and largest entries of problems of one shape and dtype."""
    x = torch.stack([features[i] for i in members]) if len(members) > 1 else features[members[0]][None]
    units, n, d = x.shape
    if x.dtype not in (torch.float16, torch.bfloat16):
        # As the reference does it, so that rows which tie there tie here; one by one also in the product below.
        parts = [reference.unit_rows(unit) for unit in x]
        largest = torch.stack([top[:, 0] for _, top in parts])
        rows = torch.stack([unit for unit, _ in parts]) if units > 1 else parts[0][0][None].contiguous()
        return Run(members, rows, largest.isfinite().float(), largest)
    padded = triton.cdiv(n, ALIGN) * ALIGN
    rows, inverse = x.new_empty(units, padded, d), x.new_empty(units, padded, dtype=torch.float32)
    largest = inverse.new_empty(units, n)
    _measure[(triton.cdiv(padded, TILE_ROWS), units)](
        x,
        rows,
        inverse,
        largest,
        n,
        padded,
        d,
        *x.stride(),
        SCALE=x.dtype == torch.bfloat16,
        ROWS=TILE_ROWS,
        COLS=_block(d, TILE_COLS),
    )
    return Run(members, rows, inverse, largest)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a [units, P, D] times b [units, Q, D] transposed -> [units, P, Q] float32, sums in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[1], dtype=torch.float32)
    with reference.full_precision(a.device):
        for left, right, table in zip(a.float(), b.float(), out):
            torch.mm(left, right.T, out=table)
    return out


def _to_cosines(run: Run, product: Tensor, gram: Tensor, nearest: Tensor, start: int = 0) -> None:
    """Launch `_cosines` for product, rows start.. of the run's products; gram and nearest may be wider than it."""
    units, n = run.largest.shape
    here = min(product.shape[1], n - start)
    _cosines[(triton.cdiv(here, TILE_ROWS), units)](
        product,
        run.inverse,
        gram,
        nearest,
        start,
        here,
        n,
        gram.shape[2],
        *product.stride()[:2],
        *gram.stride()[:2],
        run.inverse.stride(0),
        nearest.stride(0),
        ROWS=TILE_ROWS,
        COLS=_block(gram.shape[2], TILE_COLS),
    )


def _with_gram(runs: Sequence[Run], budget: int, objective: Objective, starts: Tensor | None) -> Tensor:
    """[units, budget] picks; the tail of a problem with fewer rows than that is meaningless, but in range."""
    units = sum(len(run.members) for run in runs)
    width = max(run.rows.shape[1] for run in runs)
    nearest = runs[0].inverse.new_full((units, width), torch.inf)
    gram = nearest.new_empty(units, width, width) if len(runs) > 1 else None
    at = 0
    for run in runs:
        product, own = _products(run.rows, run.rows), slice(at, at + len(run.members))
        _to_cosines(run, product, product if gram is None else gram[own], nearest[own])
        at = own.stop
    table = product if gram is None else gram
    picks = torch.empty(units, budget, dtype=torch.int64, device=table.device)
    block = _block(width)
    _greedy[(units,)](
        table,
        nearest,
        nearest if starts is None else starts,
        picks,
        budget,
        width,
        *table.stride()[:2],
        GIVEN=starts is not None,
        MAXMIN=objective == "maxmin",
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return picks


def _without_gram(runs: Sequence[Run], budget: int, objective: Objective, starts: Tensor | None) -> Tensor:
    """[units, budget] picks of one run, one launch per pick."""
    (run,) = runs
    units, padded, d = run.rows.shape
    n = run.largest.shape[1]
    parts = triton.cdiv(n, STEP_ROWS)
    maxmin = objective == "maxmin"
    running = run.inverse.new_full((units, padded), -torch.inf if maxmin else 0.0)
    best = running.new_full((2, units, parts), torch.inf)
    where = torch.zeros(2, units, parts, dtype=torch.int64, device=best.device)
    best[1, :, 0] = -torch.inf
    where[1, :, 0] = _most_isolated(run) if starts is None else starts
    picks = torch.empty(units, budget, dtype=torch.int64, device=best.device)
    for step in range(budget):
        _step[(parts, units)](
            run.rows,
            run.inverse,
            running,
            best,
            where,
            picks,
            step,
            budget,
            n,
            padded,
            d,
            parts,
            MAXMIN=maxmin,
            ROWS=STEP_ROWS,
            COLS=STEP_COLS,
            PARTS=_block(parts),
            num_warps=8,
        )
    return picks


def _most_isolated(run: Run) -> Tensor:
    """[units] index of the row whose nearest other row is least similar, a block of rows at a time."""
    units, n = run.largest.shape
    padded = run.rows.shape[1]
    nearest = run.inverse.new_empty(units, n)
    rows = max(1, reference.BLOCK_BYTES // (4 * padded * units))
    for start in range(0, n, rows):
        product = _products(run.rows[:, start : start + rows], run.rows)
        _to_cosines(run, product, product, nearest, start)
    return nearest.argmin(dim=1)


def _block(size: int, most: int | None = None) -> int:
    """Power of two that covers size, or most."""
    block = max(16, triton.next_power_of_2(size))
    return block if most is None else min(block, most)


def _check_finite(runs: Sequence[Run]) -> None:
    """Raise ValueError, naming unit and row, for NaN or Inf; one flag for the whole batch."""
    largest = {i: top[:, None] for run in runs for i, top in zip(run.members, run.largest)}
    finite = torch.stack([run.largest.isfinite().all() for run in runs]).all()
    check(finite, lambda: not_finite([largest[i] for i in sorted(largest)], "feature rows"))
