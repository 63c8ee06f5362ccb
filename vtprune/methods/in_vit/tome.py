"""ToMe: in every block the r pairs of most similar tokens become one token each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.reduction import Reads, Reducer, Reduction, Tokens
from ...core.visual import Visual
from ...kernels import best_first
from ...registry import register_own as register
from ..shared.bipartite import together
from .schedule import per_block as per_block


@register("tome", paper="https://arxiv.org/abs/2210.09461", seam="in_vit")
@dataclass(frozen=True)
class ToMe(Reducer):
    """Bipartite soft matching: tokens at even places look for their most similar one at odd places.

    Similarity is the cosine of the mean over heads of this block's keys. The r tokens of the highest similarity are
    merged into their partners by the mean weighted by size; the prefix takes no part. Order matters, as the next block
    splits by it: prefix, what is left of the even places, the odd places. Inside a VLM's tower tokens go back to their
    raster order between blocks.

    r: tokens merged in a block: an int, a pair (r, f) for a schedule that falls (f < 0) or rises (f > 0) linearly with
        the same mean, or a list; at most half of the patches go in a block. None: as `keep` says, evenly.
    proportional: attention adds log size to the logits of a key. Off for MAE models that were not trained with ToMe.
    pooling: mean pooling "weighted" by size, or "plain" as the official code has it (except for MAE).
    """

    reads: ClassVar[tuple[Reads, ...]] = ("mean_keys",)
    r: int | tuple[int, float] | Sequence[int] | None = None
    proportional: bool = True
    pooling: str = "weighted"

    def __post_init__(self) -> None:
        if self.pooling not in ("weighted", "plain"):
            raise ValueError(f"pooling={self.pooling!r}: choose 'weighted' or 'plain'")
        if self.r is not None:
            if isinstance(self.r, list):
                object.__setattr__(self, "r", (*self.r, 0))  # never the pair of a slope
            elif isinstance(self.r, tuple) and len(self.r) == 2:
                object.__setattr__(self, "r", (self.r[0], float(self.r[1])))
            per_block(self.r, 2)

    @property
    def adaptive(self) -> bool:
        return self.r is not None

    @property
    def weighs(self) -> bool:
        return self.proportional

    @property
    def pools(self) -> bool:
        return self.pooling == "weighted"

    def counts(self, n: int, depth: int, keep: float | int | None) -> list[int]:
        if self.r is None:
            return super().counts(n, depth, keep)
        if keep is not None:
            raise ValueError(f"tome: r={self.r} and keep={keep} both say how many tokens go; give one of them")
        left = []
        for r in per_block(self.r, depth):
            n -= min(r, n // 2)
            left.append(n)
        return left

    def due(self, v: Visual) -> int:
        if self.r is None:
            return super().due(v)
        if v.budget is not None:
            raise ValueError(
                f"tome: r={self.r} and a budget of {v.budget} both say how many tokens go; give one of them"
            )
        if not isinstance(self.r, int):
            raise ValueError(f"tome: in a VLM's tower r={self.r} must be one int for all blocks, or give keep instead")
        return v.n - min(self.r, v.n // 2)

    def reduce(self, t: Tokens, left: int) -> Reduction:
        metric, sizes = t.read("mean_keys"), t.sizes()
        r = t.n - left
        if r <= t.n // 2:
            return match(metric, sizes, t.prefix, r)
        # More than half goes: match again among what is left, and add up.
        index = slots = torch.arange(metric.shape[1], device=metric.device).expand_as(sizes)
        n, size = t.n, sizes
        while n > left:
            step = match(metric, size, t.prefix, min(n - left, n // 2))
            index, slots = index.gather(1, step.index), step.slots(metric.shape[1]).gather(1, slots)
            metric, size = step.apply(metric), sizes.new_zeros(index.shape).scatter_add_(1, slots, sizes)
            n = metric.shape[1] - t.prefix
        return together(index, slots, sizes)


def match(metric: Tensor, size: Tensor, prefix: int, r: int) -> Reduction:
    """The r best pairs of metric [B, N, d] float32, size [B, N], r <= (N - prefix) // 2; ties to the lower place.

    N rows become prefix, unmatched even places, odd places; without a prefix the even ones stay in the order of their
    similarity, highest first, as in the official code. A zero vector is similar to nothing (cosine 0).
    """
    batch, n, _ = metric.shape
    unit = torch.nn.functional.normalize(metric, dim=-1)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    cosine = unit[:, even::2] @ unit[:, odd::2].transpose(-1, -2)  # [B, A, B]
    order = best_first(cosine.amax(-1))
    src, rest = order[:, :r], order[:, r:]
    if prefix:
        rest = rest.sort(-1).values
    first = torch.arange(prefix, device=metric.device)
    odds = torch.arange(odd, n, 2, device=metric.device)
    index = torch.cat([even + 2 * rest, odds.expand(batch, -1)], 1)
    index = torch.cat([first.expand(batch, -1), index], 1) if prefix else index
    # Partners of the r sources only: finding an index costs ten times as much as finding the maximum.
    partner = cosine.gather(1, src[..., None].expand(-1, -1, cosine.shape[2])).argmax(-1)
    dst = partner + (prefix + rest.shape[1])
    src = even + 2 * src
    gain = size.gather(1, src)
    total = size.gather(1, index).scatter_add_(1, dst, gain)
    return Reduction(index, src, dst, gain / total.gather(1, dst), gain)
