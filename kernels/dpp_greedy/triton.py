"""Greedy MAP of a determinantal point process in Triton: one launch a pick, of all problems of one shape.

Every program owns a few columns and reads whole what it needs of the others, written by the launch before. Nothing is
read back and the shapes alone decide what is launched, so that a CUDA graph can record all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .reference import Problem

COLS = 32  # columns a program owns: 128 bytes of every row of the factor
STEPS, DIMS = 32, 64  # rows of the factor and channels that a program reads at a time


@torch.no_grad()
def dpp_greedy(
    features: Sequence[Tensor], budgets: Sequence[int], *, relevance: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """As `vtprune.kernels.dpp_greedy`, by Triton; see there."""
    reference.check_arguments(features, budgets, relevance)
    problems = reference.prepare(features, relevance)
    alike: dict[object, list[int]] = {}
    for i, problem in enumerate(problems):
        alike.setdefault(problem.rows.shape, []).append(i)
    picks: dict[int, Tensor] = {}
    for same in alike.values():
        n, d = problems[same[0]].rows.shape
        together = max(1, reference.GROUP_BYTES // (4 * n * (d + max(budgets[i] for i in same))))
        for start in range(0, len(same), together):
            group = same[start : start + together]
            with torch.cuda.device_of(features[group[0]]):
                table = _greedy([problems[i] for i in group], max(budgets[i] for i in group))
            picks.update({i: order[: budgets[i]] for i, order in zip(group, table)})
    return [picks[i] for i in range(len(problems))]


def _greedy(problems: Sequence[Problem], budget: int) -> Tensor:
    """[units, budget] picks of problems of one shape."""
    rows = torch.stack([p.rows for p in problems])
    units, n, d = rows.shape
    parts = triton.cdiv(n, COLS)
    own = torch.stack([p.own for p in problems])
    # Halves of what a launch reads and the next one writes. left: what the picks of this round leave of own, -inf once
    # a row is picked. whole: own, -inf once a row is picked. The largest of both in every COLS columns.
    state = own[:, None, None].repeat(1, 2, 2, 1)  # [units, half, left or whole, n]
    padded = torch.nn.functional.pad(own, (0, parts * COLS - n), value=-torch.inf)
    top = padded.view(units, parts, COLS).amax(2)[:, None, None].repeat(1, 2, 2, 1)
    begun = torch.zeros(units, 2, dtype=torch.int64, device=rows.device)
    factor = rows.new_empty(units, budget, n)
    picks = torch.empty(units, budget, dtype=torch.int64, device=rows.device)
    for step in range(budget):
        _pick[(parts, units)](
            rows, own, state, top, begun, factor, picks, step, budget, n, d, parts,
            MARGIN=reference.MARGIN, RANK=reference.RANK, TINY=reference.TINY,
            COLS=COLS, STEPS=STEPS, DIMS=DIMS, PARTS=max(16, triton.next_power_of_2(parts)),
        )  # fmt: skip
    return picks


@triton.jit(do_not_specialize=["step", "budget", "parts"])
def _pick(
    rows,
    own,
    state,
    top,
    begun,
    factor,
    picks,
    step,
    budget,
    n,
    d,
    parts,
    MARGIN: tl.constexpr,
    RANK: tl.constexpr,
    TINY: tl.constexpr,
    COLS: tl.constexpr,
    STEPS: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Pick number `step`, its row of the factor, and what is left behind it.

    rows [units, n, d], own [units, n], state [units, 2, 2, n], top [units, 2, 2, parts], begun [units, 2]: where the
    round began; factor [units, budget, n], picks [units, budget].
    """
    unit = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    half = step % 2
    lanes = tl.arange(0, PARTS)
    source, tops = state + (unit * 2 + half) * 2 * n, top + (unit * 2 + half) * 2 * parts
    best = tl.load(tops + lanes, mask=lanes < parts, other=-float("inf"))
    over = tl.max(best, axis=0) <= 0.0  # nothing is left: a new round, among the rows not picked
    best = tl.where(over, tl.load(tops + parts + lanes, mask=lanes < parts, other=-float("inf")), best)
    first_step = tl.where(over, step, tl.load(begun + unit * 2 + half))
    tl.store(begun + unit * 2 + 1 - half, first_step, mask=part == 0)
    most = tl.max(best, axis=0)
    least = most - MARGIN * tl.abs(most)  # of NaN alone nothing is at least that, and the picks are still in range
    start = tl.argmax(((best >= least) & (lanes < parts)).to(tl.int32), axis=0) * COLS
    mine = start + tl.arange(0, COLS)
    scores = tl.load(source + mine, mask=mine < n, other=-float("inf"))
    anew = tl.load(source + n + mine, mask=mine < n, other=-float("inf"))
    scores = tl.where(over, anew, scores)
    pick = (start + tl.argmax(((scores >= least) & (mine < n)).to(tl.int32), axis=0)).to(tl.int64)
    tl.store(picks + unit * budget + step, pick, mask=part == 0)
    j = part.to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = j < n
    row = tl.zeros([COLS], tl.float32)
    for first in range(0, d, DIMS):
        c = first + tl.arange(0, DIMS).to(tl.int64)
        theirs = tl.load(rows + (unit * n + pick) * d + c, mask=c < d, other=0.0)
        held = inside[:, None] & (c < d)[None, :]
        ours = tl.load(rows + (unit * n + j)[:, None] * d + c[None, :], mask=held, other=0.0)
        row += tl.sum(ours * theirs[None, :], axis=1)
    for first in range(0, step, STEPS):
        s = first + tl.arange(0, STEPS).to(tl.int64)
        real = (s >= first_step) & (s < step)
        column = tl.load(factor + (unit * budget + s) * n + pick, mask=real, other=0.0)
        held = real[:, None] & inside[None, :]
        theirs = tl.load(factor + (unit * budget + s)[:, None] * n + j[None, :], mask=held, other=0.0)
        row -= tl.sum(column[:, None] * theirs, axis=0)
    pivot = tl.where(over, tl.load(source + n + pick), tl.load(source + pick))
    row = row / tl.sqrt_rn(tl.maximum(pivot, TINY))
    tl.store(factor + (unit * budget + step) * n + j, row, mask=inside)
    left = tl.load(source + j, mask=inside, other=-float("inf"))
    whole = tl.load(source + n + j, mask=inside, other=-float("inf"))
    floor = RANK * tl.load(own + unit * n + j, mask=inside, other=0.0)
    left = tl.where(over, whole, left) - row * row
    whole = tl.where(j == pick, -float("inf"), whole)
    left = tl.where(whole == -float("inf"), -float("inf"), tl.where(left < floor, 0.0, left))
    target, tops = state + (unit * 2 + 1 - half) * 2 * n, top + (unit * 2 + 1 - half) * 2 * parts
    tl.store(target + j, left, mask=inside)
    tl.store(target + n + j, whole, mask=inside)
    tl.store(tops + part, tl.max(left, axis=0))
    tl.store(tops + parts + part, tl.max(whole, axis=0))
