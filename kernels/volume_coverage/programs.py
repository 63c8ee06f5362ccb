"""The Triton programs of volume and coverage; `triton` says what they are for, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["step", "budget", "parts"])
def residual(
    table,
    rows,
    score,
    top,
    row,
    factor,
    left,
    picks,
    ridge,
    step,
    budget,
    n,
    d,
    parts,
    table_unit,
    WHOLE: tl.constexpr,
    MARGIN: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Pick number `step`, its similarities row [units, n], its row of factor [units, budget, n], and left [units, n].

    score [units, n] and top [units, parts], the largest score in every COLS rows, are of the launch before and are read
    by all programs alike, to know which row is picked: the first score within MARGIN of the largest stands in the first
    part whose top is. WHOLE: table holds all similarities [n, n]; otherwise they are made of rows [units, n, d].
    """
    unit = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    lanes = tl.arange(0, PARTS)
    tops = tl.load(top + unit * parts + lanes, mask=lanes < parts, other=-float("inf"))
    most = tl.max(tops, axis=0)
    least = most - MARGIN * tl.abs(most)
    start = tl.argmax((tops >= least).to(tl.int32), axis=0) * COLS
    mine = start + tl.arange(0, COLS)
    scores = tl.load(score + unit * n + mine, mask=mine < n, other=-float("inf"))
    pick = (start + tl.argmax((scores >= least).to(tl.int32), axis=0)).to(tl.int64)
    tl.store(picks + unit * budget + step, pick, mask=part == 0)
    j = part.to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = j < n
    if WHOLE:
        near = tl.load(table + unit * table_unit + pick * n + j, mask=inside, other=0.0)
    else:
        near = tl.zeros([COLS], tl.float32)
        for first in range(0, d, DIMS):
            c = first + tl.arange(0, DIMS).to(tl.int64)
            theirs = tl.load(rows + (unit * n + pick) * d + c, mask=c < d, other=0.0)
            held = inside[:, None] & (c < d)[None, :]
            ours = tl.load(rows + (unit * n + j)[:, None] * d + c[None, :], mask=held, other=0.0)
            near += tl.sum(ours * theirs[None, :], axis=1)
    tl.store(row + unit * n + j, near, mask=inside)
    taken = near
    for first in range(0, step, STEPS):
        s = first + tl.arange(0, STEPS).to(tl.int64)
        own = tl.load(factor + (unit * budget + s) * n + pick, mask=s < step, other=0.0)
        held = (s < step)[:, None] & inside[None, :]
        theirs = tl.load(factor + (unit * budget + s)[:, None] * n + j[None, :], mask=held, other=0.0)
        taken -= tl.sum(own[:, None] * theirs, axis=0)
    # d of the picked row is what its own column of the factor leaves; left itself is being written by another program.
    own = tl.load(left + unit * 2 * n + (step % 2) * n + pick)
    taken = taken / tl.sqrt_rn(tl.maximum(own, ridge))
    tl.store(factor + (unit * budget + step) * n + j, taken, mask=inside)
    before = tl.load(left + unit * 2 * n + (step % 2) * n + j, mask=inside, other=-float("inf"))
    after = tl.where(j == pick, -float("inf"), before - taken * taken)
    tl.store(left + unit * 2 * n + ((step + 1) % 2) * n + j, after, mask=inside)


@triton.jit(do_not_specialize=["step", "m", "parts"])
def gains(
    table,
    covered,
    row,
    best,
    cover,
    left,
    weight,
    score,
    top,
    floor,
    step,
    n,
    m,
    parts,
    table_unit,
    WHOLE: tl.constexpr,
    ANEW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What the picked row, of similarities row [units, n], leaves to be gained, and the scores for the next pick.

    table [units, m, n] holds the similarities of the rows covered [m] (WHOLE: of all, m = n). best [units, 2, m]: how
    close the picked rows come; the half of this step is read by all programs, the other one written by the first.
    cover [units, n] float64. ANEW: summed over all rows again, and not only over those that came closer.
    """
    unit = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    j = part.to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = j < n
    total = tl.zeros([COLS], tl.float64)
    for first in range(0, m, ROWS):
        i = first + tl.arange(0, ROWS)
        real = i < m
        old = tl.load(best + (unit * 2 + step % 2) * m + i, mask=real, other=0.0)
        at = i if WHOLE else tl.load(covered + i, mask=real, other=0)
        new = tl.maximum(old, tl.load(row + unit * n + at, mask=real, other=0.0))
        tl.store(best + (unit * 2 + (step + 1) % 2) * m + i, new, mask=real & (part == 0))
        source = table + unit * table_unit + i.to(tl.int64)[:, None] * n + j[None, :]
        if ANEW:
            near = tl.load(source, mask=real[:, None] & inside[None, :], other=0.0)
            more = tl.where(real[:, None], tl.maximum(near - new[:, None], 0.0), 0.0)
        else:  # rows that came no closer are not read
            near = tl.load(source, mask=(real & (new > old))[:, None] & inside[None, :], other=0.0)
            between = tl.minimum(tl.maximum(near, old[:, None]), new[:, None])
            more = tl.where((real & (new > old))[:, None], old[:, None] - between, 0.0)
        total += tl.sum(more, axis=0).to(tl.float64)
    if not ANEW:
        total += tl.load(cover + unit * n + j, mask=inside, other=0.0)
    tl.store(cover + unit * n + j, total, mask=inside)
    free = tl.load(left + unit * 2 * n + ((step + 1) % 2) * n + j, mask=inside, other=-float("inf"))
    gain = tl.maximum(total, tl.load(floor + unit)).to(tl.float32)
    value = gain * tl.load(weight + unit * n + j, mask=inside, other=1.0) * free
    tl.store(score + unit * n + j, value, mask=inside)
    tl.store(top + unit * parts + part, tl.max(value, axis=0))
