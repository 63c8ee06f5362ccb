"""Volume and coverage in plain torch: O(k^2 N) for the volume, O(N) for each row that a pick comes closer to.

Where more rows are picked than they have channels D, the volume takes O(k D N) and no k x N matrix (`_Inverse`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..farthest_point import reference as farthest
from ..farthest_point.reference import Memory, fill_gram, full_precision, unit_rows
from ..host import check, check_finite

MARGIN = 1e-5  # scores closer than this, in proportion to the largest, tie
FLOOR = 1e-6  # a mean gain below it is what rounding leaves
LEAST = 1e-20  # weights below it, in proportion to the largest, count as this
COVERED_BYTES = 1 << 28  # memory="auto": similarities between all rows and those that shall be covered
FEW = 512  # rows to cover with memory="low"
TOGETHER = 256  # problems of at most so many rows share one loop on the CPU, others take theirs in turn
BLOCK = 384  # rows of similarities handled at a time


class Problem(NamedTuple):
    """One problem, prepared: unit rows [N, D], weights [N] of at most 1, and the M rows to cover (None: all)."""

    rows: Tensor
    weight: Tensor
    covered: Tensor | None


@torch.no_grad()
def volume_coverage(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    weights: Sequence[Tensor] | None = None,
    ridge: float = 0.01,
    memory: Memory = "auto",
) -> list[Tensor]:
    """As `vtprune.kernels.volume_coverage`, in plain torch on any device; see there."""
    check_arguments(features, budgets, weights, ridge, memory)
    problems = prepare(features, weights, memory)
    picks: dict[int, Tensor] = {}
    for group in groups(problems):
        longest = max(budgets[i] for i in group)
        table = greedy([problems[i] for i in group], longest, ridge)
        picks.update({i: order[: budgets[i]] for i, order in zip(group, table)})
    return [picks[i] for i in range(len(problems))]


def check_arguments(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    weights: Sequence[Tensor] | None,
    ridge: float,
    memory: str,
) -> None:
    """Raise ValueError for anything wrong that the host can see without waiting for the device."""
    farthest.check_arguments(features, budgets, "maxmin", None, memory)
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge={ridge}: use a finite number > 0, such as 0.01")
    if weights is None:
        return
    if len(weights) != len(features):
        raise ValueError(f"{len(features)} feature tensors need as many weights, got {len(weights)}")
    for i, (unit, weight) in enumerate(zip(features, weights)):
        if weight.shape != unit.shape[:1] or not weight.is_floating_point():
            raise ValueError(
                f"weights[{i}] is {weight.dtype} {tuple(weight.shape)}: expected a float tensor [{unit.shape[0]}], one "
                f"number for each row of features[{i}]"
            )


def prepare(features: Sequence[Tensor], weights: Sequence[Tensor] | None, memory: Memory) -> list[Problem]:
    """Unit rows, weights and rows to cover of every problem; NaN, Inf and negative weights are refused."""
    pairs = [unit_rows(x) for x in features]
    check_finite([largest for _, largest in pairs], "feature rows")
    found = []
    for i, (rows, _) in enumerate(pairs):
        n, m = rows.shape[0], covered_rows(rows.shape[0], memory)
        at = None if m == n else torch.arange(m, device=rows.device) * n // m
        weight = rows.new_ones(n) if weights is None else weights[i].float()
        found.append(Problem(rows, (weight / weight.amax().clamp(min=LEAST)).clamp(min=LEAST), at))
    if weights:
        check_finite(weights, "weights")
        check(torch.stack([(w >= 0).all() for w in weights]).all(), lambda: negative(weights))
    return found


def negative(weights: Sequence[Tensor]) -> ValueError:
    """The error that names the first of the weights with a number below 0."""
    unit, least = next((i, w.min()) for i, w in enumerate(weights) if not (w >= 0).all())
    return ValueError(f"weights of unit {unit} go down to {float(least):g}: use numbers >= 0")


def covered_rows(n: int, memory: str) -> int:
    """How many of n rows shall be covered (see `memory`)."""
    if memory == "fast":
        return n
    return min(n, FEW if memory == "low" else max(FEW, COVERED_BYTES // (4 * n)))


def groups(problems: Sequence[Problem]) -> list[list[int]]:
    """Problems that share one loop: small ones, and on a device that would have to be waited for all without choice."""
    sizes = [p.rows.shape[0] for p in problems]
    whole = [i for i, p in enumerate(problems) if p.covered is None and (p.rows.is_cuda or sizes[i] <= TOGETHER)]
    alone = [[i] for i in range(len(problems)) if i not in whole]
    return farthest.groups(whole, sizes) + alone


def similarities(problem: Problem, out: Tensor) -> Tensor:
    """Write the similarities of the rows to cover with all rows into out [M, N]."""
    rows, at = problem.rows, problem.covered
    if at is None:
        return fill_gram(rows, out)
    with full_precision(rows.device):
        for start in range(0, len(at), BLOCK):
            torch.mm(rows.index_select(0, at[start : start + BLOCK]), rows.T, out=out[start : start + BLOCK])
    return out


def gains(table: Tensor, best: Tensor) -> Tensor:
    """[B, N] float64: the sum over m of max(table[m] - best[m], 0); table [B, M, N], best [B, M, 1]."""
    total = torch.zeros(table.shape[0], table.shape[2], dtype=torch.float64, device=table.device)
    scratch = torch.empty_like(table[:, :BLOCK])
    for rows, least in zip(table.split(BLOCK, 1), best.split(BLOCK, 1)):
        more = torch.sub(rows, least, out=scratch[:, : rows.shape[1]])
        total += column_sums(more.clamp_(min=0))
    return total


def column_sums(x: Tensor) -> Tensor:
    """[..., N] float64: the sums over the rows of x [..., M, N]; eight at a time in float32, which is much faster."""
    if x.shape[-2] <= 16:
        return x.sum(-2, dtype=torch.float64)
    whole = x.shape[-2] // 8 * 8
    eights = x[..., :whole, :].unflatten(-2, (whole // 8, 8)).sum(-2)
    return eights.sum(-2, dtype=torch.float64) + x[..., whole:, :].sum(-2)


def greedy(problems: Sequence[Problem], budget: int, ridge: float) -> Tensor:
    """[B, budget] picks; the tail of a problem with fewer rows than that is meaningless, but in range.

    table: [B, M, N] similarities of the rows to cover; best: [B, M, 1] the largest one of each to a picked row.
    left: [B, N] d_j, and -inf once a row is picked.
    """
    one, at = problems[0].rows, problems[0].covered
    sizes = [p.rows.shape[0] for p in problems]
    count, width = len(problems), max(sizes)
    m = width if at is None else len(at)
    table, weight = one.new_empty(count, m, width), one.new_ones(count, width)
    left, floors = one.new_full((count, width), -torch.inf), one.new_empty(count, 1, dtype=torch.float64)
    for i, (problem, n) in enumerate(zip(problems, sizes)):
        if n < width:
            table[i].zero_()  # padding adds nothing to a sum over rows
        similarities(problem, table[i] if problem.covered is not None else table[i, :n, :n])
        left[i, :n] = torch.linalg.vector_norm(problem.rows, dim=1).square() + ridge
        weight[i, :n] = problem.weight
        floors[i].fill_(FLOOR * min(m, n))
    on_host = width > TOGETHER and not one.is_cuda
    alone = on_host or at is not None  # what shares its loop takes one form, however many it shares it with
    volume: _Inverse | _Factor
    if alone and budget > one.shape[1]:
        volume = _Inverse(problems[0], table, ridge)
    else:
        volume = _Factor(problems, table, budget)
    picks = torch.empty(budget, count, dtype=torch.int64, device=one.device)
    best = one.new_zeros(count, m, 1)
    cover = gains(table, best)  # sums here, means in the formula: only ratios matter
    with full_precision(one.device):
        for step, pick in enumerate(picks):
            pick.copy_(best_row(cover.clamp(min=floors).float().mul_(weight).mul_(left)))
            own = left.gather(1, pick[:, None]).clamp_(min=ridge)  # it is never less, but for rounding
            taken, near = volume.take(pick, own)
            left.addcmul_(taken, taken, value=-1).scatter_(1, pick[:, None], -torch.inf)
            nearer = torch.maximum(best, near[:, :, None])
            if step and on_host:  # choosing rows waits for a device
                _lower(cover[0], table[0], best[0], nearer[0])
            else:  # the first pick comes closer to all rows
                cover = gains(table, nearer)
            best = nearer
    return picks.T


def best_row(score: Tensor, margin: float = MARGIN, slack: float = 0.0) -> Tensor:
    """[B] int64: the lowest index of those with the largest score [B, N], up to `margin` of it and `slack`."""
    top = score.amax(1, keepdim=True)
    least = torch.sub(top, top.abs(), alpha=margin)
    return (score >= (least - slack if slack else least)).view(torch.uint8).argmax(1)


class _Factor:
    """What picks take from d, by a Cholesky factor of S + ridge I: its rows [B, k, N], one for each pick."""

    def __init__(self, problems: Sequence[Problem], table: Tensor, budget: int) -> None:
        self.rows, self.covered, self.table = problems[0].rows, problems[0].covered, table
        self.factor, self.step = table.new_empty(len(problems), budget, table.shape[2]), 0
        # Where the rows of each problem begin in the table; one alone needs no sum at each pick.
        self.begins = torch.arange(len(problems), device=table.device) * table.shape[2] if len(problems) > 1 else None

    def take(self, pick: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N], whose squares the picks [B] take from d, own [B, 1] theirs; and their likeness [B, M] to the rows."""
        if self.covered is None:
            at = pick if self.begins is None else pick + self.begins
            row = near = self.table.flatten(0, 1).index_select(0, at)
        else:
            row = torch.mv(self.rows, self.rows.index_select(0, pick)[0])[None]
            near = row.index_select(1, self.covered)
        taken, past = row[:, None], self.factor[:, : self.step]
        if self.step:
            if self.begins is None:
                column = past.index_select(2, pick).mT
            else:
                column = past.gather(2, pick.view(-1, 1, 1).expand(-1, self.step, 1)).mT
            taken = torch.baddbmm(taken, column, past, alpha=-1)
        taken = torch.mul(taken[:, 0], own.rsqrt(), out=self.factor[:, self.step])
        self.step += 1
        return taken, near


