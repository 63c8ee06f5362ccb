"""Merging in two sets: tokens at even places join their likest token at odd places, as in ToMe, over several rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.reduction import Reduction
from ...kernels import best_first
from ...kernels.merge import merge
from .frames import norms


def together(index: Tensor, slots: Tensor, size: Tensor) -> Reduction:
    """Several rounds as one: index [B, M], the row [B, N] that holds each token, sizes [B, N] before all of them."""
    batch, left = index.shape
    total = size.new_zeros(batch, left).scatter_add_(1, slots, size)
    own = torch.zeros_like(slots, dtype=torch.bool).scatter_(1, index, True)
    src = best_first(-own.to(torch.int8))[:, : slots.shape[1] - left]
    dst, gain = slots.gather(1, src), size.gather(1, src)
    return Reduction(index, src, dst, gain / total.gather(1, dst), gain)


def halvings(n: int, count: int) -> list[int]:
    """Tokens to merge in each round, half of them while more than `count` of n are left; none where none may stay."""
    done: list[int] = []
    while count and (left := n - sum(done)) > count:
        done.append(min(left // 2, left - count))
    return done if count else [n]


def merged(x: Tensor, rounds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge [F, n, C], so many in each round: which stand for the others [F, n] bool, who stands for each of the n
    [F, n] int64, and its weight [F, n] float32. Merging all n leaves none."""
    f, n, _ = x.shape
    stands = torch.arange(n, device=x.device).expand(f, n)  # the place of each of the tokens that are left
    row, weight = stands, torch.ones(f, n, device=x.device)
    kept = torch.zeros(f, n, dtype=torch.bool, device=x.device)
    if sum(rounds) == n:
        return kept, stands, weight
    todo = [q for q in rounds if q]
    for number, q in enumerate(todo, start=1):
        step, share, stands = _round(x, stands, q)
        weight = weight * share.gather(1, row)
        row = step.gather(1, row)
        if number < len(todo):  # what the last round makes is made once for all, of the weights
            x = _joined(x, step, share, stands.shape[1])
    return kept.scatter(1, stands, True), stands.gather(1, row), weight


def _round(x: Tensor, stands: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """One round on x [F, m, C]: the new row and the share in it of each token [F, m], and the places of new rows."""
    length = norms(x)
    like = (x[:, ::2] @ x[:, 1::2].mT).div_(length[:, None, 1::2])
    best, partner = like.max(-1)  # [F, ceil(m / 2)]
    order = (best / length[:, ::2]).sort(dim=1, descending=True, stable=True).indices
    joins, stay = order[:, :q], order[:, q:]
    left, odd = stay.shape[1], x.shape[1] // 2
    target = partner.gather(1, joins)
    count = torch.ones(len(x), odd, device=x.device).scatter_add(1, target, torch.ones_like(joins, dtype=x.dtype))
    step, share = torch.empty_like(stands), torch.ones_like(stands, dtype=torch.float32)
    even = (left + partner).scatter(1, stay, torch.arange(left, device=x.device).expand_as(stay))
    step[:, ::2], step[:, 1::2] = even, left + torch.arange(odd, device=x.device)
    share[:, ::2] = (1 / count).gather(1, partner).scatter(1, stay, 1.0)
    share[:, 1::2] = 1 / count
    return step, share, torch.cat([stands[:, ::2].gather(1, stay), stands[:, 1::2]], dim=1)


def _joined(x: Tensor, step: Tensor, share: Tensor, left: int) -> Tensor:
    """The rows [F, left, C] that x [F, m, C] becomes, where row step [F, m] of them takes a share of each."""
    f, m, c = x.shape
    rows = torch.arange(f * m, device=x.device)
    to = step + torch.arange(f, device=x.device)[:, None] * left
    made: Tensor = merge(x.reshape(f * m, c), rows, to.flatten(), share.flatten(), f * left)
    return made.view(f, left, c)
