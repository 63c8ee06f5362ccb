"""VidCom2: frames that stand out get more tokens, and in every frame the tokens that stand out stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.method import Method, Newlines
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import best_first
from ..shared.clips import Clip, by_clip, check_ratio
from ..shared.counting import apportion
from ..shared.frames import places, ranks_in_rows

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # alpha of the Gaussian kernels
TEMPERATURE = 0.01


@register("vidcom2", paper="https://arxiv.org/abs/2505.14454", seam="pre_llm")
@dataclass(frozen=True)
class VidCom2(Method):
    """The tokens least like the mean of the video and of their frame, more of them in frames unlike the video.

    f: the half of the channels with the smallest variance, rows normalised. K(f, c): sum over alpha of
    exp(-|f - c|^2 / (2 alpha)). Frame t gets R (1 + q_t - 1/T) P tokens, q = softmax(-mean_p K(f, video) / 0.01), and
    keeps those of lowest K(f, video) + K(f, frame). With a budget R = budget / (T P), and what a full frame cannot take
    goes to the others. Positions are kept (officially so for Qwen; for LLaVA they are renumbered:
    positions="compact").

    ratio: R without keep; frames then round on their own, as officially, each to at least one token.
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
        (t, p), d = clip.at.shape, clip.x.shape[2]
        calm = best_first(-clip.x.var(dim=(0, 1), unbiased=False))[: max(1, d // 2)].sort().values
        f = normalize(clip.x.index_select(2, calm), dim=-1)  # [T, P, D / 2]
        to_video, to_frame = _kernels(f, f.mean(dim=(0, 1), keepdim=True)), _kernels(f, f.mean(dim=1, keepdim=True))
        share = 1 + (-to_video.mean(1) / TEMPERATURE).softmax(0) - 1 / t  # [T], mean 1
        if budget is None:
            counts = ((self.ratio * share).clamp(max=1) * p).round().clamp(min=1).long()
            budget = int(counts.sum())
        else:
            least = int(budget >= t)  # officially no frame goes without
            counts = least + apportion((share * budget / t - least).clamp(min=0), budget - least * t, p - least)
        typical = to_video + to_frame
        idx = places(ranks_in_rows(-typical) < counts[:, None], budget)
        return Assignment(idx, scores=-typical.flatten())


def _kernels(f: Tensor, centre: Tensor) -> Tensor:
    """[T, P]: closeness to a centre, 0 (far) .. 5 (the same)."""
    far = (f - centre).square().sum(-1)
    return torch.stack([(-far / (2 * alpha)).exp() for alpha in WIDTHS]).sum(0)
