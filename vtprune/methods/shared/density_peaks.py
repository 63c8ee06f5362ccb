"""Clusters around density peaks with nearest neighbours (DPC-kNN), without the usual noise."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres [count] of x [N, D] float32, best first, and the cluster [N] each row belongs to, 0..count - 1.

    A row is dense if its `count` nearest (itself among them) are near, in distances over sqrt(D). O(N^2) memory.
    """
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    score = peaks(far, torch.ones(len(x), dtype=torch.bool, device=x.device), count, count)
    centres = score.sort(descending=True, stable=True).indices[:count]
    member = far.index_select(1, centres).argmin(1)
    return centres, member.index_copy(0, centres, torch.arange(count, device=x.device))


def peaks(far: Tensor, real: Tensor, nearest: Tensor | int, most: int) -> Tensor:
    """[..., M] logarithms of density times distance to the nearest denser row, -inf for rows that are not real.

    far: [..., M, M] distances. real: [..., M] bool. nearest: [...] neighbours that make the density, 1..most and not
    more than there are real rows. Among equally dense rows the first counts as denser; logarithms keep rows apart where
    exp(-distance) would be 0 for all.
    """
    m = far.shape[-1]
    nearest = torch.as_tensor(nearest, device=far.device)[..., None, None] if isinstance(nearest, Tensor) else nearest
    near = far.masked_fill(~real[..., None, :], torch.inf).topk(min(most, m), dim=-1, largest=False).values.square()
    near = near.masked_fill(torch.arange(near.shape[-1], device=far.device) >= nearest, 0).sum(-1)
    density = -near / (nearest[..., 0] if isinstance(nearest, Tensor) else nearest)
    density = density.masked_fill(~real, -torch.inf)
    place = torch.arange(m, device=far.device)
    denser = (density[..., None, :] > density[..., :, None]) | (
        (density[..., None, :] == density[..., :, None]) & (place < place[:, None])
    )
    pairs = real[..., None, :] & real[..., :, None]
    farthest = far.masked_fill(~pairs, 0).amax((-2, -1))[..., None]
    reach = far.masked_fill(~(denser & pairs), torch.inf).amin(-1).minimum(farthest)
    # A copy of a denser row, and a row that is alone, score least, but above what is not real.
    return (density + reach.log()).clamp(min=torch.finfo(far.dtype).min).masked_fill(~real, -torch.inf)


def clusters(x: Tensor, real: Tensor, counts: Tensor, nearest: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Many sets at once: which rows are centres [G, M] bool, and the centre [G, M] int64 that each row goes to.

    x: [G, M, D] float32. real: [G, M] bool. counts: [G] int64, centres of each set, at most its real rows. Densities
    are over nearest [G] neighbours, 1..most. Distances go through the Gram matrix of the centred rows.
    """
    size = real.sum(1).clamp(min=1)[:, None, None]
    x = (x - (x * real[..., None]).sum(1, keepdim=True) / size) * real[..., None]
    square = x.square().sum(-1)
    gram = x @ x.mT
    # A product need not be symmetric to the last bit, and tokens that are each other's nearest are equally dense.
    far = (square[:, :, None] + square[:, None, :] - (gram + gram.mT)).clamp(min=0)
    far.diagonal(dim1=1, dim2=2).zero_()
    far = (far / x.shape[2]).sqrt()
    order = peaks(far, real, nearest, most).argsort(dim=1, descending=True, stable=True)
    centre = (order.argsort(dim=1) < counts[:, None]) & real
    member = far.masked_fill(~centre[:, None, :], torch.inf).argmin(-1)
    return centre, torch.where(centre, torch.arange(x.shape[1], device=x.device), member)


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
