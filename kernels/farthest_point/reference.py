"""Farthest point selection in plain torch: O(k N) after the Gram matrix, or O(k N D) without it.

On the CPU a large problem is solved in blocks. The rows that are farthest now, a few hundred at most, are enough to
guess the next picks; the similarities of all rows to the picks guessed are one product of matrices; and the guesses
are kept as long as each is what the loop over all rows picks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from ..host import check_finite

Objective = Literal["maxmin", "maxsum"]
Memory = Literal["auto", "fast", "low"]

GRAM_BYTES = 1 << 30  # memory="auto" keeps all Gram matrices held at one time below this
BLOCK_BYTES = 1 << 25
GRAM_BLOCK = 384  # rows per product: skips most of the lower half and still keeps the BLAS busy
TOGETHER = 256  # problems of at most so many rows share one loop on the CPU, others take theirs in turn
MATRIX_ROWS = 6144  # on the CPU a tenth of more rows than this is picked sooner without the matrix
FEWEST, MOST = 4, 128  # picks guessed at a time, twice as many as were right before


@torch.no_grad()
def farthest_point(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    objective: Objective = "maxmin",
    first: Sequence[int | Tensor] | None = None,
    weights: Sequence[Tensor] | None = None,
    memory: Memory = "auto",
) -> list[Tensor]:
    """As `vtprune.kernels.farthest_point`, in plain torch on any device; see there."""
    check_arguments(features, budgets, objective, first, memory, weights)
    pairs = [unit_rows(x) for x in features]
    check_finite([largest for _, largest in pairs], "feature rows")
    rows = [unit for unit, _ in pairs]
    scale: Sequence[Tensor | None] = [None] * len(rows)
    if weights is not None:
        scale = [weight.float() for weight in weights]
        check_finite([weight.float() for weight in weights], "weights")
    starts: list[Tensor | None] = [None] * len(rows)
    if first is not None:
        starts = [first_pick(index, unit) for index, unit in zip(first, rows)]
    picks: dict[int, Tensor] = {}
    with_gram: list[int] = []
    for i, unit in enumerate(rows):
        if in_blocks(unit, budgets[i], objective, memory):
            picks[i] = _in_blocks(unit, budgets[i], objective, starts[i], scale[i])
        elif without_gram(unit.shape[0], memory):
            picks[i] = _without_gram(unit, budgets[i], objective, starts[i], scale[i])
        else:
            with_gram.append(i)
    for group in groups(with_gram, [unit.shape[0] for unit in rows]):
        longest = max(budgets[i] for i in group)
        given = [starts[i] for i in group], [scale[i] for i in group]
        picked = _with_gram([rows[i] for i in group], longest, objective, *given)
        picks.update({i: order[: budgets[i]] for i, order in zip(group, picked)})
    return [picks[i] for i in range(len(rows))]


def check_arguments(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    objective: str,
    first: Sequence[int | Tensor] | None,
    memory: str,
    weights: Sequence[Tensor] | None = None,
) -> None:
    """Raise ValueError for anything wrong that the host can see without waiting for the device."""
    if objective not in get_args(Objective):
        raise ValueError(f"objective={objective!r}: choose 'maxmin' or 'maxsum'")
    if memory not in get_args(Memory):
        raise ValueError(f"memory={memory!r}: choose 'auto', 'fast' or 'low'")
    if len(budgets) != len(features) or (first is not None and len(first) != len(features)):
        raise ValueError(
            f"{len(features)} feature tensors need as many budgets and first picks, "
            f"got {len(budgets)} and {'none' if first is None else len(first)}"
        )
    if weights is not None and objective != "maxmin":
        raise ValueError(f"weights= multiply distances, and objective={objective!r} sums similarities: use 'maxmin'")
    if weights is not None and [w.shape for w in weights] != [x.shape[:1] for x in features]:
        raise ValueError(
            f"weights of shapes {[tuple(w.shape) for w in weights]} for features of "
            f"{[tuple(x.shape) for x in features]}: give one [N_i] tensor for each [N_i, D_i]"
        )
    for i, (unit, budget) in enumerate(zip(features, budgets)):
        if unit.dim() != 2 or not unit.is_floating_point():
            raise ValueError(f"features[{i}] is {unit.dtype} {tuple(unit.shape)}: expected a float tensor [N, D]")
        if not unit.numel():
            raise ValueError(f"features[{i}] is empty, {tuple(unit.shape)}: nothing to pick from; leave it out")
        if not 1 <= budget <= unit.shape[0]:
            raise ValueError(f"budgets[{i}]={budget}: choose 1..{unit.shape[0]}, the number of rows of features[{i}]")
        start = 0 if first is None else first[i]
        if isinstance(start, int) and not 0 <= start < unit.shape[0]:
            raise ValueError(f"first[{i}]={start}: choose 0..{unit.shape[0] - 1}")


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 rows of length 1, zero rows staying zero; largest entry of each row [N, 1])."""
    x = x.float()
    # Dividing by the largest entry first keeps the squares of very large and very small rows in range.
    largest = x.abs().amax(dim=1, keepdim=True)
    rows = x / largest.clamp_min(torch.finfo(torch.float32).tiny)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(length.clamp_min_(torch.finfo(torch.float32).tiny)), largest


