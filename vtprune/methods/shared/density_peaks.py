"""Clusters around density peaks with nearest neighbours (DPC-kNN), without the usual noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 128  # of a matrix of distances that are made and searched together on a CPU, and
CACHED = 1 << 22  # elements of the sets looked at together there: what stays in its cache
FAR = 1e30  # more than any squared distance


def density_peaks(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres [count] of x [N, D] float32, best first, and the cluster [N] each row belongs to, 0..count - 1.

    A row is dense if its `count` nearest (itself among them) are near, in distances over sqrt(D). O(N^2) memory.
    """
    real = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    far = distances(x[None], real)
    centres = peaks(far, real, torch.full((1,), count, device=x.device), count, x.shape[1])[0, :count]
    member = far[0].index_select(1, centres).argmin(1)
    return centres, member.index_copy(0, centres, torch.arange(count, device=x.device))


def distances(x: Tensor, real: Tensor) -> Tensor:
    """Squared distances [G, M, M] of the rows of x [G, M, D] float32, Inf where one of two rows is not real [G, M].

    They go through the products of the centred rows, of which half are computed and mirrored.
    """
    x, m, weight = x.detach(), x.shape[1], real.float()  # places have no gradient
    x = x - (weight / weight.sum(1, keepdim=True).clamp(min=1))[:, None] @ x
    square = torch.linalg.vector_norm(x, dim=-1).square().masked_fill(~real, torch.inf)
    far, rows = x.new_empty(*real.shape, m), _rows(x)
    for a in range(0, m, rows):
        b = min(a + rows, m)
        part = torch.baddbmm(square[:, None, a:], x[:, a:b], x[:, a:].mT, alpha=-2)
        torch.add(part, square[:, a:b, None], out=far[:, a:b, a:]).clamp_(min=0)
        # A product need not be symmetric to the last bit, and tokens that are each other's nearest are equally dense.
        own = far[:, a:b, a:b]
        own.copy_((own + own.mT) / 2)
        far[:, b:, a:b] = far[:, a:b, b:].mT
    far.diagonal(dim1=1, dim2=2).copy_(torch.zeros_like(square).masked_fill(~real, torch.inf))
    return far


def peaks(far: Tensor, real: Tensor, nearest: Tensor, most: int, width: int) -> Tensor:
    """[G, M] int64: the rows of every set by density times distance to the nearest denser row, best first.

    far: [G, M, M] squared distances of rows of `width` channels. real: [G, M] bool; the others come last. nearest: [G]
    neighbours that make the density, 1..most and not more than there are real rows. Among equally dense rows the first
    counts as denser, and the densest of all is the best. Logarithms keep rows apart where exp(-distance) would be 0.
    """
    m, rows = far.shape[1], _rows(far)
    near = far.topk(min(most, m), dim=-1, largest=False).values
    near = near.masked_fill(torch.arange(near.shape[-1], device=far.device) >= nearest[:, None, None], 0).sum(-1)
    density = -near / (nearest[:, None] * width)
    # Rows are numbered by falling density, FAR apart. A number less that of a row is then below 0 for a denser row and
    # beyond every distance for the others, and the larger of that and the distance needs no mask of pairs.
    place = density.argsort(dim=1, descending=True, stable=True).argsort(dim=1) * FAR
    reach = torch.empty_like(density)
    for a in range(0, m, rows):
        behind = place[:, None, :] - (place[:, a : a + rows, None] - FAR / 2)
        torch.amin(torch.maximum(far[:, a : a + rows], behind, out=behind), -1, out=reach[:, a : a + rows])
    # A copy of a denser row scores least, but above what is not real.
    score = (density + reach.log() / 2).clamp(min=torch.finfo(far.dtype).min).masked_fill(~real, -torch.inf)
    return score.argsort(dim=1, descending=True, stable=True)


def centres(x: Tensor, real: Tensor, counts: Tensor, nearest: Tensor, most: int) -> Tensor:
    """Many sets at once: which rows [G, M] bool are centres, counts [G] int64 of each set, at most its real rows.

    x: [G, M, D] float32. real: [G, M] bool. Densities are over nearest [G] neighbours, 1..most.
    """
    return torch.cat([centre for _, centre in _searched(x, real, counts, nearest, most)])


def clusters(x: Tensor, real: Tensor, counts: Tensor, nearest: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """As `centres`, and the centre [G, M] int64 that each real row goes to."""
    found = []
    for far, centre in _searched(x, real, counts, nearest, most):
        far += torch.zeros_like(far[:, 0]).masked_fill(~centre, torch.inf)[:, None]
        found.append((centre, far.argmin(-1)))
    centre, member = (torch.cat(part) for part in zip(*found))
    return centre, torch.where(centre, torch.arange(x.shape[1], device=x.device), member)


def _searched(x: Tensor, real: Tensor, counts: Tensor, nearest: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The distances within some of the sets at a time, and which of their rows are centres."""
    m, d = x.shape[1:]
    sets = CACHED // (m * max(m, d)) if x.is_cpu else len(x)
    for some in zip(*(t.split(max(1, sets)) for t in (x, real, counts, nearest))):
        far = distances(*some[:2])
        order = peaks(far, some[1], some[3], most, d)
        yield far, (order.argsort(dim=1) < some[2][:, None]) & some[1]


def _rows(x: Tensor) -> int:
    return ROWS if x.is_cpu else x.shape[1]


def cluster_weights(centre: Tensor, member: Tensor, real: Tensor, beta: float | None) -> Tensor:
    """[G, M] float32: the weight of each row in what its cluster is merged into, of `clusters` as answered for `real`.

    beta: of the centre, the others share the rest evenly; a centre alone weighs 1. None: all weigh the same.
    """
    joins = (real & ~centre).float()
    others = torch.zeros_like(joins).scatter_add(1, member, joins)
    if beta is None:
        return (1 / (others + 1)).gather(1, member)
    own = torch.where(others > 0, beta, 1.0)
    return torch.where(centre, own, ((1 - beta) / others.clamp(min=1)).gather(1, member))
