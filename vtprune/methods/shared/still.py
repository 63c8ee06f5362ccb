"""One token for a place that stands still all through a segment of a video: how such tokens are counted and made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.method import spread
from ...kernels import to_device
from .. import best_first
from .segments import Segment, cut, run_lengths, still_places


class Split(NamedTuple):
    """A clip cut into segments. still: [T, P] bool, places that one token stands for in their segment.

    first: [T] the first frame of each frame's segment. windows: segments of more than one frame, with how many still
    places each has. number: [T] which of these a frame is in (0 if in none), within: [T] whether it is in one. dynamic:
    the other tokens of every frame.
    """

    still: Tensor
    first: Tensor
    number: Tensor
    within: Tensor
    windows: list[tuple[Segment, int]]
    dynamic: list[int]

    @classmethod
    def of(cls, segments: Sequence[Segment], counts: Sequence[int], still: Tensor) -> Split:
        """counts: still places of each segment, 0 where it is one frame; still: [T, P], False there."""
        p, device = still.shape[1], still.device
        windows = [(s, n) for s, n in zip(segments, counts) if s[1] > s[0]]
        rows, dynamic = [], []
        for (a, b), n in zip(segments, counts):
            number = sum(c > d for d, c in segments if d < a)
            rows += [[a, number, int(b > a)]] * (b - a + 1)
            dynamic += [p - n] * (b - a + 1)
        first, number_, within = to_device(torch.tensor(rows), device).unbind(1)
        return cls(still, first, number_ * within, within.bool(), windows, dynamic)

    @property
    def saved(self) -> int:
        """Tokens fewer if every still place keeps one token for its window."""
        return sum(n * (b - a) for (a, b), n in self.windows)

    def means(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, P, D] -> the mean frame of every window [G, P, D], and its still places [G, P] bool."""
        frames = [x[a : b + 1].mean(0) for (a, b), _ in self.windows]
        return torch.stack(frames), torch.stack([self.still[a] for (a, _), _ in self.windows])

    def shares(self, budget: int) -> tuple[list[int], list[int], int]:
        """Tokens for each window's still places and each frame's others, in proportion, and what nobody can take."""
        sizes = [*(n for _, n in self.windows), *self.dynamic]
        given = list(spread(min(budget, sum(sizes)), sizes))
        return given[: len(self.windows)], given[len(self.windows) :], budget - sum(given)

    def flowing(self, given: Sequence[int]) -> int:
        """Still tokens of the windows that keep any, given[i] each."""
        return sum((b - a + 1) * n for ((a, b), n), kept in zip(self.windows, given) if kept)

    def stand_alone(self, scores: Tensor, count: int) -> Tensor:
        """[T, P] bool: the `count` still tokens, not of a first frame, of highest scores [T, P]."""
        if not count:
            return torch.zeros_like(self.still)
        first = torch.arange(len(scores), device=scores.device) == self.first
        order = best_first(scores.masked_fill(~self.still | first[:, None], -torch.inf).flatten())[:count]
        return torch.zeros_like(self.still).flatten().index_fill(0, order, True).view_as(self.still)

    def fold(self, centre: Tensor, member: Tensor, share: Tensor, alone: Tensor) -> Folded:
        """Spread the clusters of the windows' still places [G, P] over the frames; what stands alone is left out."""
        first = (torch.arange(len(alone), device=alone.device) == self.first) & self.within
        flows = self.still & ~alone & centre.any(1)[self.number, None]
        frames = torch.stack([flows[a : b + 1].sum(0) for (a, b), _ in self.windows]).clamp(min=1)
        return Folded(
            centre[self.number] & first[:, None],
            flows,
            self.first[:, None] * alone.shape[1] + member[self.number],
            (share / frames)[self.number],
        )


class Folded(NamedTuple):
    """Of a clip's tokens [T, P]: which are merged ones, which flow into one, its flat place, their weight in it."""

    kept: Tensor
    flows: Tensor
    to: Tensor
    w: Tensor


def segmented(same: Tensor) -> Split:
    """The segments of a video whose places stay the same from frame to frame, same [T - 1, P] bool."""
    runs = run_lengths(same)
    still = still_places(runs).cpu()
    found = cut(still)
    counts = [int(still[a, b - a]) if b > a else 0 for a, b in found]
    widths = torch.tensor([[a, b - a] for a, b in found for _ in range(a, b + 1)])
    first, width = to_device(widths, same.device).unbind(1)
    runs = (
        torch.cat([runs, torch.zeros_like(same[:1], dtype=runs.dtype)])
        if len(runs)
        else runs.new_zeros(1, same.shape[1])
    )
    return Split.of(found, counts, (runs[first] >= width[:, None]) & (width > 0)[:, None])
