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
    the rest evenly; below one token in four, first frames share it, each compared with the one before and the very
    first evenly spaced, which is also what a still image gets. Positions are renumbered, where ids have one axis.

    k: without keep, the share of a compared frame that is dropped: int((1 - k) P) tokens stay.
    faithful: as officially, a third frame among the last four is not compared, and an odd last frame is lost.
    kv: also choose at every decoding step which visual tokens are seen (`dycoke_kv`).
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    positions: ClassVar[Positions] = "compact"
    k: float = 0.7
    faithful: bool = False
    kv: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not 0.0 <= self.k <= 1.0:
            raise ValueError(f"k={self.k!r}: use a share in [0, 1], of a compared frame's tokens that are dropped")

    @property
    def adaptive(self) -> bool:
        return True

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        whole = isinstance(keep, float) and keep == 1.0  # nothing may change then
        return [first, *registry.create("dycoke_kv").stages(0.3, depth)] if self.kv and not whole else [first]

    def __call__(self, v: Visual) -> Assignment:
        return by_clip(v, self.name, self._reduce)

    def _reduce(self, clip: Clip, budget: int | None) -> Assignment:
        (t, p), device = clip.at.shape, clip.at.device
        frame, firsts = torch.arange(t, device=device), -(-t // GROUP)
        before = frame - torch.where(frame % GROUP == GROUP - 1, 1, frame % GROUP)  # itself: compared with none
        first_row = None
        if budget is None:
            before, counts = self._official(frame, before, p)
            budget = int(counts.sum())
        elif budget < firsts * p:
            counts = torch.where(before == frame, evenly_shared(budget, firsts, device)[frame // GROUP], 0)
            before = (frame - GROUP).clamp(min=0)
            first_row = evenly(budget // firsts, p, device)
        else:
            shares = evenly_shared(budget - firsts * p, max(1, t - firsts), device)
            compared = (frame - frame // GROUP - 1).clamp(min=0)  # which of the compared frames it is
            counts = torch.where(before == frame, p, shares[compared])
        scores = 1 - likeness(clip.x, clip.x.index_select(0, before))  # [T, P], 0..2
        scores = scores.masked_fill((before == frame)[:, None], 0)
        if first_row is not None:
            scores = torch.cat([scores[:1].index_fill(1, first_row, 2.0), scores[1:]])
        ranks = ranks_in_rows(scores)
        turn = (frame[:, None] * p + ranks).masked_fill(ranks >= counts[:, None], t * p)
        order = turn.flatten().argsort()[:budget]
        return Assignment(order.sort().values, order, scores=scores.flatten())

    def _official(self, frame: Tensor, before: Tensor, p: int) -> tuple[Tensor, Tensor]:
        """[T] the frame each is compared with (itself: none), and how many tokens it keeps."""
        t, lost = len(frame), torch.zeros_like(frame, dtype=torch.bool)
        if self.faithful:
            before = torch.where((frame % GROUP == 2) & (frame >= t - 2), frame, before)
            lost = (frame == t - 1) & (t % 2 == 1) & (t > 1)
        return before, torch.where(before == frame, p, int((1 - self.k) * p)).masked_fill(lost, 0)
