"""Segments of a video inside which places stand still, found by dynamic programming."""

from __future__ import annotations

import torch
from torch import Tensor

Segment = tuple[int, int]  # first and last frame


def run_lengths(same: Tensor) -> Tensor:
    """For how many frames from t on each place stays the same: same [T - 1, P] bool -> [T - 1, P] int64."""
    t = torch.arange(len(same), device=same.device)[:, None]
    ends = torch.where(same, len(same), t)  # where the run that t stands in is broken, seen from the back
    return ends.flip(0).cummin(0).values.flip(0) - t


def still_places(runs: Tensor) -> Tensor:
    """[T, T] int64: how many places stay the same from frame a to frame a + w, at [a, w]; 0 beyond the end."""
    t = len(runs) + 1
    ends = torch.zeros(t, t, dtype=torch.int64, device=runs.device)
    ends[:-1].scatter_add_(1, runs, torch.ones_like(runs))
    return ends.flip(1).cumsum(1).flip(1)


def cut(still: Tensor) -> list[Segment]:
    """The segments that save most tokens, if a window of frames a..a + w saves w for each of its still[a, w] places.

    still: [T, T] int64 on the host. Ties prefer single frames, then the shortest window, as in the official code. Each
    step of the recurrence is one vector operation over all windows that end at a frame.
    """
    t = len(still)
    width = torch.arange(t)
    ends_at = width[:, None] - width  # [i, w]: a window of w + 1 frames that ends at frame i starts here
    saved = (still[ends_at.clamp(min=0), width] * width).masked_fill(ends_at < 0, -1)
    best = torch.zeros(t + 1, dtype=torch.int64)  # best[t - i]: of the frames before i, so that windows read forwards
    length = [1] * t
    for i in range(t):
        totals = best[t - i :] + saved[i, : i + 1]
        choice = int(totals.argmax()) if i else 0
        best[t - i - 1] = totals[choice]
        length[i] = choice + 1
    segments, last = [], t - 1
    while last >= 0:
        segments.append((last - length[last] + 1, last))
        last -= length[last]
    return segments[::-1]
