"""The Triton programs of farthest point selection; `triton` says what they are for, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "padded"])
def measure(
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


@triton.jit(do_not_specialize=["start", "here", "n"])
def cosines(
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
    """Rows start..start+here of the products [units, here, product_row] -> cosines in gram [units, here, width].

    inverse [units, inverse_unit] is 0 from n on, as far as it goes. Own entries and columns from n on become +inf.
    nearest [units, *] takes each row's largest cosine to another row. gram may be product itself: every entry is read
    and written by one program, in this order.
    """
    unit = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = start + local
    mine = tl.load(inverse + unit * inverse_unit + i, mask=local < here, other=0.0)
    near = tl.full([ROWS], -float("inf"), tl.float32)
    for first in range(0, width, COLS):
        j = first + tl.arange(0, COLS).to(tl.int64)
        # Up to the end of the rows, which is aligned where n is not: four entries a load.
        inside = (local < here)[:, None] & (j < product_row)[None, :]
        value = tl.load(product + unit * product_unit + local[:, None] * product_row + j[None, :], mask=inside, other=0)
        scale = mine[:, None] * tl.load(inverse + unit * inverse_unit + j, mask=j < inverse_unit, other=0.0)[None, :]
        value = tl.where(scale > 0, value * scale, 0.0)  # not NaN * 0, which is NaN
        other = (local < here)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])
        near = tl.maximum(near, tl.max(tl.where(other, value, -float("inf")), axis=1))
        target = gram + unit * gram_unit + local[:, None] * gram_row + j[None, :]
        tl.store(target, tl.where(other, value, float("inf")), mask=(local < here)[:, None] & (j < width)[None, :])
    tl.store(nearest + unit * nearest_unit + i, near, mask=local < here)


@triton.jit(do_not_specialize=["budget"])
def greedy(
    gram,
    nearest,
    first,
    weights,
    picks,
    budget,
    width,
    gram_unit,
    gram_row,
    GIVEN: tl.constexpr,
    WEIGHED: tl.constexpr,
    MAXMIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loop of `reference.greedy` for one problem: gram [units, width, width] -> picks [units, budget].

    +inf on the diagonal takes a picked row out. Once nothing is left, argmin returns row 0: never out of range.
    """
    unit = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < width
    if WEIGHED:
        weight = tl.load(weights + unit * width + lanes, mask=inside, other=0.0)
    if GIVEN:
        pick = tl.load(first + unit)
    else:
        near = tl.load(nearest + unit * width + lanes, mask=inside, other=float("inf"))
        if WEIGHED:
            cost = (tl.minimum(tl.maximum(near, -1.0), 2.0) - 1) * weight  # inf * 0 would be NaN
            near = tl.where(near == float("inf"), near, cost)
        pick = tl.argmin(near, axis=0).to(tl.int64)
    running = tl.full([BLOCK], -float("inf") if MAXMIN else 0.0, tl.float32)
    for step in range(0, budget):
        tl.store(picks + unit * budget + step, pick)
        row = tl.load(gram + unit * gram_unit + pick * gram_row + lanes, mask=inside, other=float("inf"))
        if WEIGHED:
            cost = (tl.minimum(tl.maximum(row, -1.0), 2.0) - 1) * weight  # inf * 0 would be NaN
            row = tl.where(row == float("inf"), row, cost)
        running = tl.maximum(running, row) if MAXMIN else running + row
        pick = tl.argmin(running, axis=0).to(tl.int64)


@triton.jit(do_not_specialize=["step", "budget", "n", "padded", "parts"])
def step(
    rows,
    inverse,
    running,
    weights,
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
    WEIGHED: tl.constexpr,
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
    if WEIGHED:
        dot = (tl.maximum(dot, -1.0) - 1) * tl.load(weights + unit * padded + i, mask=i < n, other=0.0)
    score = tl.load(running + unit * padded + i, mask=i < n, other=float("inf"))
    score = tl.maximum(score, dot) if MAXMIN else score + dot
    score = tl.where(i == pick, float("inf"), score)
    tl.store(running + unit * padded + i, score, mask=i < n)
    tl.store(best + after + part, tl.min(score, axis=0))
    tl.store(where + after + part, part.to(tl.int64) * ROWS + tl.argmin(score, axis=0))
