"""Local outlier factor of numbers on a line, on their device and without reading anything back."""

from __future__ import annotations

import torch
from torch import Tensor

OUTLIER = 1.5  # scikit-learn's contamination="auto"
EPSILON = 1e-10  # keeps the density of repeated values finite


def outliers(values: Tensor, neighbours: int, among: Tensor | None = None) -> Tensor:
    """Mark the values whose neighbours lie in much denser places than they do: [N] bool.

    The local outlier factor (Breunig et al. 2000, https://doi.org/10.1145/342009.335388) exceeds 1.5. Neighbours are
    exactly `neighbours` others, as in scikit-learn's LocalOutlierFactor; of two that are equally far the smaller value
    counts, so that the answer depends on the values alone and not on their order. Both tails can be marked.

    values: [N], scored in float32. among: [N] bool, which of them take part (None: all); the others are never marked.
    neighbours: at least 1; fewer where fewer others take part, and a value alone is none.

    On a line the nearest k are among k on either side: O(N log N + N k), no N x N distances.

    >>> outliers(torch.tensor([0.0, 9.0, 0.1, 0.2]), 2)
    tensor([False,  True, False, False])
    """
    n = len(values)
    k = min(neighbours, n - 1)
    if k < 1:
        return torch.zeros(n, dtype=torch.bool, device=values.device)
    values = values.float()
    if among is not None:  # the others go to the far end, where no window reaches them
        values = values.masked_fill(~among, torch.inf)
    line, order = values.sort(stable=True)
    size = n if among is None else among.sum()
    steps = torch.arange(1, k + 1, device=values.device)
    rank = torch.arange(n, device=values.device)[:, None]
    at = rank + torch.cat([-steps, steps])
    exists = (at >= 0) & (at < size) & (rank < size)
    away = (line[at.clamp(0, n - 1)] - line[:, None]).abs().masked_fill(~exists, torch.inf)
    away, pick = away.sort(dim=1, stable=True)  # left neighbours stand first: they win a tie
    near, used = at.gather(1, pick)[:, :k].clamp(0, n - 1), exists.gather(1, pick)[:, :k]
    away = away[:, :k].masked_fill(~used, 0.0)
    count = used.sum(1).clamp(min=1)
    reach = away.maximum(away.amax(1)[near]).masked_fill(~used, 0.0)
    density = 1.0 / (reach.sum(1) / count + EPSILON)
    factor = (density[near] / density[:, None]).masked_fill(~used, 0.0).sum(1) / count
    return torch.zeros_like(order, dtype=torch.bool).scatter(0, order, (factor > OUTLIER) & exists.any(1))
