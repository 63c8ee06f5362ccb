"""EVS: the first frame, and those tokens of later frames that differ most from the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...core.method import Method, Newlines
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from ..shared.clips import Clip, by_clip, check_ratio
from ..shared.frames import likeness
from ..shared.raster import evenly


@register("evs", paper="https://arxiv.org/abs/2510.14624", seam="pre_llm")
@dataclass(frozen=True)
class EVS(Method):
    """Top-k of 1 - cos(x[t, p], x[t - 1, p]) over the whole video; the first frame counts as most different.

    The count is fixed, so a server knows the length of its prompt before the pixels are encoded (the form in which
    vLLM and SGLang ship it; they never keep less than one frame). A budget below one frame keeps evenly spaced tokens
    of the first, which is also what a still image gets. Positions are kept. Ties go to the earlier token.

    ratio: without keep, int(ratio * T * P) tokens stay, and at least the first frame.
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    ratio: float = 0.25

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @property
    def adaptive(self) -> bool:
        return True

    def __call__(self, v: Visual) -> Assignment:
        return by_clip(v, self.name, self._reduce)

    def _reduce(self, clip: Clip, budget: int | None) -> Assignment:
        (t, p), device = clip.at.shape, clip.at.device
        count = max(p, int(self.ratio * t * p)) if budget is None else budget
        change = 1 - likeness(clip.x[1:], clip.x[:-1])  # [T - 1, P], 0..2
        scores = torch.cat([torch.full((p,), torch.inf, device=device), change.flatten()])
        if count < p:
            order = evenly(count, p, device)
        else:
            order = scores.sort(descending=True, stable=True).indices[:count]
        return Assignment(order.sort().values, order, scores=scores.clamp(max=2))
