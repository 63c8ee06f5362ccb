"""DyCoke's temporal merging: of every four frames the first stays whole, the others keep what it does not show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import registry
from ...core.method import Method, Newlines, Positions, Stage
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from ..shared.clips import Clip, by_clip
from ..shared.frames import evenly_shared, likeness, ranks_in_rows
from ..shared.raster import evenly

GROUP = 4


@register("dycoke", paper="https://arxiv.org/abs/2411.15024", seam="pre_llm")
@dataclass(frozen=True)
class DyCoke(Method):
    """In groups of four frames, tokens of lowest cosine similarity with the same place of a reference frame.

    The second and third frame of a group are compared with the first, the fourth with the third. Nothing is averaged:
    what is dropped is answered for by the reference. With a budget the first frames stay whole and the others share
    the rest evenly. A still image keeps evenly spaced tokens. The official code renumbers
    position ids, positions="compact".

    Below the count that stays without keep, first frames that stay whole would leave the others little or nothing.
    There they share a third of the budget and keep the tokens least like their own mean, and all other frames share
    the rest. On the embedded video model at 10 % this answers 91.4 % of 500 questions, whole first frames 61.6 %.

    k: without keep, the share of a compared frame that is dropped: int((1 - k) P) tokens stay.
    faithful: as officially, a third frame among the last four is not compared, and an odd last frame is lost. With a
        budget first frames come first at every one; below one token in four they share it, each compared with the one
        before, the very first evenly spaced. It takes no video in parts, because the last frames are treated apart.
    kv: also choose at every decoding step which visual tokens are seen (`dycoke_kv`).
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    official_positions: ClassVar[Positions] = "compact"
    k: float = 0.7
    faithful: bool = False
    kv: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not 0.0 <= self.k <= 1.0:
            raise ValueError(f"k={self.k!r}: use a share in [0, 1], of a compared frame's tokens that are dropped")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def window(self) -> int | None:
        return None if self.faithful else GROUP

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        whole = isinstance(keep, float) and keep == 1.0  # nothing may change then
        return [first, *registry.create("dycoke_kv").stages(0.3, depth)] if self.kv and not whole else [first]

    def __call__(self, v: Visual) -> Assignment:
        return by_clip(v, self.name, self._reduce)

    def _reduce(self, clip: Clip, budget: int | None) -> Assignment:
        (t, p), device = clip.at.shape, clip.at.device
        frame, firsts = torch.arange(t, device=device), -(-t // GROUP)
        natural = firsts * p + (t - firsts) * int((1 - self.k) * p)
        before = frame - torch.where(frame % GROUP == GROUP - 1, 1, frame % GROUP)  # itself: compared with none
        whole = before == frame  # the first frames
        first_row, own_mean = None, False
        if budget is None:
            before, counts = self._official(frame, before, p)
            budget = int(counts.sum())
        elif (t > 1 or clip.before is not None) and budget < natural and not self.faithful:
            own_mean, counts = True, self._shared(frame, budget, p)
        elif budget < firsts * p:
            counts = torch.where(whole, evenly_shared(budget, firsts, device)[frame // GROUP], 0)
            before = (frame - GROUP).clamp(min=0)
            first_row = evenly(budget // firsts, p, device)
        else:
            counts = torch.where(whole, p, _compared(frame, budget - firsts * p))
        scores = 1 - likeness(clip.x, clip.x.index_select(0, before))  # [T, P], 0..2
        scores = scores.masked_fill((before == frame)[:, None], 0)
        if own_mean:
            scores = torch.where(whole[:, None], 1 - likeness(clip.x, clip.x.mean(dim=1, keepdim=True)), scores)
        if first_row is not None:
            scores = torch.cat([scores[:1].index_fill(1, first_row, 2.0), scores[1:]])
        ranks = ranks_in_rows(scores)
        turn = (frame[:, None] * p + ranks).masked_fill(ranks >= counts[:, None], t * p)
        order = turn.flatten().argsort()[:budget]
        return Assignment(order.sort().values, order, scores=scores.flatten())

    def _shared(self, frame: Tensor, budget: int, p: int) -> Tensor:
        """[T] tokens of each frame: a third of the budget for first frames; one for every frame where it can be."""
        t, firsts = len(frame), -(-len(frame) // GROUP)
        others, each = t - firsts, budget >= t
        least = max(budget - others * p, firsts if each else 0)
        most = min(firsts * p, budget - others if each else budget)
        own = min(max(budget // 3, least), most)
        shares = evenly_shared(own, firsts, frame.device)
        return torch.where(frame % GROUP == 0, shares[frame // GROUP], _compared(frame, budget - own))

    def _official(self, frame: Tensor, before: Tensor, p: int) -> tuple[Tensor, Tensor]:
        """[T] the frame each is compared with (itself: none), and how many tokens it keeps."""
        t, lost = len(frame), torch.zeros_like(frame, dtype=torch.bool)
        if self.faithful:
            before = torch.where((frame % GROUP == 2) & (frame >= t - 2), frame, before)
            lost = (frame == t - 1) & (t % 2 == 1) & (t > 1)
        return before, torch.where(before == frame, p, int((1 - self.k) * p)).masked_fill(lost, 0)


def _compared(frame: Tensor, total: int) -> Tensor:
    """[T] even shares of `total` for the frames that are compared with another; a first frame's entry means nothing."""
    firsts = -(-len(frame) // GROUP)
    shares = evenly_shared(total, max(1, len(frame) - firsts), frame.device)
    return shares[(frame - frame // GROUP - 1).clamp(min=0)]
