"""FlashVID's second stage: deep in the LLM the visual tokens stay that the last prompt token looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ...core.method import Method, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, select, signal_of
from .schedule import check_layer, layer_at

LAST_ROW = Signal("last_row", -1)


@register("flashvid_inner", paper="https://arxiv.org/abs/2602.08024", seam="in_llm")
@dataclass(frozen=True)
class FlashVIDInner(Method):
    """Top-k of the last query's softmax row in the layer before `layer`, averaged over heads. Position ids are kept.

    Without keep ceil(share * n) of the n tokens that reach the layer stay, as officially.

    share: of the tokens that reach the layer, where keep is not given.
    layer: the first decoder layer that runs on the pruned sequence: an int >= 1, or a share of the depth in (0, 1),
        rounded. The authors use 20 of 28 layers.
    """

    reads_text: ClassVar[bool] = True
    share: float = 0.3
    layer: int | float = 20 / 28

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, float) or not 0.0 < self.share <= 1.0:
            raise ValueError(
                f"share={self.share!r}: use a float in (0, 1], the share of the tokens that reach the layer"
            )
        check_layer(self.name, self.layer)

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (LAST_ROW,)

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        return [Stage(layer_at(self.layer, depth), self, keep=keep)]

    def __call__(self, v: Visual) -> Assignment:
        row = signal_of(v, LAST_ROW, self.name)
        check_finite([row], "last-query attention rows")
        # Rounded first, because a product such as 0.3 * 10 may stand a last digit above a whole number.
        count = math.ceil(round(self.share * v.n, 9)) if v.budget is None else budget_of(v, self.name)
        return select(best_first(row)[:count], scores=row)
