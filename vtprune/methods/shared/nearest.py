"""Which of the tokens that stay each dropped token is most like."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # dropped tokens compared with the kept ones at a time


def nearest(unit: Tensor, idx: Tensor, rest: Tensor) -> Tensor:
    """For each token of rest, the place in idx of the kept token with the largest dot product.

    unit: [N, D] rows of length one. idx: [K], rest: [M] int64 -> [M] int64 in 0..K - 1.

    >>> nearest(torch.eye(2)[torch.tensor([0, 1, 0, 1])], torch.tensor([1, 2]), torch.tensor([0, 3]))
    tensor([1, 0])
    """
    kept = unit[idx].T
    return torch.cat([rest[:0], *((unit[some] @ kept).argmax(1) for some in rest.split(BLOCK) if len(some))])
