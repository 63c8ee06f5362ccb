"""Merging into few centres: each takes in its nearest tokens, and one more token gathers all that are no centre."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.visual import Assignment
from .nearest import likest


def merge_into_anchors(
    anchors: Tensor,
    candidates: Tensor,
    scores: Tensor,
    keys: Tensor,
    bias: Tensor,
    n_merge_anchors: Tensor,
    max_merge_anchors: int,
    per_anchor: int,
) -> Assignment:
    """Keep the tokens `anchors` [K] of N, and let the last of them take in the candidates.

    1. The first K - n_merge_anchors of the anchors stay as they are. The others are merge anchors: all of them but the
       very last are centres, and the very last gathers.
    2. To each centre are added those `per_anchor` candidates (or all of them, if there are fewer) that are most like
       it, by keys[centre] . keys[j] + bias[j], each times its score. A candidate may go to several centres, and one
       centre into another.
    3. The gathering token becomes the sum of all candidates that are no centre, itself included, times their scores.

    candidates: [N] bool. scores, bias: [N] float32. keys: [N, C] float32. n_merge_anchors: [] int64 on the device, from
    0 (nothing is merged) to `max_merge_anchors`, which the host knows.
    """
    idx, came = anchors.sort()
    if not max_merge_anchors:
        return Assignment(idx, anchors, scores=scores)
    total, n, device = len(anchors), len(candidates), candidates.device
    row, turn, index = came.argsort(), torch.arange(total, device=device), torch.arange(n, device=device)
    centres, rows = anchors[total - max_merge_anchors : -1], row[total - max_merge_anchors : -1]
    taken = likest(keys, centres, min(per_anchor, n), among=candidates, bias=bias)
    merging = turn >= total - n_merge_anchors  # the host makes room for the most there can be; the others stay whole
    others = candidates[taken] & (taken != centres[:, None])
    weight = scores[taken] * others * merging[total - max_merge_anchors : -1, None]
    loose = candidates.index_fill(0, anchors[:-1], False) & (n_merge_anchors > 0)
    last = merging & (turn == total - 1)
    return Assignment(
        idx,
        anchors,
        src=torch.cat([anchors, taken.flatten(), index]),
        dst=torch.cat([row, rows.repeat_interleave(taken.shape[1]), row[-1:].expand(n)]),
        w=torch.cat([(~last).float(), weight.flatten(), scores * loose]),
        scores=scores,
    )
