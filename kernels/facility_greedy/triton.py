"""Greedy coverage in Triton: two launches a pick, for the picked column and for the gains, of all problems of a shape.

Nothing is read back and the shapes alone decide what is launched, so that a CUDA graph can record all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..farthest_point.reference import GRAM_BYTES
from ..volume_coverage.reference import gains
from . import reference
from .programs import leave as _leave
from .programs import pick as _pick
from .reference import BLOCK, Combine, Memory, Problem

COLS = 32  # columns a program owns: 128 bytes of every row
ROWS, MADE, DIMS = 64, 16, 64  # rows and channels at a time; of rows that are made, few, because few change


@torch.no_grad()
def facility_greedy(
    features: Sequence[Tensor | None],
    budgets: Sequence[int],
    *,
    rows: Sequence[Tensor | None] | None = None,
    weights: Sequence[Tensor] | None = None,
    combine: Combine = "multiply",
    temperature: float | None = None,
    scale: float = 1.0,
    excluded: Sequence[Tensor] | None = None,
    memory: Memory = "auto",
) -> list[Tensor]:
    """As `vtprune.kernels.facility_greedy`, by Triton; see there."""
    reference.check_arguments(features, budgets, rows, weights, combine, temperature, scale, excluded, memory)
    problems = reference.prepare(features, rows, weights, combine, temperature, scale, excluded, memory)
    alike: dict[object, list[int]] = {}
    for i, p in enumerate(problems):
        width = 0 if p.unit is None or p.whole else p.unit.shape[1]
        alike.setdefault((p.n, p.m, p.unit is None, p.whole, width), []).append(i)
    picks: dict[int, Tensor] = {}
    for same in alike.values():
        first = problems[same[0]]
        held = 4 * first.n * (first.m if first.whole else first.given.shape[0] + BLOCK)
        together = max(1, GRAM_BYTES // held)
        for start in range(0, len(same), together):
            group = same[start : start + together]
            with torch.cuda.device_of(first.given):
                table = _greedy([problems[i] for i in group], max(budgets[i] for i in group), combine)
            picks.update({i: order[: budgets[i]] for i, order in zip(group, table)})
    return [picks[i] for i in range(len(problems))]


def _greedy(problems: Sequence[Problem], budget: int, combine: Combine) -> Tensor:
    """[units, budget] picks of problems of one shape."""
    one, units, n = problems[0], len(problems), problems[0].n
    pairs = 0 if one.whole else one.pairs
    m = one.m - pairs
    table = one.given.new_empty(units, m, n)
    for p, out in zip(problems, table):
        if p.whole:
            reference.fill(p, out)
        else:
            out.copy_(p.given)
    rows, log = table, table  # not read where no rows are made
    if pairs:
        rows = torch.stack([p.unit for p in problems if p.unit is not None])
        if one.temperature is not None:
            log = torch.stack([reference.normalisers(p) for p in problems])
    d, soft = rows.shape[2] if pairs else 1, one.temperature is not None
    factor = 1 / one.temperature if one.temperature is not None else one.scale
    parts = triton.cdiv(n, COLS)
    weight = torch.stack([rows.new_ones(n) if p.weight is None else p.weight for p in problems])
    if one.weight is None and combine == "add":
        weight.zero_()
    out = one.excluded is not None
    excluded = torch.stack([p.excluded for p in problems if p.excluded is not None]).to(torch.int8) if out else weight
    best = rows.new_zeros(units, 2, pairs + m)
    score, top, free = rows.new_empty(units, n), rows.new_empty(units, parts), rows.new_zeros(units, n)
    cover = rows.new_empty(units, n, dtype=torch.float64)
    floor = cover.new_zeros(units, 1)
    if one.floor is None:
        cover.copy_(gains(table, best[:, 0, :, None]))
    floor.copy_(reference.floors(problems, cover))
    picks = torch.empty(units, budget, dtype=torch.int64, device=rows.device)

    def left(done: int, anew: bool) -> None:
        _leave[(parts, units)](
            table, rows, log, score, top, best, picks, cover, free, weight, excluded, floor, factor,
            done, budget, n, m, d, pairs, parts,
            ANEW=anew, SOFTMAX=soft, ADD=combine == "add", OUT=out, MADE=MADE, ROWS=ROWS, COLS=COLS, DIMS=DIMS,
        )  # fmt: skip

    left(0, anew=True)
    for step in range(budget):
        _pick[(max(1, triton.cdiv(pairs + m, ROWS)), units)](
            table, rows, log, score, top, best, picks, factor, one.slack, step, budget, n, m, d, pairs, parts,
            MARGIN=reference.MARGIN, SOFTMAX=soft, ROWS=ROWS, COLS=COLS, DIMS=DIMS,
            PARTS=max(16, triton.next_power_of_2(parts)),
        )  # fmt: skip
        if step + 1 < budget:
            left(step + 1, anew=step == 0)  # the first pick covers all rows better
    return picks
