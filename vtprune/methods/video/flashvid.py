"""FlashVID: tokens that are looked at and unlike each other stay, the rest merges along trees through the frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...core.method import Method, Newlines, Stage, spread
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite, to_device
from ...registry import register_own as register
from .. import check_choices, check_cosine, check_counts, check_parts, signal_of
from ..in_llm.flashvid_inner import FlashVIDInner
from ..shared.clips import Clip, by_clip, check_ratio
from ..shared.frames import likeness
from ..shared.salient import Salient, salient_places
from ..shared.scenes import cut_at
from ..shared.segments import Segment
from ..shared.trees import Counts, grow

Single = Literal["rest", "whole"]
RECEIVED = Signal("received", None)


@register("flashvid", paper="https://arxiv.org/abs/2602.08024", seam="pre_llm")
@dataclass(frozen=True)
class FlashVID(Method):
    """Salient and diverse tokens of each frame stay; the others merge with what they resemble in the frame before.

    1. A video is cut into segments where the means of neighbouring frames have a cosine below `threshold`, and at the
       lowest cosines until there are `segments`.
    2. In each frame the salient tokens are picked by greedy max-min distance, (1 - cosine) times the attention that the
       later token receives (`salient`).
    3. Within a segment each other token is linked to the token of the frame before that it is most like, if their
       cosine is above `tau`, and if enough tokens are left unlinked (else the threshold rises). Links form trees; a
       tree is merged into the mean of its tokens and stands where it begins.
    4. In each frame the trees that begin there are clustered around density peaks, and the mean of each cluster stands
       at its centre.

    Positions are kept. The host waits for the device twice a video. By name both stages run: this, and
    `flashvid_inner`, which keeps 0.3 of the tokens that reach its layer.

    With keep, ceil(alpha * budget) tokens are salient ones, spread evenly over the frames, and clusters get the rest, a
    segment in proportion to its other tokens and a frame to its trees. Without, as officially, of P tokens a frame
    ceil(P * ratio * expansion) stay, ceil(alpha *) of them salient, and each frame's clusters are rounded up.

    ratio: without keep, the share of tokens as an average over the LLM, which the second stage brings down to it from
        `expansion` times as many. alpha: share of the salient ones. tau, threshold, segments: as above; segments=None
        makes a video one segment. neighbours: that make a density, at most as many as a frame has clusters.
    salient: weight of a token: "attn_div" the attention it receives; "attn_div_v2" that times the mean product of its
        features with the mean of each frame of the segment; "div" 1; "attn" takes the most looked at, diverse or not.
        The authors use "attn_div_v2" and segments=8 on LLaVA, "attn_div" and 4 on Qwen2.5-VL.
    counts: what a tree's sum is divided by: "all" its tokens. "direct", as officially, only those linked to its first
        token, and that one, so that what stands still in long segments grows.
    single: what is clustered in a segment of one frame: the "rest", or as officially the "whole" frame, salient tokens
        too. A centre that is salient already stands at the first free place of the frame then (officially twice at
        one place).
    inner: the second stage.

    The official code breaks ties between equally dense tokens at random; here the lower index wins. Its "attn_div_v2"
    may pick a token twice where no weight is positive; here never.
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    ratio: float = 0.1
    expansion: float = 1.25
    alpha: float = 0.7
    tau: float = 0.8
    threshold: float = 0.9
    segments: int | None = 8
    neighbours: int = 7
    salient: Salient = "attn_div_v2"
    counts: Counts = "all"
    single: Single = "rest"
    inner: bool = True

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choices(self, salient=Salient, counts=Counts, single=Single)
        check_parts(alpha=self.alpha)
        check_cosine("tau", self.tau)
        check_cosine("threshold", self.threshold)
        check_counts(neighbours=self.neighbours)
        if self.segments is not None:
            check_counts(segments=self.segments)
        if not 0.0 < self.expansion < math.inf:
            raise ValueError(f"expansion={self.expansion}: use a factor above 0")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (RECEIVED,)

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        whole = isinstance(keep, float) and keep == 1.0  # nothing may change then
        return [first, *FlashVIDInner().stages(None, depth)] if self.inner and not whole else [first]

    def __call__(self, v: Visual) -> Assignment:
        seen = signal_of(v, RECEIVED, self.name)
        check_finite([seen], "scores of attention received")
        return by_clip(v, self.name, lambda clip, budget: self._reduce(clip, seen[clip.at], budget))

    def _reduce(self, clip: Clip, seen: Tensor, budget: int | None) -> Assignment:
        """seen: [T, P] attention received."""
        t, p = seen.shape
        if budget == t * p:
            return Assignment(torch.arange(budget, device=seen.device), scores=seen.flatten())
        frames = clip.x.mean(1)
        found = [(0, t - 1)]
        if self.segments is not None:
            found = cut_at(likeness(frames[1:], frames[:-1]).tolist(), self.threshold, self.segments)
        salient, others = self._shares(found, t, p, budget)
        picked = salient_places(clip.x, frames, seen, found, salient, self.salient)
        wanted = [sum(salient[a : b + 1]) + other for (a, b), other in zip(found, others)]
        trees = grow(clip.x, picked, found, wanted, self.tau, self.counts)
        sets = trees.begins
        if self.single == "whole":
            alone = torch.tensor([a == b for a, b in found for _ in range(a, b + 1)])
            sets = sets | to_device(alone, seen.device)[:, None]
        counts = self._clusters(found, others, sets.sum(1).tolist(), budget)
        return trees.clustered(clip.x, picked, sum(salient), sets, counts, self.neighbours, seen)

    def _shares(self, found: Sequence[Segment], t: int, p: int, budget: int | None) -> tuple[list[int], list[int]]:
        """Salient tokens of each frame, and clusters of each segment."""
        if budget is None:
            kept = min(p, math.ceil(round(p * self.ratio * self.expansion, 9)))
            salient = math.ceil(round(kept * self.alpha, 9))
            return [salient] * t, [(kept - salient) * (b - a + 1) for a, b in found]
        most = math.ceil(round(budget * self.alpha, 9))
        counts = [(i + 1) * most // t - i * most // t for i in range(t)]
        return counts, list(spread(budget - most, [(b - a + 1) * p - sum(counts[a : b + 1]) for a, b in found]))

    def _clusters(
        self, found: Sequence[Segment], others: Sequence[int], sizes: list[int], budget: int | None
    ) -> list[int]:
        """Clusters of each frame, that has sizes[i] tokens to cluster."""
        counts: list[int] = []
        for (a, b), other in zip(found, others):
            mine = sizes[a : b + 1]
            if budget is not None:
                counts += spread(other, mine)
            else:
                share = min(1.0, other / max(1, sum(mine)))
                counts += [math.ceil(size * share) for size in mine]
        return counts
