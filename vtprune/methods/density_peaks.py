"""Clusters around density peaks with nearest neighbours (DPC-kNN), without the usual noise."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres [count] of x [N, D] float32, best first, and the cluster [N] each row belongs to, 0..count - 1.

    A row is dense if its `count` nearest (itself among them) are near, in distances over sqrt(D); centres are the rows
    of highest density times distance to the nearest denser row. Among equally dense rows the first counts as denser;
    logarithms keep rows apart where exp(-distance) would be 0 for all. O(N^2) memory.
    """
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = -far.topk(count, dim=1, largest=False).values.square().mean(1)  # its logarithm
    place = torch.arange(len(x), device=x.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (place < place[:, None]))
    reach = far.masked_fill(~denser, torch.inf).amin(1).minimum(far.max())
    centres = (density + reach.log()).sort(descending=True, stable=True).indices[:count]
    member = far.index_select(1, centres).argmin(1)
    return centres, member.index_copy(0, centres, torch.arange(count, device=x.device))