def first_pick(index: int | Tensor, unit: Tensor) -> Tensor:
    """A given first pick as a 0-d int64 tensor beside the unit; an int travels as the argument of a fill."""
    if isinstance(index, int):
        return torch.full((), index, dtype=torch.int64, device=unit.device)
    return index.to(unit.device, torch.int64)


def most_rows_with_gram(features: Sequence[Tensor], memory: Memory) -> int:
    """Rows of the largest problem that holds a Gram matrix; 0 if none does."""
    return max((x.shape[0] for x in features if not without_gram(x.shape[0], memory)), default=0)


def without_gram(n: int, memory: Memory) -> bool:
    """Whether a problem of n rows is solved without its N x N matrix."""
    return memory == "low" or (memory == "auto" and 4 * n**2 > GRAM_BYTES)


def in_blocks(x: Tensor, budget: int, objective: Objective, memory: Memory) -> bool:
    """Whether the host guesses and checks the picks of features x [N, D]; a GPU it would have to wait for.

    The matrix takes N^2 / 2 products. The blocks take `budget` * N and what the first pick needs, far below that. Sums
    of similarities carry the rounding of every product from pick to pick, so near ties of "maxsum" may fall another
    way in blocks: it goes without the matrix only where the matrix would be too large.
    """
    n = x.shape[0]
    if x.is_cuda or n <= TOGETHER:
        return False
    sooner = memory == "auto" and objective == "maxmin" and n > MATRIX_ROWS and 2 * budget <= n
    return sooner or without_gram(n, memory)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32 (no TF32, no bfloat16), whatever the process has set; put back afterwards."""
    backend = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
    before = backend.fp32_precision
    if before in ("ieee", "none"):  # "none": nobody asked for less
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def groups(members: list[int], sizes: list[int]) -> list[list[int]]:
    """Problems that share one loop: similar sizes together, padded Gram matrices within GRAM_BYTES."""
    found: list[list[int]] = []
    for i in sorted(members, key=lambda i: -sizes[i]):
        widest = sizes[found[-1][0]] if found else 0
        if found and 4 * widest**2 * (len(found[-1]) + 1) <= GRAM_BYTES:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def weighed(cosine: Tensor, weight: Tensor | None) -> Tensor:
    """What the loop minimises: cosines, or minus the weighed distances."""
    return cosine if weight is None else (cosine.clamp(min=-1) - 1) * weight


def _with_gram(
    rows: Sequence[Tensor],
    budget: int,
    objective: Objective,
    starts: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
) -> Tensor:
    """[B, budget] picks; the tail of a problem with fewer rows than that is meaningless."""
    width = max(r.shape[0] for r in rows)
    gram = rows[0].new_empty(len(rows), width, width)
    chosen: list[Tensor] = []
    for table, unit, start, weight in zip(gram, rows, starts, weights):
        n = unit.shape[0]
        table[:, n:] = torch.inf
        own = fill_gram(unit, table[:n, :n])
        if start is None:
            own.diagonal().fill_(-torch.inf)
            start = weighed(own.amax(dim=1), weight).argmin()
        if weight is not None:
            own.copy_(weighed(own, weight))
        own.diagonal().fill_(torch.inf)
        chosen.append(start)
    return greedy(gram, torch.stack(chosen), budget, objective)


def fill_gram(rows: Tensor, out: Tensor) -> Tensor:
    """Write rows @ rows.T into out [N, N]: upper blocks are multiplied, lower ones copied.

    One problem at a time, because a batched product may round differently and so break ties differently. In float32:
    a bfloat16 product takes half the time, but its error bound (2^-8 + 2^-9) leaves 128 to 1295 candidates a pick to
    be decided again (2880 clustered rows of width 1024), which costs more than it saves.
    """
    n = rows.shape[0]
    with full_precision(rows.device):
        for start in range(0, n, GRAM_BLOCK):
            stop = min(start + GRAM_BLOCK, n)
            torch.mm(rows[start:stop], rows[start:].T, out=out[start:stop, start:])
            out[stop:, start:stop] = out[start:stop, stop:].T
    return out


def greedy(gram: Tensor, first: Tensor, budget: int, objective: Objective) -> Tensor:
    """The picking loop: gram [B, N, N] and first picks [B] -> picks [B, budget].

    gram holds similarities, with +inf on the diagonal and in padded columns: a picked row turns its own entry
    of the running score to +inf, which neither maximum nor sum ever leaves, so it is not picked again.
    """
    count, width, _ = gram.shape
    combine = torch.maximum if objective == "maxmin" else torch.add
    offset = torch.arange(count, device=gram.device) * width
    table = gram.view(count * width, width)
    picks = torch.empty(budget, count, dtype=torch.int64, device=gram.device)
    picks[0] = first
    running = table.index_select(0, first + offset)
    row = torch.empty_like(running)
    for pick in picks.unbind(0)[1:]:
        torch.argmin(running, dim=1, out=pick)
        torch.index_select(table, 0, pick if count == 1 else pick + offset, out=row)
        combine(running, row, out=running)
    return picks.T


def _without_gram(
    rows: Tensor, budget: int, objective: Objective, start: Tensor | None, weight: Tensor | None
) -> Tensor:
    """[budget] picks of one problem; the similarities of a pick are computed when it is made."""
    combine = torch.maximum if objective == "maxmin" else torch.add
    picks = torch.empty(budget, 1, dtype=torch.int64, device=rows.device)
    picks[0] = most_isolated(rows, weight) if start is None else start
    running = rows.new_full(rows.shape[:1], -torch.inf if objective == "maxmin" else 0.0)
    for step in range(1, budget):
        row = weighed(torch.mv(rows, rows.index_select(0, picks[step - 1])[0]), weight)
        combine(running, row, out=running)
        running.index_fill_(0, picks[step - 1], torch.inf)
        torch.argmin(running, dim=0, keepdim=True, out=picks[step])
    return picks[:, 0]


def most_isolated(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """Index of the row whose nearest neighbour but itself is least similar (weighed), a block of rows at a time."""
    n = rows.shape[0]
    step = max(1, BLOCK_BYTES // (4 * n))
    nearest = []
    for start in range(0, n, step):
        with full_precision(rows.device):
            block = rows[start : start + step] @ rows.T
        block.diagonal(start).fill_(-torch.inf)
        nearest.append(block.amax(dim=1))
    return weighed(torch.cat(nearest), weight).argmin()


def _in_blocks(rows: Tensor, budget: int, objective: Objective, start: Tensor | None, weight: Tensor | None) -> Tensor:
    """[budget] picks of one problem on the CPU."""
    combine = torch.maximum if objective == "maxmin" else torch.add
    running = rows.new_full(rows.shape[:1], -torch.inf if objective == "maxmin" else 0.0)
    picks: list[int] = []
    most = FEWEST
    with full_precision(rows.device):
        guessed = (first_in_blocks(rows, weight) if start is None else start).view(1)
        while True:
            table, kept = weighed(rows.index_select(0, guessed) @ rows.T, weight), len(picks)
            for pick, row in zip(guessed.tolist(), table):
                # The first is never wrong, so that there is progress also where NaN compares with nothing.
                if len(picks) > kept and int(running.argmin()) != pick:
                    break
                picks.append(pick)
                combine(running, row, out=running)
                running[pick] = torch.inf
            if len(picks) == budget:
                return torch.tensor(picks)
            if kept:
                most = min(MOST, max(FEWEST, 2 * (len(picks) - kept)))
            guessed = _guess(rows, running, min(most, budget - len(picks)), objective, weight)


def _guess(rows: Tensor, running: Tensor, most: int, objective: Objective, weight: Tensor | None) -> Tensor:
    """[h] the next picks, 1 <= h <= most, if only the rows of the lowest running scores [N] were there."""
    lowest = running.sort(stable=True)  # ties go to the lower index
    width = min(len(rows), 4 * MOST, max(4 * most, len(rows) // 32))
    at = lowest.indices[:width].sort().values
    some, score = rows.index_select(0, at), running.index_select(0, at)
    some_weight = None if weight is None else weight.index_select(0, at)
    table = weighed(fill_gram(some, some.new_empty(width, width)), some_weight)
    table.diagonal().fill_(torch.inf)
    combine = torch.maximum if objective == "maxmin" else torch.add
    found: list[int] = []
    # The nearest picks only come nearer: a row that is not looked at is not picked before one below its score.
    bound = lowest.values[width].item() if objective == "maxmin" and width < len(rows) else torch.inf
    while len(found) < most:
        value, pick = score.min(0)
        if found and value > bound:
            break
        found.append(int(pick))
        combine(score, table[found[-1]], out=score)
    return at[found]


def first_in_blocks(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """As `most_isolated`, but only until it is certain: each pair of rows is compared about once at most.

    The rows that look most isolated are compared with all others first. That also tells the others how near these
    rows are to them, so that soon none can be more isolated than the best one found. `looks` holds the similarity of
    each to its nearest neighbour as far as known: a row that looks less isolated than the best one is less isolated.
    """
    if weight is not None and weight.min() < 0:  # what has a near neighbour counts as farther then
        return most_isolated(rows, weight)
    best, where = torch.inf, 0
    left, looks = torch.arange(len(rows)), rows.new_full(rows.shape[:1], -torch.inf)
    done = torch.zeros_like(left, dtype=torch.bool)
    while True:
        if 4 * int(done.sum()) >= len(left):
            left, looks, rows = left[~done], looks[~done], rows[~done]
            weight, done = None if weight is None else weight[~done], done[~done]
        score = weighed(looks, weight).masked_fill(done, torch.inf)
        some = score.sort(stable=True).indices[: min(MOST, max(16, len(left) // 64))]
        if not len(left) or not (score[some[0]].item(), int(left[some[0]])) < (best, where):
            return torch.tensor(where)
        product = rows.index_select(0, some) @ rows.T
        product.scatter_(1, some[:, None], -torch.inf)
        torch.maximum(looks, product.amax(0), out=looks)
        near = torch.maximum(looks[some], product.amax(1))
        own = weighed(near, None if weight is None else weight[some]).tolist()
        best, where = min([(best, where), *zip(own, left[some].tolist())])
        done[some] = True
