"""AIM: tokens of a frame are merged in pairs, round by round, before the LLM, and leave layer by layer inside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ...core.method import Method, Newlines, Positions, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import signal_of
from ..in_llm.aim_inllm import AIMInLLM
from ..shared.bipartite import halvings, merged
from ..shared.clips import Clip, by_clip
from ..shared.frames import flow

Metric = Literal["features", "keys"]
KEYS = Signal("keys", None)


@register("aim", paper="https://arxiv.org/abs/2412.03248", seam="pre_llm")
@dataclass(frozen=True)
class AIM(Method):
    """Bipartite merging in every frame: at most half of its tokens a round, the most alike first.

    A round compares the even tokens with the odd ones; of the even ones the q with the likest partner join it, and the
    partner becomes the plain mean of itself and all that joined. What was merged before counts as one token. The next
    round sees [even tokens left, the most alike first; odd tokens]. A merged token stands at the place of its partner.
    Frames share the budget evenly. The official code renumbers
    position ids, positions="compact".

    By name both parts run: this, and the schedule of `aim_inllm` on what it leaves, which ends without visual tokens.

    rounds: without keep, how often floor(P / 2), floor(P / 4), ... tokens are merged; 2 leaves a quarter. Or how many
        are merged in each round, as the official code for images has it: (288, 36) leaves 252 of 576.
    metric: what is compared, "features", or "keys" of the layer that feeds the projector, merged alongside (the
        official code for images; there before the projector, here behind it). inner: the part inside the LLM.
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    official_positions: ClassVar[Positions] = "compact"
    rounds: int | tuple[int, ...] = 2
    metric: Metric = "features"
    inner: bool = True

    def __post_init__(self) -> None:
        every = self.rounds if isinstance(self.rounds, tuple) and self.rounds else (self.rounds,)
        if any(isinstance(q, bool) or not isinstance(q, int) or q < 1 for q in every):
            raise ValueError(f"rounds={self.rounds!r}: use an int >= 1, or a tuple of them")
        if self.metric not in get_args(Metric):
            raise ValueError(f"metric={self.metric!r}: choose 'features' or 'keys'")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def window(self) -> int | None:
        return 1

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (KEYS,) if self.metric == "keys" else ()

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        if not self.inner or (isinstance(keep, float) and keep == 1.0):  # nothing may change then
            return [first]
        if keep is not None:
            left = keep
        elif isinstance(self.rounds, int):
            left = 0.5**self.rounds
        else:
            raise ValueError(f"rounds={self.rounds}: counts say no share for the part inside the LLM; use inner=False")
        later = AIMInLLM().stages(None, depth)
        # A count is one of each unit, as in the first part.
        return [
            first,
            *(replace(s, keep=_of(s.keep, left), per="image" if isinstance(left, int) else s.per) for s in later),
        ]

    def __call__(self, v: Visual) -> Assignment:
        if self.metric == "features":
            return by_clip(v, self.name, lambda clip, budget: self._reduce(clip, clip.x, budget))
        keys = signal_of(v, KEYS, self.name)
        check_finite([keys], "keys")
        return by_clip(v, self.name, lambda clip, budget: self._reduce(clip, keys[clip.at], budget))

    def _reduce(self, clip: Clip, metric: Tensor, budget: int | None) -> Assignment:
        """metric: [T, P, C] float32."""
        t, p = clip.at.shape
        if budget is None:
            official = self._official(p)
            counts = [p - sum(official)] * t
        else:
            official, counts = None, [(i + 1) * budget // t - i * budget // t for i in range(t)]
        same = len(set(counts)) == 1
        parts = []
        for count, frames in groupby(sorted(range(t), key=lambda i: counts[i]), key=lambda i: counts[i]):
            chosen = list(frames)
            x = metric if same else torch.stack([metric[i] for i in chosen])
            parts += list(zip(chosen, *merged(x, halvings(p, count) if official is None else official)))
        _, kept, member, weight = (list(part) for part in zip(*sorted(parts, key=lambda part: part[0])))
        to = torch.stack(member) + p * torch.arange(t, device=metric.device)[:, None]
        used = torch.stack([torch.full_like(mask, bool(count)) for mask, count in zip(kept, counts)])
        sizes = sum(counts), p * sum(count > 0 for count in counts)
        return flow(torch.stack(kept), used, to, torch.stack(weight), None, *sizes)

    def _official(self, p: int) -> list[int]:
        """Tokens of p merged in each round, at most half of what is there."""
        asked = self.rounds if isinstance(self.rounds, tuple) else [p >> (i + 1) for i in range(self.rounds)]
        done: list[int] = []
        for q in asked:
            done.append(min(q, (p - sum(done)) // 2))
        return done


def _of(share: float | int | None, left: float | int) -> float | int | None:
    """A share of what the first part leaves; None where all leave."""
    if share is None:
        return None
    return max(1, round(share * left)) if isinstance(left, int) else share * left
