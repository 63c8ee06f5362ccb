"""Weighted PageRank in plain torch: maps that fit in a fixed memory are made once, larger ones again at every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..attention.reference import ROWS, Block, Room, blocks, columns, looks_at, weighed

MAP_ELEMENTS = 1 << 24  # 64 MiB of float32: the largest map that is kept between steps
TOGETHER = 1 << 21  # small maps are worked on together as long as they stay in the cache


def page_rank(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, steps: int, start: Tensor, damping: float
) -> Tensor:
    """`kernels.page_rank` for checked arguments, start [B, H, N] float32."""
    n = q.shape[2]
    if steps == 1 or n * n > MAP_ELEMENTS:
        score = start
        for _ in range(steps):
            score = _damped(columns(q, k, mask, scaling, score), start, damping)
        return score.clone()
    out = torch.empty_like(start, memory_format=torch.contiguous_format)
    room = Room(q, k, mask)
    rows = max(ROWS, n // 16) if looks_at(mask) or n * n > TOGETHER else n
    cut = blocks(q, k, mask, rows=rows, elements=max(n * n, TOGETHER) * min(rows, n) // n)
    for parts in _by_heads(cut):
        at = parts[0].at[:2]
        whole = [(part, part.rows(scaling, room, place)) for place, part in enumerate(parts)]
        score = first = start[at]
        for _ in range(steps):
            given = torch.zeros_like(first)
            for part, weights in whole:
                given[..., part.seen.cols] += weighed(score[..., part.at[2]], part, weights)
            score = _damped(given, first, damping)
        out[at] = score
    return out


def _by_heads(cut: Iterable[Block]) -> Iterator[list[Block]]:
    """The blocks of the same heads together. (`torch.compile` cannot read `itertools.groupby`.)"""
    held: list[Block] = []
    for part in cut:
        if held and part.at[:2] != held[0].at[:2]:
            yield held
            held = []
        held.append(part)
    if held:
        yield held


def _damped(score: Tensor, start: Tensor, damping: float) -> Tensor:
    return torch.lerp(score, start, damping) if damping else score
