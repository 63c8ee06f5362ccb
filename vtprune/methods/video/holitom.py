"""HoliTom: places that stand still give one token a segment, the rest are picked by attention; then the LLM merges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.method import Method, Newlines, Positions, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite, to_device
from ...registry import register_own as register
from .. import check_cosine, check_counts, signal_of
from ..in_llm.holitom_inner import HoliTomInner
from ..shared.clips import Clip, by_clip, check_ratio
from ..shared.density_peaks import cluster_weights, clusters
from ..shared.frames import flow, likeness, ranks_in_rows
from ..shared.still import Split, segmented

RECEIVED = Signal("received", None)


@register("holitom", paper="https://arxiv.org/abs/2505.21334", seam="pre_llm")
@dataclass(frozen=True)
class HoliTom(Method):
    """Global segments by dynamic programming; still places averaged and clustered, other tokens by attention received.

    1. A place p does not change from frame t to the next if cos(x[t, p], x[t + 1, p]) > tau.
    2. A place is still in a segment of frames if it never changes there, so that one token can stand for all frames.
       The video is cut into the segments that save the most tokens in this way (dynamic programming).
    3. The still places of each segment are one set of tokens, and the other tokens of each frame are a set each. The
       sets share the budget in proportion to their sizes. A set whose share is 0 is dropped, as officially.
    4. The still places of a segment are averaged over its frames and merged around density peaks: a merged token is
       beta * centre + (1 - beta) * mean of the others, and stands at its centre in the first frame.
    5. Of a frame's other tokens those stay that receive the most attention in the tower's last layer.
    6. If the budget exceeds what the sets hold, the still tokens that receive the most attention stay beside them.

    The official code renumbers position ids, positions="compact". The host waits for the device once a video.

    By name both stages run: this, and `holitom_inner`, which keeps half of the tokens that reach it.

    ratio: without keep, the share of tokens; each set then rounds by itself, as officially: still places to the nearest
        count (half to even), a frame's others up.
    tau: 0.8; the authors use 0.65 at 10 %. beta: None merges by the plain mean. inner: the second stage.
    neighbours: that make a density, as many as a set keeps at most.
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    official_positions: ClassVar[Positions] = "compact"
    ratio: float = 0.15
    tau: float = 0.8
    beta: float | None = 0.6
    inner: bool = True
    neighbours: int = 7

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_cosine("tau", self.tau)
        check_counts(neighbours=self.neighbours)
        if self.beta is not None and not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta={self.beta}: use a weight in [0, 1], or None for the plain mean")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (RECEIVED,)

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        whole = isinstance(keep, float) and keep == 1.0  # nothing may change then
        return [first, *HoliTomInner().stages(None, depth)] if self.inner and not whole else [first]

    def __call__(self, v: Visual) -> Assignment:
        seen = signal_of(v, RECEIVED, self.name)
        check_finite([seen], "scores of attention received")
        return by_clip(v, self.name, lambda clip, budget: self._reduce(clip, seen[clip.at], budget))

    def _reduce(self, clip: Clip, seen: Tensor, budget: int | None) -> Assignment:
        """seen: [T, P] attention received."""
        split = segmented(likeness(clip.x[1:], clip.x[:-1]) > self.tau)
        still, moving, spare = self._official(split) if budget is None else split.shares(budget)
        counts = to_device(torch.tensor(moving), seen.device)[:, None]
        moves = (ranks_in_rows(seen.masked_fill(split.still, -torch.inf)) < counts) & ~split.still
        alone = split.stand_alone(seen, spare)
        kept = used = moves | alone
        to, w = torch.arange(seen.numel(), device=seen.device).view_as(seen), torch.ones_like(seen)
        if split.windows:
            means, places = split.means(clip.x)
            seats = to_device(torch.tensor(still), seen.device)
            centre, member = clusters(means, places, seats, seats.clamp(1, self.neighbours), self.neighbours)
            one = split.fold(centre, member, cluster_weights(centre, member, places, self.beta), alone)
            kept, used = kept | one.kept, used | one.flows
            to, w = torch.where(one.flows, one.to, to), torch.where(one.flows, one.w, w)
        sizes = sum(still) + sum(moving) + spare, split.flowing(still) + sum(moving)
        return flow(kept, used, to, w, seen, *sizes)

    def _official(self, split: Split) -> tuple[list[int], list[int], int]:
        """What each window and each frame keeps if all round by themselves."""
        n = split.still.numel()
        ratio = min(1.0, self.ratio / ((n - split.saved) / n))
        return [round(s * ratio) for _, s in split.windows], [math.ceil(m * ratio) for m in split.dynamic], 0
