"""Which of the tokens that stay each dropped token is most like, and which tokens are most like a centre."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import best_few

BLOCK = 256  # dropped tokens compared with the kept ones at a time
CELLS = 2**22  # likenesses of centres to all tokens held at a time


def nearest(unit: Tensor, idx: Tensor, rest: Tensor) -> Tensor:
    """For each token of rest, the place in idx of the kept token with the largest dot product.

    unit: [N, D] rows of length one. idx: [K], rest: [M] int64 -> [M] int64 in 0..K - 1.

    >>> nearest(torch.eye(2)[torch.tensor([0, 1, 0, 1])], torch.tensor([1, 2]), torch.tensor([0, 3]))
    tensor([1, 0])
    """
    kept = unit[idx].T
    return torch.cat([rest[:0], *((unit[some] @ kept).argmax(1) for some in rest.split(BLOCK) if len(some))])


def likest(
    keys: Tensor, centres: Tensor, few: int, *, among: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """[K, few] int64: the tokens most like each of the centres [K], by keys[centre] . keys[j] + bias[j], best first.

    keys: [N, C]. among: [N] bool, the tokens that come before all others. bias: [N]. A centre itself comes last, with
    the tokens that are not among these.
    """
    found = [centres.new_empty(0, few)]
    for some in centres.split(max(1, CELLS // len(keys))):
        likeness = keys[some] @ keys.mT
        if bias is not None:
            likeness += bias
        if among is not None:
            likeness.masked_fill_(~among, -torch.inf)
        found.append(best_few(likeness.scatter_(1, some[:, None], -torch.inf), few))
    return torch.cat(found)
