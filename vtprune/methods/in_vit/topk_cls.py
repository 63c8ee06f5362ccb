"""Top tokens by the CLS token's attention, a share at three blocks: EViT's rule without its fused token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.reduction import Reads, Reducer, Reduction, Tokens, keep_best
from ...registry import register_own as register
from .schedule import check_places, stepwise


@register("topk_cls", paper="https://arxiv.org/abs/2202.07800", seam="in_vit")
@dataclass(frozen=True)
class TopKCls(Reducer):
    """Keep the tokens that the CLS token attends to most, mean over heads; without one those that all attend to most.

    at: where tokens go, as shares of the depth: at 1/4, 1/2 and 3/4 (blocks 4, 7 and 10 of 12, as in EViT), each time
        the same share of what is left. In a VLM's tower: at every block of the stage.
    """

    reads: ClassVar[tuple[Reads, ...]] = ("attention",)
    at: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        check_places(self.at)

    def counts(self, n: int, depth: int, keep: float | int | None) -> list[int]:
        return stepwise(n, self.goal(n, keep), depth, self.at)

    def reduce(self, t: Tokens, left: int) -> Reduction:
        return keep_best(t, t.read("attention")[:, t.prefix :], left)
