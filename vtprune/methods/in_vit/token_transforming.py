"""Token Transforming: X' = W X, where an old token may feed several new ones; a framework with a rule of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.reduction import Reads, Reducer, Reduction, Tokens, keep_best
from ...registry import register_own as register


@register("token_transforming", paper="https://arxiv.org/abs/2506.05709", seam="in_vit")
@dataclass(frozen=True)
class TokenTransforming(Reducer):
    """Experimental, not the published rule, of which neither code nor formulas were found: the many-to-many form.

    Anchors are the tokens of highest attention (CLS row, else received); every token is shared out over them by
    exp(cos / temperature) of its mean keys, shares below `threshold` of its largest one are dropped, the anchor's own
    token goes to itself alone. New tokens are means weighted by share times size, new sizes the sum of these, so the
    total is kept. One anchor per token is merging, threshold 1 nearest-anchor merging; `pruning` and `merging` give W
    of the other two kinds.
    """

    reads: ClassVar[tuple[Reads, ...]] = ("attention", "mean_keys")
    temperature: float = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: choose a number above 0")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: a share from 0 to 1")

    @property
    def weighs(self) -> bool:
        return True

    def reduce(self, t: Tokens, left: int) -> Reduction:
        index = keep_best(t, t.read("attention")[:, t.prefix :], left).index
        unit = torch.nn.functional.normalize(t.read("mean_keys"), dim=-1)
        anchors = unit.gather(1, index[:, t.prefix :, None].expand(-1, -1, unit.shape[-1]))
        share = ((anchors @ unit.transpose(-1, -2) - 1) / self.temperature).softmax(1)  # [B, left, N], columns sum to 1
        share = share.where(share >= self.threshold * share.amax(1, keepdim=True), 0)
        share = torch.cat([share.new_zeros(*index.shape[:1], t.prefix, share.shape[2]), share], 1)
        own = torch.zeros_like(share).scatter_(2, index[..., None], 1.0)
        share = torch.where(own.any(1, keepdim=True), own, share)
        share = share / share.sum(1, keepdim=True)
        return weighted(index, share, t.sizes())


def weighted(index: Tensor, share: Tensor, size: Tensor) -> Reduction:
    """share [B, M, N] with columns that sum to 1, size [B, N]: rows of W by share times size, masses their sums."""
    mass = share * size[:, None]
    total = mass.sum(-1)
    return Reduction(index, matrix=mass / total[..., None], mass=total)


def dense(step: Reduction, n: int) -> Tensor:
    """The matrix W [B, M, n] of a step on n rows, for those who call it as a function; see `Reduction.dense`."""
    return step.dense(n)