class _Inverse:
    """The same of one problem by the inverse [D, D] of I + X_P^T X_P / ridge, X_P the picked rows: no k x N matrix.

    d_j = ridge + x_j^T inverse x_j for the rows x (Woodbury's identity). In float64, as errors add up over the picks.
    """

    def __init__(self, problem: Problem, table: Tensor, ridge: float) -> None:
        self.rows, self.table, self.ridge = problem.rows, table, ridge
        self.inverse = torch.eye(self.rows.shape[1], dtype=torch.float64, device=table.device)

    def take(self, pick: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """As `_Factor.take`; the own d of the pick is known here to more digits."""
        x = self.rows.index_select(0, pick)[0].double()
        left = self.inverse @ x
        own = self.ridge + x @ left
        taken = torch.mv(self.rows, (left * own.rsqrt()).float())
        self.inverse.addr_(left, left / own, alpha=-1)
        return taken[None], self.table.index_select(2, pick)[:, :, 0]


def _lower(cover: Tensor, table: Tensor, old: Tensor, new: Tensor) -> None:
    """Subtract from cover [N] what is no longer to be gained; only rows that came closer, a few percent, change it.

    table: [M, N]. old, new: [M, 1]. max(s - old, 0) - max(s - new, 0) is s between old and new, less old.
    """
    at = (new > old)[:, 0].nonzero()[:, 0]
    for some in at.split(BLOCK):
        low, high = old.index_select(0, some), new.index_select(0, some)
        cover -= lower(table.index_select(0, some), low, high).sum(0)


def lower(rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """[M, N]: by how much less there is to be gained from each of rows [M, N], which come closer: old to new [M, 1].

    The rows are overwritten.
    """
    # In two steps, for which torch has vector code: clamp with two tensors takes ten times as long.
    torch.maximum(rows, old, out=rows)
    torch.minimum(rows, new, out=rows)
    return rows.sub_(old)
