"""The Triton programs of greedy coverage; `triton` says what they are for, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def products(unit_rows, i, j, n, d, unit, ROWS: tl.constexpr, COLS: tl.constexpr, DIMS: tl.constexpr):
    """[ROWS, COLS] float32: rows i times rows j of unit_rows [units, n, d]."""
    found = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, d, DIMS):
        c = first + tl.arange(0, DIMS).to(tl.int64)
        ours = (i < n)[:, None] & (c < d)[None, :]
        theirs = (c < d)[:, None] & (j < n)[None, :]
        a = tl.load(unit_rows + (unit * n + i)[:, None] * d + c[None, :], mask=ours, other=0.0)
        b = tl.load(unit_rows + (unit * n + j)[None, :] * d + c[:, None], mask=theirs, other=0.0)
        found += tl.dot(a, b, input_precision="ieee")
    return found


@triton.jit(do_not_specialize=["step", "budget", "m", "pairs", "parts"])
def pick(
    table,
    rows,
    log,
    score,
    top,
    best,
    picks,
    factor,
    slack,
    step,
    budget,
    n,
    m,
    d,
    pairs,
    parts,
    MARGIN: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Pick number `step`, and how well it covers every row: best [units, 2, pairs + m], of which a half is written.

    score [units, n] and top [units, parts], the largest score in every COLS columns, are of the launch before and are
    read by all programs alike: the first score within MARGIN of the largest, and slack, stands in the first part whose
    top is. The rows of the matrix are `pairs` ones that are made of rows [units, n, d], as log [units, n] and factor
    say, and those of table [units, m, n] behind them.
    """
    unit = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    lanes = tl.arange(0, PARTS)
    tops = tl.load(top + unit * parts + lanes, mask=lanes < parts, other=-float("inf"))
    most = tl.max(tops, axis=0)
    least = most - MARGIN * tl.abs(most) - slack
    start = tl.argmax((tops >= least).to(tl.int32), axis=0) * COLS
    mine = start + tl.arange(0, COLS)
    scored = tl.load(score + unit * n + mine, mask=mine < n, other=-float("inf"))
    found = (start + tl.argmax((scored >= least).to(tl.int32), axis=0)).to(tl.int64)
    tl.store(picks + unit * budget + step, found, mask=part == 0)
    i = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = i < pairs + m
    near = tl.load(table + (unit * m + i - pairs) * n + found, mask=real & (i >= pairs), other=0.0)
    if part * ROWS < pairs:
        made = tl.zeros([ROWS], tl.float32)
        for first in range(0, d, DIMS):
            c = first + tl.arange(0, DIMS).to(tl.int64)
            theirs = tl.load(rows + (unit * n + found) * d + c, mask=c < d, other=0.0)
            held = (i < pairs)[:, None] & (c < d)[None, :]
            ours = tl.load(rows + (unit * n + i)[:, None] * d + c[None, :], mask=held, other=0.0)
            made += tl.sum(ours * theirs[None, :], axis=1)
        made = made * factor
        if SOFTMAX:
            made = tl.exp(made - tl.load(log + unit * n + i, mask=i < pairs, other=0.0))
        near = tl.where(i < pairs, made, near)
    old = tl.load(best + (unit * 2 + step % 2) * (pairs + m) + i, mask=real, other=0.0)
    tl.store(best + (unit * 2 + (step + 1) % 2) * (pairs + m) + i, tl.maximum(old, near), mask=real)


@triton.jit(do_not_specialize=["done", "budget", "m", "pairs", "parts"])
def leave(
    table,
    rows,
    log,
    score,
    top,
    best,
    picks,
    cover,
    free,
    weight,
    excluded,
    floor,
    factor,
    done,
    budget,
    n,
    m,
    d,
    pairs,
    parts,
    ANEW: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ADD: tl.constexpr,
    OUT: tl.constexpr,
    MADE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """What `done` picks leave to be gained, cover [units, n] float64, and the scores for the next pick.

    ANEW: summed over all rows again, and not only over those that the last pick covers better. free [units, n]: -inf
    for picked columns. MADE: rows of the matrix at a time that are made of features; ROWS: of the others.
    """
    unit = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    j = part.to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = j < n
    before = best + (unit * 2 + (done + 1) % 2) * (pairs + m)
    after = best + (unit * 2 + done % 2) * (pairs + m)
    total = tl.zeros([COLS], tl.float64)
    for first in range(0, m, ROWS):
        i = first + tl.arange(0, ROWS).to(tl.int64)
        real = i < m
        old = tl.load(before + pairs + i, mask=real, other=0.0)
        new = tl.load(after + pairs + i, mask=real, other=0.0)
        source = table + (unit * m + i)[:, None] * n + j[None, :]
        if ANEW:
            near = tl.load(source, mask=real[:, None] & inside[None, :], other=0.0)
            more = tl.where(real[:, None], tl.maximum(near - new[:, None], 0.0), 0.0)
        else:  # rows that are covered no better are not read
            near = tl.load(source, mask=(real & (new > old))[:, None] & inside[None, :], other=0.0)
            between = tl.minimum(tl.maximum(near, old[:, None]), new[:, None])
            more = tl.where((real & (new > old))[:, None], old[:, None] - between, 0.0)
        total += tl.sum(more, axis=0).to(tl.float64)
    for first in range(0, pairs, MADE):
        i = first + tl.arange(0, MADE).to(tl.int64)
        real = i < pairs
        old = tl.load(before + i, mask=real, other=0.0)
        new = tl.load(after + i, mask=real, other=0.0)
        changed = real if ANEW else real & (new > old)
        if tl.max(changed.to(tl.int32), axis=0) > 0:  # most rows are covered no better: nothing is made
            made = products(rows, i, j, n, d, unit, MADE, COLS, DIMS) * factor
            if SOFTMAX:
                made = tl.exp(made - tl.load(log + unit * n + i, mask=real, other=0.0)[:, None])
            if ANEW:
                gained = tl.where(changed[:, None], tl.maximum(made - new[:, None], 0.0), 0.0)
            else:
                within = tl.minimum(tl.maximum(made, old[:, None]), new[:, None])
                gained = tl.where(changed[:, None], old[:, None] - within, 0.0)
            total += tl.sum(gained, axis=0).to(tl.float64)
    if not ANEW:
        total += tl.load(cover + unit * n + j, mask=inside, other=0.0)
    tl.store(cover + unit * n + j, total, mask=inside)
    last = tl.load(picks + unit * budget + done - 1, mask=done > 0, other=-1)
    open = tl.load(free + unit * n + j, mask=inside, other=-float("inf"))
    open = tl.where(j == last, -float("inf"), open)
    tl.store(free + unit * n + j, open, mask=inside)
    value = tl.maximum(total, tl.load(floor + unit)).to(tl.float32)
    own = tl.load(weight + unit * n + j, mask=inside, other=1.0)
    value = value + own if ADD else value * own
    if OUT:
        out = tl.load(excluded + unit * n + j, mask=inside, other=0)
        value = tl.where(out != 0, -1.0 / value, value)
    value += open
    tl.store(score + unit * n + j, value, mask=inside)
    tl.store(top + unit * parts + part, tl.max(value, axis=0))
