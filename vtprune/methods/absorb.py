"""Merging into few centres: each takes in its nearest tokens, and one more token gathers all that are no centre."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.visual import Assignment

CELLS = 2**24  # likenesses held at once


def absorb(
    order: Tensor, rest: Tensor, scores: Tensor, keys: Tensor, bias: Tensor, places: Tensor, seats: int, most: int
) -> Assignment:
    """Keep the tokens `order` [K] of N; the last `places` of them, of which the very last gathers, take in the rest.

    The tokens of `rest` [N] bool that are most like a centre, by keys[centre] . keys[j] + bias[j], `most` of them or
    all others of the rest, are added to it, each weighted by scores [N]; tokens may go to several centres, and centres
    into each other. The gathering token becomes the weighted sum of the rest without the centres, itself included.

    keys: [N, C]. bias: [N]. places: [] int64 on the device, 0 (nothing is merged) .. `seats`, which the host knows.
    """
    idx, came = order.sort()
    if not seats:
        return Assignment(idx, order, scores=scores)
    total, n = len(order), len(rest)
    row, turn, index = came.argsort(), torch.arange(total, device=rest.device), torch.arange(n, device=rest.device)
    centres, rows = order[total - seats : -1], row[total - seats : -1]
    taken = torch.cat([_nearest(some, rest, keys, bias)[:, :most] for some in centres.split(max(1, CELLS // n))])
    merging = turn >= total - places  # only as many seats as there are places; the others are kept as they are
    others = rest[taken] & (taken != centres[:, None])
    weight = scores[taken] * others * merging[total - seats : -1, None]
    loose = rest.index_fill(0, order[:-1], False) & (places > 0)
    last = merging & (turn == total - 1)
    return Assignment(
        idx,
        order,
        src=torch.cat([order, taken.flatten(), index]),
        dst=torch.cat([row, rows.repeat_interleave(taken.shape[1]), row[-1:].expand(n)]),
        w=torch.cat([(~last).float(), weight.flatten(), scores * loose]),
        scores=scores,
    )


def _nearest(centres: Tensor, rest: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """[c, N]: all tokens by their likeness to each centre, the others of the rest first."""
    others = rest & (torch.arange(len(rest), device=rest.device) != centres[:, None])
    likeness = (keys[centres] @ keys.mT + bias).masked_fill(~others, -torch.inf)
    return likeness.argsort(dim=1, descending=True, stable=True)
