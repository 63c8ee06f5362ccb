"""Greedy coverage in plain torch: O(N) for each row that a pick covers better, and O(N D) where rows are made anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..farthest_point.reference import GRAM_BYTES, Memory, fill_gram, full_precision, unit_rows
from ..host import check, check_finite
from ..volume_coverage.reference import BLOCK, LEAST, TOGETHER, best_row, column_sums, gains, lower, negative

Combine = Literal["multiply", "add"]

MARGIN = 3e-7  # scores closer than this, in proportion to the largest, tie
SLACK = 3e-7  # two tokens that cover nothing but each other have equal sums of cosines, up to rounding
TABLE_BYTES, HELD_BYTES = 1 << 26, 1 << 30  # memory="auto": the whole matrix on a GPU, as many rows of it on a CPU
OF_COSINES = 1e-7  # what rounding leaves of a gain, in proportion to N rows of cosines
OF_SOFTMAX = 1e-6  # the same, in proportion to a column of mean weight
OF_ROWS = 1e-9  # the same where the matrix is given, in proportion to the largest gain of the first pick
TINY = 1e-15


class Problem(NamedTuple):
    """One problem, prepared: the rows [M, N] that were given, unit features [N, D] or None, and how they count.

    held: how many rows of features are kept as rows of the matrix, the last ones; the others are made when they are
    needed. floor: None where it follows from the largest gain of the first pick. weight [N] float32, excluded [N] bool.
    """

    given: Tensor
    unit: Tensor | None
    temperature: float | None
    scale: float
    weight: Tensor | None
    excluded: Tensor | None
    held: int
    floor: float | None

    @property
    def n(self) -> int:
        """Columns."""
        return self.given.shape[1]

    @property
    def slack(self) -> float:
        """Scores closer than this tie: sums of cosines, where they are the score."""
        return 0.0 if self.unit is None or self.temperature or self.weight is not None else SLACK * self.scale

    @property
    def pairs(self) -> int:
        """Rows that are made of features."""
        return 0 if self.unit is None else self.n

    @property
    def m(self) -> int:
        """Rows."""
        return self.pairs + self.given.shape[0]

    @property
    def made(self) -> int:
        """Rows that are made when they are needed; those that are held come behind them."""
        return self.pairs - self.held

    @property
    def whole(self) -> bool:
        """All rows are held."""
        return not self.made


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
    """As `vtprune.kernels.facility_greedy`, in plain torch on any device; see there."""
    check_arguments(features, budgets, rows, weights, combine, temperature, scale, excluded, memory)
    problems = prepare(features, rows, weights, combine, temperature, scale, excluded, memory)
    picks: dict[int, Tensor] = {}
    for group in groups(problems):
        members = [problems[i] for i in group]
        longest = max(budgets[i] for i in group)
        if not members[0].given.is_cuda and (members[0].n > TOGETHER or not members[0].whole):
            table = _on_host(members[0], longest, combine)
        else:
            table = greedy(members, longest, combine) if members[0].whole else _on_demand(members[0], longest, combine)
        picks.update({i: order[: budgets[i]] for i, order in zip(group, table)})
    return [picks[i] for i in range(len(problems))]


def check_arguments(
    features: Sequence[Tensor | None],
    budgets: Sequence[int],
    rows: Sequence[Tensor | None] | None,
    weights: Sequence[Tensor] | None,
    combine: str,
    temperature: float | None,
    scale: float,
    excluded: Sequence[Tensor] | None,
    memory: str,
) -> None:
    """Raise ValueError for anything wrong that the host can see without waiting for the device."""
    for name, value, choices in (("combine", combine, get_args(Combine)), ("memory", memory, get_args(Memory))):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose {' or '.join(map(repr, choices))}")
    for name, number in (("temperature", temperature), ("scale", scale)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name}={number}: use a finite number > 0")
    for what, given in (("budgets", budgets), ("rows", rows), ("weights", weights), ("excluded", excluded)):
        if given is not None and len(given) != len(features):
            raise ValueError(f"{len(features)} features need as many {what}, got {len(given)}")
    for i, unit in enumerate(features):
        own = None if rows is None else rows[i]
        n = _columns(i, unit, own)
        if not 1 <= budgets[i] <= n:
            raise ValueError(f"budgets[{i}]={budgets[i]}: choose 1..{n}, the number of columns of problem {i}")
        for what, vectors in (("weights", weights), ("excluded", excluded)):
            if vectors is None:
                continue
            vector, wanted = vectors[i], "bool" if what == "excluded" else "float"
            if vector.shape != (n,) or (vector.dtype == torch.bool) != (wanted == "bool"):
                raise ValueError(
                    f"{what}[{i}] is {vector.dtype} {tuple(vector.shape)}: expected a {wanted} tensor [{n}], one entry "
                    "for each column"
                )
            if what == "weights" and not vector.is_floating_point():
                raise ValueError(f"weights[{i}] is {vector.dtype}: expected a float tensor [{n}]")


def _columns(i: int, unit: Tensor | None, own: Tensor | None) -> int:
    """How many columns problem i has; ValueError for a matrix that cannot be one."""
    for what, x, shape in (("features", unit, "[N, D]"), ("rows", own, "[M, N]")):
        if x is not None and (x.dim() != 2 or not x.is_floating_point()):
            raise ValueError(f"{what}[{i}] is {x.dtype} {tuple(x.shape)}: expected a float tensor {shape}")
    if unit is not None:
        if not unit.numel():
            raise ValueError(f"features[{i}] is empty, {tuple(unit.shape)}: nothing to pick from; leave it out")
        if own is not None and own.shape[1] != unit.shape[0]:
            raise ValueError(f"rows[{i}] is {tuple(own.shape)}: it needs {unit.shape[0]} columns, one for each feature")
        return unit.shape[0]
    if own is None or not own.numel():
        raise ValueError(f"problem {i} has neither features nor rows: nothing to pick from; leave it out")
    return own.shape[1]


def prepare(
    features: Sequence[Tensor | None],
    rows: Sequence[Tensor | None] | None,
    weights: Sequence[Tensor] | None,
    combine: Combine,
    temperature: float | None,
    scale: float,
    excluded: Sequence[Tensor] | None,
    memory: Memory,
) -> list[Problem]:
    """All problems in float32; NaN, Inf and negative weights are refused."""
    given = [None] * len(features) if rows is None else rows
    pairs = [None if x is None else unit_rows(x) for x in features]
    check_finite([pair[1] for pair in pairs if pair is not None], "feature rows")
    check_finite([own for own in given if own is not None], "rows")
    if weights:
        check_finite(weights, "weights")
        check(torch.stack([(w >= 0).all() for w in weights]).all(), lambda: negative(weights))
    found = []
    for i, (pair, own) in enumerate(zip(pairs, given)):
        unit = None if pair is None else pair[0]
        if own is None:
            assert unit is not None
            own = unit.new_zeros(0, unit.shape[0])
        m, n = own.shape
        weight = None if weights is None else weights[i].float()
        if weight is not None and combine == "multiply":
            weight = (weight / weight.amax().clamp(min=LEAST)).clamp(min=LEAST)
        floor = None if unit is None else scale * (OF_COSINES * n if temperature is None else OF_SOFTMAX / n)
        held = 0 if unit is None else _held(m, n, own.is_cuda, memory)
        out = None if excluded is None else excluded[i]
        found.append(Problem(own.float(), unit, temperature, scale, weight, out, held, floor))
    return found


def _held(m: int, n: int, on_gpu: bool, memory: Memory) -> int:
    """How many rows of n features are held, beside m rows that were given."""
    if memory != "auto":
        return n if memory == "fast" else 0
    return (n if 4 * (m + n) * n <= TABLE_BYTES else 0) if on_gpu else min(n, max(0, HELD_BYTES // (4 * n) - m))


def groups(problems: Sequence[Problem]) -> list[list[int]]:
    """Problems that share one loop: small ones, and on a device that would have to be waited for all without choice."""
    together = [i for i, p in enumerate(problems) if p.whole and (p.given.is_cuda or p.n <= TOGETHER)]
    alike: dict[tuple[bool, bool, bool], list[int]] = {}
    for i in together:
        p = problems[i]
        alike.setdefault((p.weight is None, p.excluded is None, p.floor is None), []).append(i)
    found: list[list[int]] = []
    for members in alike.values():
        first = len(found)
        for i in sorted(members, key=lambda i: (-problems[i].n, -problems[i].m)):
            tallest = max([problems[i].m, *(problems[j].m for j in found[-1])]) if len(found) > first else 0
            if tallest and 4 * tallest * problems[found[-1][0]].n * (len(found[-1]) + 1) <= GRAM_BYTES:
                found[-1].append(i)
            else:
                found.append([i])
    return found + [[i] for i in range(len(problems)) if i not in together]


def shaped(p: Problem, cosines: Tensor, log: Tensor | None) -> Tensor:
    """Cosines [..., N] as rows of the matrix, in place. log: of each row, as `normaliser` gives it."""
    if p.temperature is None:
        return cosines if p.scale == 1 else cosines.mul_(p.scale)
    assert log is not None
    return cosines.div_(p.temperature).sub_(log).exp_()


def normaliser(p: Problem, cosines: Tensor) -> Tensor | None:
    """[..., 1]: what the exponent of a row [..., N] is lowered by, so that the row sums to scale / N."""
    if p.temperature is None:
        return None
    return (cosines / p.temperature).logsumexp(-1, keepdim=True).sub_(math.log(p.scale / p.n))


def normalisers(p: Problem) -> Tensor:
    """[made]: `normaliser` of the rows that are made, a block of rows at a time."""
    assert p.unit is not None
    parts = [normaliser(p, block) for block in _products(p.unit, p.unit[: p.made].split(BLOCK))]
    return torch.cat([part for part in parts if part is not None])[:, 0]


def fill(p: Problem, out: Tensor) -> None:
    """Write the rows that are held into out [M - made, N]."""
    if p.unit is not None and p.held:
        fill_gram(p.unit[p.made :], out[: p.held, p.made :])
        with full_precision(p.unit.device):
            torch.mm(p.unit[p.made :], p.unit[: p.made].T, out=out[: p.held, : p.made])
        for block in out[: p.held].split(BLOCK):
            shaped(p, block, normaliser(p, block))
    out[p.held :] = p.given


def scores(cover: Tensor, floor: Tensor, weight: Tensor | None, excluded: Tensor | None, combine: Combine) -> Tensor:
    """[B, N] float32 of the gains [B, N]; columns that are excluded come below all others, in the same order."""
    value = torch.maximum(cover, floor).float()
    if weight is not None:
        value = value * weight if combine == "multiply" else value + weight
    return value if excluded is None else torch.where(excluded, -value.reciprocal(), value)


def floors(problems: Sequence[Problem], cover: Tensor) -> Tensor:
    """[B, 1] float64: gains below it are what rounding leaves. cover: [B, N] gains of the first pick."""
    if problems[0].floor is None:
        return (cover.amax(1, keepdim=True) * OF_ROWS).clamp_(min=TINY)
    # Filled one by one: a tensor of a list would be copied to the device.
    return torch.cat([cover.new_full((1, 1), p.floor or 0.0) for p in problems])


def greedy(problems: Sequence[Problem], budget: int, combine: Combine) -> Tensor:
    """[B, budget] picks; the tail of a problem with fewer columns than that is meaningless, but in range.

    table: [B, M, N] matrices. best: [B, M, 1] how well each row is covered. free: [B, N] -inf once a column is picked.
    """
    one = problems[0].given
    count, width, m = len(problems), max(p.n for p in problems), max(p.m for p in problems)
    table, free = one.new_empty(count, m, width), one.new_full((count, width), -torch.inf)
    weight = None if problems[0].weight is None else one.new_ones(count, width)
    excluded = None if problems[0].excluded is None else one.new_zeros(count, width, dtype=torch.bool)
    for i, p in enumerate(problems):
        if p.n < width or p.m < m:
            table[i].zero_()  # padding adds nothing to a sum over rows
        fill(p, table[i, : p.m, : p.n])
        free[i, : p.n] = 0
        if weight is not None and p.weight is not None:
            weight[i, : p.n] = p.weight
        if excluded is not None and p.excluded is not None:
            excluded[i, : p.n] = p.excluded
    picks = torch.empty(budget, count, dtype=torch.int64, device=one.device)
    best = one.new_zeros(count, m, 1)
    cover = gains(table, best)
    floor, slack = floors(problems, cover), problems[0].slack
    for step, pick in enumerate(picks):
        pick.copy_(best_row(scores(cover, floor, weight, excluded, combine).add_(free), MARGIN, slack))
        if step + 1 == budget:
            break
        free.scatter_(1, pick[:, None], -torch.inf)
        if count == 1:
            near = table.index_select(2, pick)
        else:
            near = table.gather(2, pick.view(-1, 1, 1).expand(-1, m, 1))
        best = torch.maximum(best, near)
        cover = gains(table, best)  # of all rows: choosing those that have changed would wait for the device
    return picks.T


def _on_host(p: Problem, budget: int, combine: Combine) -> Tensor:
    """[1, budget] picks of one problem on the CPU, where the rows that have changed can be told from the others."""
    table = p.given
    if p.held:
        table = table.new_empty(p.m - p.made, p.n)
        fill(p, table)
    log = normalisers(p)[:, None] if p.made and p.temperature is not None else None
    weight, free = None if p.weight is None else p.weight.double(), torch.zeros(p.n, dtype=torch.float64)
    picks: list[int] = []
    best = table.new_zeros(p.m)
    cover = _all_gains(p, table, log, best)
    floor, value = floors([p], cover[None])[0], torch.empty_like(cover)
    while len(picks) < budget:
        if picks:
            free[picks[-1]] = -torch.inf
            column = table[:, picks[-1]]
            if p.made:
                column = torch.cat([_made_column(p, log, picks[-1]), column])
            nearer = torch.maximum(best, column)
            if len(picks) == 1:  # the first pick covers nearly all rows better
                cover = _all_gains(p, table, log, nearer)
            else:
                for at in (nearer > best).nonzero()[:, 0].split(BLOCK):
                    old, new = (t.index_select(0, at)[:, None] for t in (best, nearer))
                    cover -= column_sums(lower(_some(p, table, log, at), old, new))
            best = nearer
        torch.maximum(cover, floor, out=value)
        if weight is not None:
            value = value.mul_(weight) if combine == "multiply" else value.add_(weight)
        if p.excluded is not None:  # as in `scores`
            value = torch.where(p.excluded, -value.reciprocal(), value)
        value.add_(free)
        top = value.amax().item()
        picks.append(int((value >= top - MARGIN * abs(top) - p.slack).view(torch.uint8).argmax()))
    return torch.tensor([picks])


def _made_column(p: Problem, log: Tensor | None, pick: int) -> Tensor:
    """[made]: one column of the rows that are made when they are needed."""
    assert p.unit is not None
    with full_precision(p.unit.device):
        column = torch.mv(p.unit[: p.made], p.unit[pick])
    return shaped(p, column[:, None], log)[:, 0]


def _some(p: Problem, table: Tensor, log: Tensor | None, at: Tensor) -> Tensor:
    """Rows `at` (ascending) of the matrix, copied from the table or made: log says how."""
    held = at[at >= p.made] - p.made
    first = at[: len(at) - len(held)]
    if p.unit is None or not len(first):
        return table.index_select(0, held)
    (block,) = _products(p.unit, [p.unit.index_select(0, first)])
    block = shaped(p, block, None if log is None else log.index_select(0, first))
    return torch.cat([block, table.index_select(0, held)]) if len(held) else block


def _on_demand(p: Problem, budget: int, combine: Combine) -> Tensor:
    """[1, budget] picks of one problem on a device that is not waited for: all rows are made anew for every pick."""
    assert p.unit is not None
    unit, n = p.unit, p.n
    free, weight = unit.new_zeros(1, n), None if p.weight is None else p.weight[None]
    excluded = None if p.excluded is None else p.excluded[None]
    log = None if p.temperature is None else normalisers(p)[:, None]
    picks = torch.empty(budget, 1, dtype=torch.int64, device=unit.device)
    best = unit.new_zeros(p.m)
    for step, pick in enumerate(picks):
        cover = _all_gains(p, p.given, log, best)[None]
        if not step:
            floor = floors([p], cover)
        pick.copy_(best_row(scores(cover, floor, weight, excluded, combine).add_(free), MARGIN, p.slack))
        free.scatter_(1, pick[:, None], -torch.inf)
        with full_precision(unit.device):
            column = torch.mv(unit, unit.index_select(0, pick)[0])[:, None]
        best = torch.maximum(best, torch.cat([shaped(p, column, log), p.given.index_select(1, pick)])[:, 0])
    return picks.T


def _products(unit: Tensor, some: Sequence[Tensor]) -> Iterator[Tensor]:
    """some[i] @ unit.T, one after the other."""
    for block in some:
        with full_precision(unit.device):
            made = block @ unit.T
        yield made


def _all_gains(p: Problem, table: Tensor, log: Tensor | None, best: Tensor) -> Tensor:
    """[N] float64 gains where best [M] has been reached; a block of rows at a time. table: the rows that are held."""
    made = p.m - len(table)
    cover = gains(table[None], best[None, made:, None])[0]
    if made and p.unit is not None:
        for start, block in zip(range(0, made, BLOCK), _products(p.unit, p.unit[:made].split(BLOCK))):
            at = slice(start, start + BLOCK)
            block = shaped(p, block, None if log is None else log[at])
            cover += column_sums(block.sub_(best[:made][at, None]).clamp_(min=0))
    return cover
