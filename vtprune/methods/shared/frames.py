"""Tokens of the frames of a clip, [T, P]: how alike they are, how they rank, and what flows from one into another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from ...core.visual import Assignment


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of rows, [..., D] -> [...]; zero rows are like nothing."""
    along: Tensor = vecdot(a, b)
    return along / (norms(a) * norms(b))


def norms(x: Tensor) -> Tensor:
    """Lengths of rows, [..., D] -> [...], above 0 so that one can divide by them, which needs no copy of the rows."""
    length: Tensor = vector_norm(x, dim=-1)
    return length.clamp(min=1e-12)


def ranks_in_rows(scores: Tensor) -> Tensor:
    """[T, P] int64: the rank of each score in its row, 0 for the highest, the lower index first among equals."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def places(mask: Tensor, count: int) -> Tensor:
    """Flat positions, ascending, of the `count` True entries of a mask; the count known, nobody waits for it."""
    return (~mask).flatten().to(torch.int8).sort(stable=True).indices[:count].sort().values


def flow(kept: Tensor, used: Tensor, to: Tensor, w: Tensor, scores: Tensor | None, k: int, e: int) -> Assignment:
    """Tokens of a clip that stay, and what flows into them; of the counts k and e the host must know.

    kept: [T, P] bool, k tokens that stay. used: [T, P] bool, e tokens that flow. to: [T, P] int64, the kept token, as a
    flat place, that each flows into. w: [T, P] float32, its weight.
    """
    idx, src = places(kept, k), places(used, e)
    row = kept.flatten().cumsum(0) - 1
    flat = None if scores is None else scores.flatten()
    return Assignment(idx, None, src, row[to.flatten()[src]], w.flatten()[src], flat)


def evenly_shared(total: int, parts: int, device: torch.device) -> Tensor:
    """[parts] int64 on the device: `total` in shares that differ by at most one, the larger ones spaced evenly."""
    edges = torch.arange(parts + 1, device=device) * total // max(1, parts)
    return edges.diff()
