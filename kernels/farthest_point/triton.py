"""Farthest point selection in Triton: one program picks all tokens of a problem, many programs prepare its matrix.

With the Gram matrix, a batch takes one launch for its greedy loops, whatever its sizes, and three per distinct size:
rows to norms, the product by cuBLAS, products to cosines. Without it, every pick is one launch over all rows.
Nothing is read back and the shapes alone decide what is launched, so that a CUDA graph can record all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..host import check, not_finite
from . import reference
from .programs import cosines as _cosines
from .programs import greedy as _greedy
from .programs import measure as _measure
from .programs import step as _step
from .reference import Memory, Objective

TILE_ROWS, TILE_COLS = 4, 1024
STEP_ROWS, STEP_COLS = 64, 128
ALIGN = 16  # half precision problems are padded to this many rows: cuBLAS is slow on unaligned matrices


class Run(NamedTuple):
    """Problems of one shape and dtype, prepared: cosine of rows i and j = rows[i] . rows[j] * inverse[i] * inverse[j].

    members: positions in the batch. rows: [units, padded, D] raw half precision (bfloat16 scaled by powers of two) or
    unit rows in float32; inverse: [units, padded] float32; largest: [units, N], not finite where a row is not.
    """

    members: list[int]
    rows: Tensor
    inverse: Tensor
    largest: Tensor


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
    """As `vtprune.kernels.farthest_point`, by Triton; see there.

    float16 and bfloat16 rows are multiplied as they are (exact products, summed in float32) and divided by their
    lengths afterwards. A first pick given as a tensor is brought into range. With memory="fast" at most MAX_ROWS rows.
    """
    reference.check_arguments(features, budgets, objective, first, memory, weights)
    sizes = [x.shape[0] for x in features]
    low = [i for i, n in enumerate(sizes) if reference.without_gram(n, memory)]
    fast = reference.groups([i for i, n in enumerate(sizes) if not reference.without_gram(n, memory)], sizes)
    launches = [(group, _with_gram) for group in fast] + [(same, _without_gram) for same in _alike(low, features)]
    runs: list[Run] = []
    picks: dict[int, Tensor] = {}
    for members, form in launches:
        with torch.cuda.device_of(features[members[0]]):
            prepared = [_prepare(same, features) for same in _alike(members, features)]
            order = [i for run in prepared for i in run.members]
            starts = None
            if first is not None:
                given = [reference.first_pick(first[i], features[i]) for i in order]
                starts = torch.stack([index.clamp(0, sizes[i] - 1) for i, index in zip(order, given)])
            scale = None if weights is None else _side_by_side([weights[i] for i in order], prepared)
            table = form(prepared, max(budgets[i] for i in members), objective, starts, scale)
        picks.update({i: row[: budgets[i]] for i, row in zip(order, table)})
        runs += prepared
    _check_finite(runs)
    if weights is not None:
        reference.check_finite([weight.float() for weight in weights], "weights")
    return [picks[i] for i in range(len(sizes))]


def _alike(members: Sequence[int], features: Sequence[Tensor]) -> list[list[int]]:
    """Members of one shape and dtype together."""
    alike: dict[object, list[int]] = {}
    for i in members:
        alike.setdefault((features[i].shape, features[i].dtype), []).append(i)
    return list(alike.values())


def _side_by_side(weights: Sequence[Tensor], runs: Sequence[Run]) -> Tensor:
    """[units, width] float32: the weights of problems in the order of the runs, 0 behind their ends."""
    out = runs[0].inverse.new_zeros(len(weights), max(run.rows.shape[1] for run in runs))
    for row, weight in zip(out, weights):
        row[: len(weight)] = weight
    return out


def _prepare(members: list[int], features: Sequence[Tensor]) -> Run:
    """Rows, inverse lengths and largest entries of problems of one shape and dtype."""
    x = torch.stack([features[i] for i in members]) if len(members) > 1 else features[members[0]][None]
    units, n, d = x.shape
    if x.dtype not in (torch.float16, torch.bfloat16):
        # As the reference does it, so that rows which tie there tie here; one by one also in the product below.
        parts = [reference.unit_rows(unit) for unit in x]
        largest = torch.stack([top[:, 0] for _, top in parts])
        rows = torch.stack([unit for unit, _ in parts]) if units > 1 else parts[0][0][None].contiguous()
        return Run(members, rows, largest.isfinite().float(), largest)
    padded = triton.cdiv(n, ALIGN) * ALIGN
    rows, inverse = x.new_empty(units, padded, d), x.new_empty(units, padded, dtype=torch.float32)
    largest = inverse.new_empty(units, n)
    _measure[(triton.cdiv(padded, TILE_ROWS), units)](
        x,
        rows,
        inverse,
        largest,
        n,
        padded,
        d,
        *x.stride(),
        SCALE=x.dtype == torch.bfloat16,
        ROWS=TILE_ROWS,
        COLS=_block(d, TILE_COLS),
    )
    return Run(members, rows, inverse, largest)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a [units, P, D] times b [units, Q, D] transposed -> [units, P, Q] float32, sums in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[1], dtype=torch.float32)
    with reference.full_precision(a.device):
        for left, right, table in zip(a.float(), b.float(), out):
            torch.mm(left, right.T, out=table)
    return out


def _to_cosines(run: Run, product: Tensor, gram: Tensor, nearest: Tensor, start: int = 0) -> None:
    """Launch `_cosines` for product, rows start.. of the run's products; gram and nearest may be wider than it."""
    units, n = run.largest.shape
    here = min(product.shape[1], n - start)
    _cosines[(triton.cdiv(here, TILE_ROWS), units)](
        product,
        run.inverse,
        gram,
        nearest,
        start,
        here,
        n,
        gram.shape[2],
        *product.stride()[:2],
        *gram.stride()[:2],
        run.inverse.stride(0),
        nearest.stride(0),
        ROWS=TILE_ROWS,
        COLS=_block(gram.shape[2], TILE_COLS),
    )


