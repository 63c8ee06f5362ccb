"""Softmax rows of attention and their column sums in plain torch, a cache-sized block of the map at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CACHE_ELEMENTS = 1 << 19  # 2 MiB of float32: a block is written and read again before it leaves the cache
DEVICE_ELEMENTS = 1 << 24  # 64 MiB: elsewhere the launches count, not the cache


@dataclass(frozen=True)
class Block:
    """Some rows of the map: `at` is their place (batch, heads, queries), the tensors are what they are made of."""

    at: tuple[slice, slice, slice]
    q: Tensor
    k: Tensor
    mask: Tensor | None


def attention_rows(q_rows: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`kernels.attention_rows` for checked arguments."""
    out = k.new_empty(*q_rows.shape[:3], k.shape[2], dtype=torch.float32)
    for part in blocks(q_rows, k, mask):
        weights, seen = _softmax(part, scaling)
        out[part.at] = weights if seen is None else weights * seen
    return out


def attention_received(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, block: int | None, weights: Tensor | None
) -> Tensor:
    """`kernels.attention_received` for checked arguments."""
    if weights is None:
        weights = q.new_full((1, 1, 1), 1 / q.shape[2], dtype=torch.float32)
    else:
        weights = weights[:, None].float()
    return columns(q, k, mask, scaling, weights.expand(*q.shape[:3]), block).mean(1)


def columns(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, weights: Tensor, block: int | None = None
) -> Tensor:
    """[B, H, N] float32: for each head the rows of its map, times their weights [B, H, M] float32, added up."""
    out = k.new_zeros(*q.shape[:2], k.shape[2], dtype=torch.float32)
    for part in blocks(q, k, mask, rows=block):
        rows, seen = _softmax(part, scaling)
        weight = weights[part.at][..., None, :]
        if seen is not None:
            weight = weight * seen.transpose(-1, -2)
        out[part.at[:2]] += (weight @ rows)[..., 0, :]
    return out


def blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, *, rows: int | None = None, elements: int | None = None
) -> Iterator[Block]:
    """Cut the map into blocks of about `elements` (None: by device) entries, keys converted to float32 included.

    rows: queries in a block; None picks them. Heads that share their keys stay together unless a block of them is too
    large, so that the keys are read and converted once.
    """
    if elements is None:
        elements = CACHE_ELEMENTS if q.device.type == "cpu" else DEVICE_ELEMENTS
    (batch, heads, queries, d), (_, groups, n, _) = q.shape, k.shape
    share = heads // groups
    rows = min(rows or max(1, elements // (share * n)), queries)
    scores = share * rows * n
    copied = scores if k.dtype == torch.float32 else scores + n * d
    together = share * min(max(1, elements // copied), groups) if scores <= elements else 1
    # One sample's keys are usually a view of [tokens, heads, d]; several at once would have to be copied to multiply.
    samples = max(1, elements // (groups * (scores + n * d))) if together == heads else 1
    for b in range(0, batch, samples):
        for h in range(0, heads, together):
            shared = slice(h // share, (min(h + together, heads) - 1) // share + 1)
            keys = k[b : b + samples, shared].float()
            for r in range(0, queries, rows):
                at = (slice(b, b + samples), slice(h, h + together), slice(r, r + rows))
                yield Block(at, q[at].float(), keys, None if mask is None else _cut(mask, at))


def _cut(mask: Tensor, at: tuple[slice, slice, slice]) -> Tensor:
    return mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, at))]


def _softmax(part: Block, scaling: float) -> tuple[Tensor, Tensor | None]:
    """A block's softmax [b, h, r, N] and which of its rows attend to anything, [.., r, 1] (None: all).

    The rows that attend to nothing hold an arbitrary finite distribution.
    """
    q, k, mask = part.q, part.k, part.mask
    # Heads of one group are stacked along the rows: the keys are read once and never repeated.
    stacked = (q * scaling).reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = (stacked @ k.transpose(-1, -2)).reshape(*q.shape[:3], k.shape[2])
    if mask is None:
        return scores.softmax(-1), None
    if mask.dtype == torch.bool:
        blocked = ~mask
    else:
        blocked = mask <= torch.finfo(mask.dtype).min
        scores = scores + mask.float()
    lowest = torch.finfo(torch.float32).min
    return scores.masked_fill(blocked, lowest).softmax(-1), ~blocked.all(-1, keepdim=True)
