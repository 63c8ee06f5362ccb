"""Top tokens by the CLS token's attention, a share at three blocks: EViT's rule without its fused token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.reduction import Reads, Reduction, Tokens, keep_best
from ...registry import register_own as register
from .schedule import AtPlaces


@register("topk_cls", paper="https://arxiv.org/abs/2202.07800", seam="in_vit")
@dataclass(frozen=True)
class TopKCls(AtPlaces):
    """Keep the tokens that the CLS token attends to most, mean over heads; without one those that all attend to most.

    at: where tokens go, as shares of the depth: at 1/4, 1/2 and 3/4 (blocks 4, 7 and 10 of 12, as in EViT), each time
        the same share of what is left.
    """

    reads: ClassVar[tuple[Reads, ...]] = ("attention",)

    def reduce(self, t: Tokens, left: int) -> Reduction:
        return keep_best(t, t.read("attention")[:, t.prefix :], left)
