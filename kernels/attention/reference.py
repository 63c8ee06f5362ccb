"""Softmax rows of attention and their column sums in plain torch, a cache-sized block of the map at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..dispatch import recorded

CACHE_ELEMENTS = 1 << 18  # 1 MiB of float32: a block is written and read again before it leaves the cache
DEVICE_ELEMENTS = 1 << 24  # 64 MiB: elsewhere the launches count, not the cache
ROWS = 128  # queries of a block on the CPU at most, or 1/16 of them: it is cut to the keys that they see

LOWEST = torch.finfo(torch.float32).min / 2  # added to a score it leaves a weight of 0, and never overflows


class Room:
    """Memory for the blocks of one call, used again and again: to touch fresh pages costs more than the product does.

    There is none where gradients flow, which have to find each block as it was, or where operations are recorded.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        grows = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        self.held: dict[Any, Tensor] | None = None if grows or recorded() else {}

    def take(self, place: Any, like: Tensor, *shape: int) -> Tensor | None:
        """Contiguous float32 memory on a tensor's device; what lies there counts until the place is taken again."""
        if self.held is None:
            return None
        held, size = self.held.get(place), prod(shape)
        if held is None or held.numel() < size:
            held = self.held[place] = like.new_empty(size, dtype=torch.float32)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Seen:
    """What a mask lets some queries see: keys `cols` at most, of which all see those outside `part`, too.

    bias: what to add to the scores in `part`, [.., queries or 1, keys of it or 1].
    rows: [.., queries or 1, 1] bool, the queries that see anything; None: all.
    """

    cols: slice
    part: slice
    bias: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Some rows of the map: `at` is their place (batch, heads, queries), the tensors are what they are made of."""

    at: tuple[slice, slice, slice]
    q: Tensor  # [b, h, queries, d] float32
    k: Tensor  # [b * groups, keys that are seen, d] float32
    seen: Seen

    def rows(self, scaling: float, room: Room, place: int = 0) -> Tensor:
        """[b, h, queries, keys that are seen] softmax; rows that attend to nothing hold some finite distribution."""
        shape = (*self.q.shape[:3], self.k.shape[1])
        # Heads of one group are stacked along the rows: the keys are read once and never repeated.
        stacked = (self.q * scaling).reshape(self.k.shape[0], -1, self.q.shape[-1])
        room_for_scores = room.take("scores", stacked, *stacked.shape[:2], shape[-1])
        scores = torch.bmm(stacked, self.k.transpose(1, 2), out=room_for_scores).view(shape)
        if self.seen.bias is not None:
            scores[..., self.seen.part] += self.seen.bias
        return torch.softmax(scores, -1, out=room.take(place, scores, *shape))


def attention_rows(q_rows: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """`kernels.attention_rows` for checked arguments."""
    out = k.new_zeros(*q_rows.shape[:3], k.shape[2], dtype=torch.float32)
    room = Room(q_rows, k, mask)
    for part in blocks(q_rows, k, mask):
        weights, rows = part.rows(scaling, room), part.seen.rows
        place = (*part.at, part.seen.cols)
        out[place] = weights if rows is None else weights * rows
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
    room = Room(q, k, mask)
    for part in blocks(q, k, mask, rows=block):
        place = (*part.at[:2], part.seen.cols)
        out[place] += weighed(weights[part.at], part, part.rows(scaling, room))
    return out


def weighed(weights: Tensor, part: Block, rows: Tensor) -> Tensor:
    """[b, h, keys that are seen]: the rows of a block times their weights [b, h, queries], added up."""
    weight = weights[..., None, :]
    if part.seen.rows is not None:
        weight = weight * part.seen.rows.transpose(-1, -2)
    return (weight @ rows)[..., 0, :]


def blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, *, rows: int | None = None, elements: int | None = None
) -> Iterator[Block]:
    """Cut the map into blocks of about `elements` (None: by device) entries, all queries of some heads in turn.

    rows: queries in a block; None picks them. Heads that share their keys stay together unless a block of them is too
    large, so that the keys are read and converted once. What no query of a block sees is left out, on the CPU, where
    the host may look at the mask.
    """
    if recorded():  # one block, whatever the sizes will be
        whole = slice(None)
        seen = Seen(whole, whole) if mask is None else Seen(whole, whole, *_bias(mask))
        yield Block((slice(None),) * 3, q.float(), k.float().flatten(0, 1), seen)
        return
    (batch, heads, queries, _), (_, groups, n, d) = q.shape, k.shape
    share, on_host = heads // groups, q.device.type == "cpu"
    if elements is None:
        elements = CACHE_ELEMENTS if on_host else DEVICE_ELEMENTS
    if rows is None:
        rows = min(max(1, elements // (share * n)), max(ROWS, queries // 16) if on_host else queries)
    rows = min(rows, queries)
    scores = share * rows * n
    together = share * min(max(1, elements // scores), groups) if scores <= elements else 1
    # One sample's keys are usually a view of [tokens, heads, d]; several at once would have to be copied to multiply.
    samples = max(1, elements // (groups * (scores + n * d))) if together == heads else 1
    known: dict[int, Seen] = {}  # by the first query of a block; it is the same for all heads
    for b, h in product(range(0, batch, samples), range(0, heads, together)):
        known = known if h and (mask is None or mask.shape[1] == 1) else {}
        shared = slice(h // share, (min(h + together, heads) - 1) // share + 1)
        keys = k[b : b + samples, shared].float().flatten(0, 1).contiguous()
        for r in range(0, queries, rows):
            at = (slice(b, b + samples), slice(h, h + together), slice(r, r + rows))
            if r not in known:
                known[r] = _seen(mask, at, n)
            if known[r].cols != slice(0, 0):
                yield Block(at, q[at].float(), keys[:, known[r].cols], known[r])


def looks_at(mask: Tensor | None) -> bool:
    """True if the host reads what each query sees: where each has a mask of its own, on the CPU."""
    return mask is not None and mask.shape[2] > 1 and mask.device.type == "cpu"


def _seen(mask: Tensor | None, at: tuple[slice, slice, slice], n: int) -> Seen:
    """What the queries of a block see of n keys."""
    if mask is None:
        return Seen(slice(0, n), slice(0, 0))
    here = mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, at))]
    if not looks_at(mask):
        return Seen(slice(0, n), slice(0, n), *_bias(here))
    boolean = mask.dtype == torch.bool
    hidden = ~here if boolean else here <= torch.finfo(mask.dtype).min
    limited = hidden if boolean else here != 0
    cols = _hull(1 - hidden.flatten(0, 2).view(torch.uint8).amin(0).expand(n))
    part = _hull(limited.flatten(0, 2).view(torch.uint8).amax(0).expand(n)[cols])
    if part.start == part.stop:
        return Seen(cols, part)
    # Where some queries see nothing, no key is seen by all, and all keys are in the part.
    bias, rows = _bias(here if mask.shape[-1] == 1 else here[..., cols][..., part])
    return Seen(cols, part, bias, rows if part.stop - part.start == cols.stop - cols.start else None)


def _hull(which: Tensor) -> slice:
    """From the first to the last place of a vector that is not 0."""
    places = which.nonzero()
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _bias(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What to add to the scores, in float32, and which rows attend to anything."""
    if mask.dtype == torch.bool:
        blocked, bias = ~mask, mask.new_zeros(mask.shape, dtype=torch.float32)
    else:
        blocked, bias = mask <= torch.finfo(mask.dtype).min, mask.float()
    return bias.masked_fill(blocked, LOWEST), ~blocked.all(-1, keepdim=True)
