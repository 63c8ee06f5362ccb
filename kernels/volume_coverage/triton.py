"""Volume and coverage in Triton: two launches a pick, for the volume and for the coverage, of all problems of one size.

Every program owns a few columns and reads whole what it needs of the others, written by the launch before. Nothing is
read back and the shapes alone decide what is launched, so that a CUDA graph can record all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..farthest_point.reference import GRAM_BYTES
from . import reference
from .programs import gains as _gains
from .programs import residual as _residual
from .reference import Memory, Problem

COLS = 32  # columns a program owns: 128 bytes of every row
ROWS, STEPS, DIMS = 64, 32, 64  # rows of similarities, rows of the factor and channels that a program reads at a time


@torch.no_grad()
def volume_coverage(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    weights: Sequence[Tensor] | None = None,
    ridge: float = 0.01,
    memory: Memory = "auto",
) -> list[Tensor]:
    """As `vtprune.kernels.volume_coverage`, by Triton; see there."""
    reference.check_arguments(features, budgets, weights, ridge, memory)
    problems = reference.prepare(features, weights, memory)
    alike: dict[object, list[int]] = {}
    for i, problem in enumerate(problems):
        alike.setdefault(problem.rows.shape, []).append(i)
    picks: dict[int, Tensor] = {}
    for same in alike.values():
        n = problems[same[0]].rows.shape[0]
        together = max(1, GRAM_BYTES // (4 * n * reference.covered_rows(n, memory)))
        for start in range(0, len(same), together):
            group = same[start : start + together]
            with torch.cuda.device_of(features[group[0]]):
                table = _greedy([problems[i] for i in group], max(budgets[i] for i in group), ridge)
            picks.update({i: order[: budgets[i]] for i, order in zip(group, table)})
    return [picks[i] for i in range(len(problems))]


def _greedy(problems: Sequence[Problem], budget: int, ridge: float) -> Tensor:
    """[units, budget] picks of problems of one shape."""
    rows = torch.stack([p.rows for p in problems])
    units, n, d = rows.shape
    covered = problems[0].covered
    m = n if covered is None else len(covered)
    table = rows.new_empty(units, m, n)
    for problem, out in zip(problems, table):
        reference.similarities(problem, out)
    parts = triton.cdiv(n, COLS)
    left = rows.new_empty(units, 2, n)
    left[:, 0] = torch.linalg.vector_norm(rows, dim=2).square() + ridge
    left[:, 1] = left[:, 0]
    weight = torch.stack([p.weight for p in problems])
    best, row = rows.new_zeros(units, 2, m), rows.new_zeros(units, n)
    score, top = rows.new_empty(units, n), rows.new_empty(units, parts)
    cover = rows.new_empty(units, n, dtype=torch.float64)
    factor = rows.new_empty(units, budget, n)
    floor = rows.new_full((units,), reference.FLOOR * m, dtype=torch.float64)
    picks = torch.empty(units, budget, dtype=torch.int64, device=rows.device)
    whole = covered is None
    at = picks if covered is None else covered  # not read where all are covered

    def leave(step: int, anew: bool) -> None:
        _gains[(parts, units)](
            table, at, row, best, cover, left, weight, score, top, floor, step, n, m, parts, table.stride(0),
            WHOLE=whole, ANEW=anew, ROWS=ROWS, COLS=COLS,
        )  # fmt: skip

    leave(1, anew=True)  # nothing picked: row and best are zero
    for step in range(budget):
        _residual[(parts, units)](
            table, rows, score, top, row, factor, left, picks, ridge, step, budget, n, d, parts, table.stride(0),
            WHOLE=whole, MARGIN=reference.MARGIN, COLS=COLS, STEPS=STEPS, DIMS=DIMS,
            PARTS=max(16, triton.next_power_of_2(parts)),
        )  # fmt: skip
        leave(step, anew=step == 0)  # the first pick comes closer to all rows
    return picks
