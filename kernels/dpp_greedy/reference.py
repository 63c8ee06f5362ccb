"""Greedy MAP of a determinantal point process in plain torch: O(k N D + k^2 N) time, no N x N matrix.

On the CPU a large problem is solved in blocks. What the picks leave of a row can only shrink, so that a few hundred
rows with the most left are enough to foresee the next picks: these are certain while they leave more than any row
outside has now. The picks foreseen are then taken from all rows at once, by products of matrices instead of vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..farthest_point import reference as farthest
from ..farthest_point.reference import full_precision, unit_rows
from ..host import check, check_finite
from ..volume_coverage.reference import best_row

MARGIN = 1e-6  # residuals closer than this, in proportion to the largest, tie
RANK = 1e-5  # of a row's own length squared: a smaller residual says that the picked rows span the row
TOGETHER = 256  # problems of at most so many rows share one loop on the CPU, others take theirs in turn
FEW, MANY = 64, 256  # rows looked at to foresee picks
TINY = 1e-30  # pivots are at least this, where there is nothing to divide
GROUP_BYTES = 1 << 28  # rows and factors of the problems in one loop


class Problem(NamedTuple):
    """One problem, prepared: rows [N, D] whose products are the kernel, and own [N], its diagonal."""

    rows: Tensor
    own: Tensor


@torch.no_grad()
def dpp_greedy(
    features: Sequence[Tensor], budgets: Sequence[int], *, relevance: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """As `vtprune.kernels.dpp_greedy`, in plain torch on any device; see there."""
    check_arguments(features, budgets, relevance)
    problems = prepare(features, relevance)
    picks: dict[int, Tensor] = {}
    for group in _groups(problems, budgets):
        members, longest = [problems[i] for i in group], max(budgets[i] for i in group)
        alone = not _shared(members[0])
        table = _in_blocks(members[0], longest)[None] if alone else _together(members, longest)
        picks.update({i: order[: budgets[i]] for i, order in zip(group, table)})
    return [picks[i] for i in range(len(problems))]


def check_arguments(features: Sequence[Tensor], budgets: Sequence[int], relevance: Sequence[Tensor] | None) -> None:
    """Raise ValueError for anything wrong that the host can see without waiting for the device."""
    farthest.check_arguments(features, budgets, "maxmin", None, "auto")
    if relevance is None:
        return
    if len(relevance) != len(features):
        raise ValueError(f"{len(features)} feature tensors need as many relevances, got {len(relevance)}")
    for i, (unit, r) in enumerate(zip(features, relevance)):
        if r.shape != unit.shape[:1] or not r.is_floating_point():
            raise ValueError(
                f"relevance[{i}] is {r.dtype} {tuple(r.shape)}: expected a float tensor [{unit.shape[0]}], one number "
                f"for each row of features[{i}]"
            )


def prepare(features: Sequence[Tensor], relevance: Sequence[Tensor] | None) -> list[Problem]:
    """Rows of length r and the diagonal of every problem; NaN, Inf and negative relevances are refused."""
    pairs = [unit_rows(x) for x in features]
    check_finite([largest for _, largest in pairs], "feature rows")
    found = []
    for i, (rows, largest) in enumerate(pairs):
        length = (largest[:, 0] > 0).float()
        if relevance is not None:
            r = relevance[i].float()
            length = length * (r / r.amax().clamp(min=TINY))
        found.append(Problem(rows.mul_(length[:, None]), length.square()))
    if relevance:
        check_finite(relevance, "relevances")
        check(torch.stack([(r >= 0).all() for r in relevance]).all(), lambda: _negative(relevance))
    return found


def _negative(relevance: Sequence[Tensor]) -> ValueError:
    unit, least = next((i, r.min()) for i, r in enumerate(relevance) if not (r >= 0).all())
    return ValueError(f"relevances of unit {unit} go down to {float(least):g}: use numbers >= 0")


def _shared(problem: Problem) -> bool:
    """Whether a problem joins the loop of others, which never waits for the device."""
    return problem.rows.is_cuda or len(problem.rows) <= TOGETHER


def _groups(problems: Sequence[Problem], budgets: Sequence[int]) -> list[list[int]]:
    """Problems that share one loop: of one width of rows, and of similar sizes."""
    found: list[list[int]] = []
    for i in sorted(range(len(problems)), key=lambda i: (problems[i].rows.shape[1], -len(problems[i].rows))):
        if found and _shared(problems[i]) and _shared(problems[found[-1][0]]):
            group = [*found[-1], i]
            n, d = problems[group[0]].rows.shape
            room = 4 * n * (d + max(budgets[j] for j in group)) * len(group) <= GROUP_BYTES
            if room and d == problems[i].rows.shape[1]:
                found[-1] = group
                continue
        found.append([i])
    return found


def _together(problems: Sequence[Problem], budget: int) -> Tensor:
    """[B, budget] picks; the tail of a problem with fewer rows than that is meaningless, but in range.

    left: [B, N] what the picked rows of this round leave of the diagonal; 0 where that is nothing but rounding, -inf
    once a row is picked. whole: the same with nothing taken. factor: [B, k, N] rows of a Cholesky factor of the kernel.
    """
    sizes = [len(p.rows) for p in problems]
    count, width, one = len(problems), max(sizes), problems[0].rows
    rows, whole = one.new_zeros(count, width, one.shape[1]), one.new_full((count, width), -torch.inf)
    for i, (problem, n) in enumerate(zip(problems, sizes)):
        rows[i, :n], whole[i, :n] = problem.rows, problem.own
    left, least = whole.clone(), RANK * whole.clamp(min=0)
    factor = one.new_empty(count, budget, width)
    picks = torch.empty(budget, count, dtype=torch.int64, device=one.device)
    begun = torch.zeros(count, 1, dtype=torch.int64, device=one.device)
    steps = torch.arange(budget, device=one.device)
    with full_precision(one.device):
        for step, pick in enumerate(picks):
            over = left.amax(1, keepdim=True) <= 0  # nothing is left: a new round, among the rows not picked
            left, begun = torch.where(over, whole, left), torch.where(over, step, begun)
            pick.copy_(best_row(left, MARGIN))
            at = pick.view(-1, 1, 1)
            row = torch.bmm(rows, rows.gather(1, at.expand(-1, 1, rows.shape[2])).mT)
            if step:
                column = factor[:, :step].gather(2, at.expand(-1, step, 1))
                column = torch.where((steps[:step] >= begun)[:, :, None], column, 0.0)
                row = torch.baddbmm(row, factor[:, :step].mT, column, alpha=-1)
            own = left.gather(1, pick[:, None]).clamp_(min=TINY)
            factor[:, step] = taken = row[:, :, 0] * own.rsqrt_()
            whole.scatter_(1, pick[:, None], -torch.inf)
            left = left.addcmul(taken, taken, value=-1)
            left = torch.where(left < least, 0.0, left).masked_fill_(whole == -torch.inf, -torch.inf)
    return picks.T


def _in_blocks(problem: Problem, budget: int) -> Tensor:
    """[budget] picks of one problem on the CPU; left and whole as in `_together`, factor [k, N] of this round alone."""
    rows, own = problem
    left, whole, least = own.clone(), own.clone(), RANK * own
    # A round has no more picks than rows have channels, but for rounding.
    factor = rows.new_empty(min(budget, rows.shape[1]), len(rows))
    picks: list[int] = []
    held = 0
    with full_precision(rows.device):
        while len(picks) < budget:
            if not left.amax() > 0:
                left, held = whole.clone(), 0
            past = factor[:held]
            foreseen, lower = _foresee(rows, left, least, past, budget - len(picks))
            table = rows.index_select(0, foreseen) @ rows.T
            if len(past):
                table.addmm_(past.index_select(1, foreseen).T, past, alpha=-1)
            if held + len(foreseen) > len(factor):
                factor = torch.cat([factor, factor.new_empty(len(foreseen), len(rows))])
            block = factor[held : held + len(foreseen)]
            block.copy_(torch.linalg.solve_triangular(lower, table, upper=False))
            left -= block.square().sum(0)
            left.masked_fill_(left < least, 0.0)
            left.masked_fill_(whole.index_fill_(0, foreseen, -torch.inf) == -torch.inf, -torch.inf)
            picks += foreseen.tolist()
            held += len(foreseen)
    return torch.tensor(picks)


def _foresee(rows: Tensor, left: Tensor, least: Tensor, past: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The next picks [h], 1 <= h <= most, and the lower triangle [h, h] of their Cholesky factor.

    Only rows with the most left are looked at; what any row outside has left bounds how far they are certain.
    """
    n = len(rows)
    width = min(n, max(FEW, min(MANY, most)))
    best = left.topk(min(n, width + 1))
    bound = float(best.values[width]) if width < n else -torch.inf
    if _ties(float(best.values[0]), bound):  # more rows tie than are looked at
        pick = best_row(left[None], MARGIN)
        return pick, left.index_select(0, pick).clamp(min=TINY).sqrt()[:, None]
    at = best.indices[:width].sort().values
    some, before = rows.index_select(0, at), past.index_select(1, at)
    kernel = torch.addmm(some @ some.T, before.T, before, alpha=-1) if len(past) else some @ some.T
    floor, score = least.index_select(0, at).tolist(), left.index_select(0, at)
    kernel.diagonal().copy_(score)  # from here on it is what the picks found leave of the kernel
    factor, found, roots = rows.new_empty(min(most, width), width), list[int](), list[float]()
    while len(found) < len(factor):
        j, own = _first_of_largest(kernel.diagonal().tolist(), floor)
        if found and (own <= 0 or _ties(own, bound)):
            break
        row = factor[len(found)]
        roots.append(max(own, TINY) ** 0.5)
        found.append(j)
        torch.div(kernel[j], roots[-1], out=row)
        kernel.addr_(row, row, alpha=-1)
    lower = factor[: len(found), found].T.tril()
    lower.diagonal().copy_(torch.tensor(roots))
    return at[found], lower


def _first_of_largest(values: list[float], floor: list[float]) -> tuple[int, float]:
    """As `best_row`, with 0 for values below their floor."""
    while True:
        top = max(values)
        j, value = next(((i, x) for i, x in enumerate(values) if x >= top - MARGIN * abs(top)), (0, 0.0))
        if value >= floor[j] or value <= 0:
            return j, value
        values[j] = 0.0


def _ties(score: float, bound: float) -> bool:
    return (1 - 2 * MARGIN) * score <= bound
