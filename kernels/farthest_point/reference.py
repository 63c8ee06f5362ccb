"""Farthest point selection in plain torch: O(k N) after the Gram matrix, or O(k N D) without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..checks import check_finite

Objective = Literal["maxmin", "maxsum"]
Memory = Literal["auto", "fast", "low"]

GRAM_BYTES = 1 << 30  # memory="auto" keeps all Gram matrices held at one time below this
BLOCK_BYTES = 1 << 25
GRAM_BLOCK = 384  # rows per product: skips most of the lower half and still keeps the BLAS busy


@torch.no_grad()
def farthest_point(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    objective: Objective = "maxmin",
    first: Sequence[int | Tensor] | None = None,
    memory: Memory = "auto",
) -> list[Tensor]:
    """Pick budgets[i] rows of features[i] greedily, each as unlike the rows picked before as possible.

    features: one [N_i, D_i] tensor per problem, any float dtype, all on one device. Rows are compared by
        cosine similarity in float32; a zero row has similarity 0 to everything.
    budgets: picks per problem, 1 <= budgets[i] <= N_i.
    objective: "maxmin" takes the row whose nearest picked row is farthest (k-center; DivPrune,
        https://arxiv.org/abs/2503.02175); "maxsum" the row with the smallest summed similarity to the picked
        ones (ToDRE, https://arxiv.org/abs/2505.18757).
    first: first pick per problem, an int or a 0-d tensor (never read on the host, so not checked either).
        None: the row whose nearest neighbour is farthest.
    memory: "fast" holds an N x N float32 Gram matrix per problem; "low" never does and computes one row per
        pick; "auto" is "fast" up to 1 GiB per problem.
    Returns one int64 tensor [budgets[i]] per problem: distinct indices in pick order. Ties go to the lower
    index. A batch gives what its problems give one by one. The loop never waits for the device.
    Raises ValueError for NaN or Inf features, and for budgets, first picks or options out of range.
    """
    _check(features, budgets, objective, first, memory)
    rows = _unit_rows(features)
    starts: list[Tensor | None] = [None] * len(rows)
    if first is not None:
        starts = [torch.as_tensor(index, device=unit.device) for index, unit in zip(first, rows)]
    picks: dict[int, Tensor] = {}
    with_gram: list[int] = []
    for i, unit in enumerate(rows):
        if memory == "low" or (memory == "auto" and 4 * unit.shape[0] ** 2 > GRAM_BYTES):
            picks[i] = _without_gram(unit, budgets[i], objective, starts[i])
        else:
            with_gram.append(i)
    for group in _groups(with_gram, [unit.shape[0] for unit in rows]):
        longest = max(budgets[i] for i in group)
        picked = _with_gram([rows[i] for i in group], longest, objective, [starts[i] for i in group])
        picks.update({i: order[: budgets[i]] for i, order in zip(group, picked)})
    return [picks[i] for i in range(len(rows))]


def _check(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    objective: str,
    first: Sequence[int | Tensor] | None,
    memory: str,
) -> None:
    if objective not in ("maxmin", "maxsum"):
        raise ValueError(f"objective={objective!r}: choose 'maxmin' or 'maxsum'")
    if memory not in ("auto", "fast", "low"):
        raise ValueError(f"memory={memory!r}: choose 'auto', 'fast' or 'low'")
    if len(budgets) != len(features) or (first is not None and len(first) != len(features)):
        raise ValueError(
            f"{len(features)} feature tensors need as many budgets and first picks, "
            f"got {len(budgets)} and {'none' if first is None else len(first)}"
        )
    for i, (unit, budget) in enumerate(zip(features, budgets)):
        if unit.dim() != 2 or not unit.is_floating_point():
            raise ValueError(f"features[{i}] is {unit.dtype} {tuple(unit.shape)}: expected a float tensor [N, D]")
        if not 1 <= budget <= unit.shape[0]:
            raise ValueError(f"budgets[{i}]={budget}: choose 1..{unit.shape[0]}, the number of rows of features[{i}]")
        start = 0 if first is None else first[i]
        if isinstance(start, int) and not 0 <= start < unit.shape[0]:
            raise ValueError(f"first[{i}]={start}: choose 0..{unit.shape[0] - 1}")


def _unit_rows(features: Sequence[Tensor]) -> list[Tensor]:
    """Float32 rows of length 1; zero rows stay zero."""
    rows = [x.float() for x in features]
    # Dividing by the largest entry first keeps the squares of very large and very small rows in range.
    largest = [x.abs().amax(dim=1, keepdim=True) for x in rows]
    check_finite(largest, "feature rows")
    tiny = torch.finfo(torch.float32).tiny
    return [torch.nn.functional.normalize(x / top.clamp_min(tiny), dim=1) for x, top in zip(rows, largest)]


def _groups(members: list[int], sizes: list[int]) -> list[list[int]]:
    """Problems that share one loop: similar sizes together, padded Gram matrices within GRAM_BYTES."""
    groups: list[list[int]] = []
    for i in sorted(members, key=lambda i: -sizes[i]):
        widest = sizes[groups[-1][0]] if groups else 0
        if groups and 4 * widest**2 * (len(groups[-1]) + 1) <= GRAM_BYTES:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _with_gram(rows: Sequence[Tensor], budget: int, objective: Objective, starts: Sequence[Tensor | None]) -> Tensor:
    """[B, budget] picks; the tail of a problem with fewer rows than that is meaningless."""
    width = max(r.shape[0] for r in rows)
    gram = rows[0].new_empty(len(rows), width, width)
    chosen: list[Tensor] = []
    for table, unit, start in zip(gram, rows, starts):
        n = unit.shape[0]
        table[:, n:] = torch.inf
        own = fill_gram(unit, table[:n, :n])
        if start is None:
            own.diagonal().fill_(-torch.inf)
            start = own.amax(dim=1).argmin()
        own.diagonal().fill_(torch.inf)
        chosen.append(start)
    return greedy(gram, torch.stack(chosen), budget, objective)


def fill_gram(rows: Tensor, out: Tensor) -> Tensor:
    """Write rows @ rows.T into out [N, N]: upper blocks are multiplied, lower ones copied.

    One problem at a time, because a batched product may round differently and so break ties differently.
    """
    n = rows.shape[0]
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


def _without_gram(rows: Tensor, budget: int, objective: Objective, start: Tensor | None) -> Tensor:
    """[budget] picks of one problem; the similarities of a pick are computed when it is made."""
    combine = torch.maximum if objective == "maxmin" else torch.add
    picks = torch.empty(budget, 1, dtype=torch.int64, device=rows.device)
    picks[0] = most_isolated(rows) if start is None else start
    running = rows.new_full(rows.shape[:1], -torch.inf if objective == "maxmin" else 0.0)
    for step in range(1, budget):
        row = torch.mv(rows, rows.index_select(0, picks[step - 1])[0])
        combine(running, row, out=running)
        running.index_fill_(0, picks[step - 1], torch.inf)
        torch.argmin(running, dim=0, keepdim=True, out=picks[step])
    return picks[:, 0]


def most_isolated(rows: Tensor) -> Tensor:
    """Index of the row whose nearest neighbour but itself is least similar, a block of rows at a time."""
    n = rows.shape[0]
    step = max(1, BLOCK_BYTES // (4 * n))
    nearest = []
    for start in range(0, n, step):
        block = rows[start : start + step] @ rows.T
        block.diagonal(start).fill_(-torch.inf)
        nearest.append(block.amax(dim=1))
    return torch.cat(nearest).argmin()
