"""Softmax rows of attention and their column sums in plain torch, a cache-sized block of the map at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ..dispatch import recorded

CACHE_ELEMENTS = 1 << 19  # 2 MiB of float32: a block is written and read again before it leaves the cache
DEVICE_ELEMENTS = 1 << 24  # 64 MiB: elsewhere the launches count, not the cache


LOWEST = torch.finfo(torch.float32).min / 2  # added to a score it leaves a weight of 0, and never overflows


@dataclass(frozen=True)
class Block:
    """Some rows of the map: `at` is their place (batch, heads, queries), the tensors are what they are made of."""

    at: tuple[slice, slice, slice]
    q: Tensor
    k: Tensor
    bias: Tensor | None
    seen: Tensor | None  # [.., queries, 1], the rows that attend to anything; None: all

    def rows(self, scaling: float) -> Tensor:
        """[b, h, queries, N] softmax; the rows that attend to nothing hold some finite distribution."""
        q, k = self.q, self.k
        # Heads of one group are stacked along the rows: the keys are read once and never repeated.
        stacked = (q * scaling).reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        scores = (stacked @ k.transpose(-1, -2)).reshape(*q.shape[:3], k.shape[2])
        return (scores if self.bias is None else scores + self.bias).softmax(-1)


def attention_rows(q_rows: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`kernels.attention_rows` for checked arguments."""
    out = k.new_empty(*q_rows.shape[:3], k.shape[2], dtype=torch.float32)
    for part in blocks(q_rows, k, mask):
        weights = part.rows(scaling)
        out[part.at] = weights if part.seen is None else weights * part.seen
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
        weight = weights[part.at][..., None, :]
        if part.seen is not None:
            weight = weight * part.seen.transpose(-1, -2)
        out[part.at[:2]] += (weight @ part.rows(scaling))[..., 0, :]
    return out


def blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, *, rows: int | None = None, elements: int | None = None
) -> Iterator[Block]:
    """Cut the map into blocks of about `elements` (None: by device) entries, keys converted to float32 included.

    rows: queries in a block; None picks them. Heads that share their keys stay together unless a block of them is too
    large, so that the keys are read and converted once.
    """
    if recorded():  # one block, whatever the sizes will be
        yield Block((slice(None),) * 3, q.float(), k.float(), *((None, None) if mask is None else _bias(mask)))
        return
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
    for b, r in product(range(0, batch, samples), range(0, queries, rows)):
        bias = seen = None
        for h in range(0, heads, together):
            at = (slice(b, b + samples), slice(h, h + together), slice(r, r + rows))
            shared = slice(h // share, (min(h + together, heads) - 1) // share + 1)
            if mask is not None and (bias is None or mask.shape[1] > 1):  # usually one for all heads
                bias, seen = _bias(
                    mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, at))]
                )
            yield Block(at, q[at].float(), k[at[0], shared].float(), bias, seen)


def _bias(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What to add to the scores, in float32, and which rows attend to anything."""
    if mask.dtype == torch.bool:
        blocked, bias = ~mask, mask.new_zeros(mask.shape, dtype=torch.float32)
    else:
        blocked, bias = mask <= torch.finfo(mask.dtype).min, mask.float()
    return bias.masked_fill(blocked, LOWEST), ~blocked.all(-1, keepdim=True)