def _with_gram(
    runs: Sequence[Run], budget: int, objective: Objective, starts: Tensor | None, weights: Tensor | None
) -> Tensor:
    """[units, budget] picks; the tail of a problem with fewer rows than that is meaningless, but in range."""
    units = sum(len(run.members) for run in runs)
    width = max(run.rows.shape[1] for run in runs)
    nearest = runs[0].inverse.new_full((units, width), torch.inf)
    gram = nearest.new_empty(units, width, width) if len(runs) > 1 else None
    at = 0
    for run in runs:
        product, own = _products(run.rows, run.rows), slice(at, at + len(run.members))
        _to_cosines(run, product, product if gram is None else gram[own], nearest[own])
        at = own.stop
    table = product if gram is None else gram
    picks = torch.empty(units, budget, dtype=torch.int64, device=table.device)
    block = _block(width)
    _greedy[(units,)](
        table,
        nearest,
        nearest if starts is None else starts,
        nearest if weights is None else weights,
        picks,
        budget,
        width,
        *table.stride()[:2],
        GIVEN=starts is not None,
        WEIGHED=weights is not None,
        MAXMIN=objective == "maxmin",
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return picks


def _without_gram(
    runs: Sequence[Run], budget: int, objective: Objective, starts: Tensor | None, weights: Tensor | None
) -> Tensor:
    """[units, budget] picks of one run, one launch per pick."""
    (run,) = runs
    units, padded, d = run.rows.shape
    n = run.largest.shape[1]
    parts = triton.cdiv(n, STEP_ROWS)
    maxmin = objective == "maxmin"
    running = run.inverse.new_full((units, padded), -torch.inf if maxmin else 0.0)
    best = running.new_full((2, units, parts), torch.inf)
    where = torch.zeros(2, units, parts, dtype=torch.int64, device=best.device)
    best[1, :, 0] = -torch.inf
    where[1, :, 0] = _most_isolated(run, weights) if starts is None else starts
    picks = torch.empty(units, budget, dtype=torch.int64, device=best.device)
    for step in range(budget):
        _step[(parts, units)](
            run.rows,
            run.inverse,
            running,
            running if weights is None else weights,
            best,
            where,
            picks,
            step,
            budget,
            n,
            padded,
            d,
            parts,
            MAXMIN=maxmin,
            WEIGHED=weights is not None,
            ROWS=STEP_ROWS,
            COLS=STEP_COLS,
            PARTS=_block(parts),
            num_warps=8,
        )
    return picks


def _most_isolated(run: Run, weights: Tensor | None) -> Tensor:
    """[units] index of the row whose nearest other row is least similar (weighed), a block of rows at a time."""
    units, n = run.largest.shape
    padded = run.rows.shape[1]
    nearest = run.inverse.new_empty(units, n)
    rows = max(1, reference.BLOCK_BYTES // (4 * padded * units))
    for start in range(0, n, rows):
        product = _products(run.rows[:, start : start + rows], run.rows)
        _to_cosines(run, product, product, nearest, start)
    return reference.weighed(nearest, None if weights is None else weights[:, :n]).argmin(dim=1)


def _block(size: int, most: int | None = None) -> int:
    """Power of two that covers size, or most."""
    block = max(16, triton.next_power_of_2(size))
    return block if most is None else min(block, most)


def _check_finite(runs: Sequence[Run]) -> None:
    """Raise ValueError, naming unit and row, for NaN or Inf; one flag for the whole batch."""
    largest = {i: top[:, None] for run in runs for i, top in zip(run.members, run.largest)}
    finite = torch.stack([run.largest.isfinite().all() for run in runs]).all()
    check(finite, lambda: not_finite([largest[i] for i in sorted(largest)], "feature rows"))
