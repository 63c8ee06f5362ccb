"""A unit as clips: runs of equal frames, each reduced by itself, and the tokens outside all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.method import spread
from ...core.visual import Assignment, Span, Visual
from ...kernels import check_finite
from .. import budget_of
from .text import note

ONE_FRAME = (
    "{}: an image has no other frame to be compared with; where the frames of a video are passed as images, "
    "per='sample' makes them one video (and clips=... says which belong together)"
)


class Clip(NamedTuple):
    """T equal frames of P tokens in raster order. x: [T, P, D] float32; at: [T, P] int64, where they stand.

    before: [P, D] float32, the frame before them in a video that comes in parts; None if they begin it.
    """

    x: Tensor
    at: Tensor
    before: Tensor | None = None


Reduce = Callable[[Clip, int | None], Assignment]


def by_clip(v: Visual, name: str, reduce: Reduce) -> Assignment:
    """Let `reduce` answer for each clip, its tokens counted 0..T*P - 1, and join the answers.

    A span is a clip; in a video spans of equal frames that follow each other are one; a unit without spans is its grid,
    or one frame. Clips share the budget in proportion to their tokens. Newlines and separators leave first and never
    merge. Without a budget `reduce` gets None, and newlines and separators stay.
    """
    total = None if v.budget is None else budget_of(v, name)
    check_finite([v.x])
    found, loose = clips(v)
    if v.before is None and all(len(clip.at) == 1 for clip in found):
        note(v, ONE_FRAME.format(name))
    sizes = [clip.at.numel() for clip in found]
    inside = None if total is None else min(total, sum(sizes))
    shares = [None] * len(found) if inside is None else list(spread(inside, sizes))
    parts = [(clip.at.flatten(), reduce(clip, share)) for clip, share in zip(found, shares) if share != 0]
    rest = loose if total is None or inside is None else loose[: total - inside]
    if len(parts) == 1 and not len(loose) and len(found) == 1:
        return parts[0][1]
    return _joined(v, parts, rest)


def clips(v: Visual) -> tuple[list[Clip], Tensor]:
    """The clips of a unit, and the positions of the tokens in none of them."""
    spans = sorted(v.spans or (Span(0, v.grid or (1, 1, v.n)),), key=lambda span: span.start)
    found: list[Clip] = []
    loose, end = [], 0
    alike = _alike if v.video else _number
    for _, group in groupby(enumerate(spans), alike):
        frames, members = [], [span for _, span in group]
        for span in members:
            t, h, w = span.grid
            loose.append(torch.arange(end, span.start, device=v.x.device))
            end = span.start + len(span)
            rows = torch.arange(span.start, end, device=v.x.device).view(t, h, w + span.newline)
            frames.append(rows[..., :w].reshape(t, h * w))
            loose.append(rows[..., w:].flatten())
        at = frames[0] if len(frames) == 1 else torch.cat(frames)
        first = members[0].start
        in_one_run = at.numel() == end - first  # then no copy is needed
        x = v.x[first:end] if in_one_run else v.x.index_select(0, at.flatten())
        before = None if v.before is None or found else v.before.float()
        found.append(Clip(x.float().view(*at.shape, -1), at, before))
    loose.append(torch.arange(end, v.n, device=v.x.device))
    return found, torch.cat(loose).sort().values


def _alike(numbered: tuple[int, Span]) -> tuple[int, ...]:
    """What spans that follow each other share if they are frames of one clip; mosaics stand alone."""
    number, span = numbered
    return (-1, *span.grid[1:]) if not span.newline else (number,)


def _number(numbered: tuple[int, Span]) -> tuple[int, ...]:
    return (numbered[0],)


def _joined(v: Visual, parts: list[tuple[Tensor, Assignment]], rest: Tensor) -> Assignment:
    """One answer in the unit's positions from those of its clips, and the tokens of `rest`, kept as they are."""
    idx = torch.cat([*(at.index_select(0, answer.idx) for at, answer in parts), rest])
    picked = torch.cat([*(at.index_select(0, _order(answer)) for at, answer in parts), rest])
    idx, came = idx.sort()
    row, first = came.argsort(), 0
    src, dst, w = [rest], [row[len(row) - len(rest) :]], [torch.ones_like(rest, dtype=torch.float32)]
    scores = v.x.new_zeros(v.n, dtype=torch.float32)
    for at, answer in parts:
        k = len(answer.idx)
        own = row[first : first + k]
        first += k
        if answer.src is None or answer.dst is None or answer.w is None:
            src, dst, w = [*src, at[answer.idx]], [*dst, own], [*w, torch.ones_like(own, dtype=torch.float32)]
        else:
            src, dst, w = [*src, at[answer.src]], [*dst, own[answer.dst]], [*w, answer.w]
        if answer.scores is not None:
            scores = scores.index_copy(0, at, answer.scores)
    if not any(answer.merges for _, answer in parts):
        return Assignment(idx, picked, scores=scores)
    return Assignment(idx, picked, torch.cat(src), torch.cat(dst), torch.cat(w), scores)


def _order(answer: Assignment) -> Tensor:
    return answer.idx if answer.order is None else answer.order


def check_ratio(ratio: float) -> None:
    """Raise ValueError unless it is a share in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, float) or not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio={ratio!r}: use a float in (0, 1], the share of tokens to keep where keep is not given")
