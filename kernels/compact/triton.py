"""`compact` in one launch: a program per row, block of positions and block of columns finds its slots by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Compacted

BLOCK_L, BLOCK_D = 16, 1024  # positions and columns of a program
SCAN = 4096  # bytes of `keep` counted at once


def compact(
    keep: Tensor,
    counts: Sequence[int],
    hidden: Tensor,
    position_ids: Tensor | None,
    mask: Tensor | None,
    past: int,
    visual: Tensor | None,
    deepstack: Sequence[Tensor],
    kept_visual: int,
) -> Compacted:
    """As `reference.compact`."""
    (batch, length), n = keep.shape, max(counts)
    index = keep.new_empty(batch, n, dtype=torch.int64)
    valid = None if min(counts) == n else keep.new_empty(batch, n)
    src = keep.new_empty(batch, length, dtype=torch.int64)
    cu_seqlens = keep.new_empty(batch + 1, dtype=torch.int32)
    out = hidden.new_empty(batch, n, hidden.shape[2])

    ids, ids_out, planes = None, None, 0
    strides: tuple[int, ...] = (0, 0, 0)
    if position_ids is not None:
        ids = position_ids.expand(*position_ids.shape[:-2], batch, length)
        ids_out = ids.new_empty(*ids.shape[:-1], n)
        ids = ids if ids.dim() == 3 else ids[None]
        strides, planes = ids.stride(), ids.shape[0]
    mask_out, room = None, 0
    mask_strides: tuple[int, ...] = (0, 0)
    if mask is not None:
        room, mask_strides = mask.shape[1] - past - length, mask.stride()
        mask_out = mask.new_empty(batch, past + n + (room + length - n if room else 0))
    stays = None if visual is None else visual.new_empty(batch, n)
    layers = tuple(layer.contiguous() for layer in deepstack)
    layers_out = tuple(layer.new_empty(kept_visual, layer.shape[1]) for layer in layers)
    rows, width = layers[0].shape if layers else (0, 0)

    columns = max(hidden.shape[2], width)
    block_d = min(BLOCK_D, triton.next_power_of_2(max(columns, 1)))
    grid = (triton.cdiv(length, BLOCK_L), batch, max(1, triton.cdiv(columns, block_d)))
    with torch.cuda.device_of(hidden):
        _compact[grid](
            _bytes(keep.contiguous()), index, _bytes(valid), src, cu_seqlens, length, n,
            _bytes(hidden), _bytes(out), *hidden.stride(), hidden.shape[2],
            _bytes(ids), _bytes(ids_out), *strides, planes,
            _bytes(mask), _bytes(mask_out), *mask_strides, past, room,
            None if visual is None else _bytes(visual.contiguous()), _bytes(stays),
            tuple(map(_bytes, layers)), tuple(map(_bytes, layers_out)), rows, kept_visual, width,
            LAYERS=len(layers), SCAN=SCAN, BLOCK_L=BLOCK_L, BLOCK_D=block_d, num_warps=8,
        )  # fmt: skip
    return Compacted(index, valid, src, out, ids_out, mask_out, stays, list(layers_out), cu_seqlens)


def _bytes(x: Tensor | None) -> Tensor | None:
    """Bools as the bytes they are."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


# What differs from prompt to prompt must not compile anew.
@triton.jit(
    do_not_specialize=["L", "N", "ids_p", "ids_b", "planes", "mask_b", "past", "room", "S", "S_out"],
    do_not_specialize_on_alignment=["keep", "visual"],
)
def _compact(
    keep, index, valid, src, cu_seqlens, L, N,
    hidden, hidden_out, hidden_b, hidden_l, hidden_d, D,
    ids, ids_out, ids_p, ids_b, ids_l, planes,
    mask, mask_out, mask_b, mask_k, past, room,
    visual, visual_out,
    layers, layers_out, S, S_out, W,
    LAYERS: tl.constexpr, SCAN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, row, part = tl.program_id(0) * BLOCK_L, tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = row * L  # of this row, where rows stand one behind the other
    leads = (first == 0) & (part == 0)

    # Counting the bytes before a block costs less than a launch of its own for the prefix sums.
    earlier, kept, total, seen, stay = 0, 0, 0, 0, 0
    start = tl.where(leads, 0, begin)
    if LAYERS > 0:  # deepstack rows are numbered through the whole batch, so the count begins at its first row
        start = start * 0
    for at in range(start, begin + L, SCAN):
        i = at + tl.arange(0, SCAN)
        k = tl.load(keep + i, mask=i < begin + L, other=0).to(tl.int32)
        before = i < begin + first
        earlier += tl.sum(tl.where(i < begin, k, 0), axis=0)
        total += tl.sum(tl.where(i < begin, 0, k), axis=0)
        kept += tl.sum(tl.where((i >= begin) & before, k, 0), axis=0)
        if LAYERS > 0:
            v = tl.load(visual + i, mask=before, other=0).to(tl.int32)
            seen += tl.sum(v, axis=0)
            stay += tl.sum(v * k, axis=0)

    i = first + tl.arange(0, BLOCK_L)
    live = i < L
    k = tl.load(keep + begin + i, mask=live, other=0).to(tl.int32)
    kept += tl.cumsum(k, axis=0) - k  # kept tokens of the row before each position
    # Kept tokens fill the row from the right; the last dropped ones stand in for padding on its left.
    slot = tl.where(k > 0, kept + N - total, i - kept - (L - N))
    goes = live & (slot >= 0) & (slot < N)
    if part == 0:
        out = row * N + slot
        tl.store(index + out, i.to(tl.int64), mask=goes)
        if valid is not None:
            tl.store(valid + out, k.to(tl.uint8), mask=goes)
        answers = tl.minimum(tl.maximum(kept + k - 1, 0) + N - total, N - 1)
        tl.store(src + begin + i, answers.to(tl.int64), mask=live)
        if ids is not None:
            from_, to = ids + row * ids_b + i.to(tl.int64) * ids_l, ids_out + out
            for _ in range(planes):
                tl.store(to, tl.load(from_, mask=goes), mask=goes)
                from_ += ids_p
                to += tl.num_programs(1).to(tl.int64) * N
        if mask is not None:
            _cut_mask(mask + row * mask_b, mask_out, mask_k, row, i, slot, goes, k, first, L, N, past, room, BLOCK_L)
        if visual is not None:
            v = tl.load(visual + begin + i, mask=live, other=0).to(tl.int32)
            tl.store(visual_out + out, (v * k).to(tl.uint8), mask=goes)
    if leads:
        tl.store(cu_seqlens + row + 1, earlier + total)
        tl.store(cu_seqlens, 0, mask=row == 0)

    cols = part * BLOCK_D + tl.arange(0, BLOCK_D)
    from_ = hidden + row * hidden_b + i.to(tl.int64)[:, None] * hidden_l + cols.to(tl.int64)[None, :] * hidden_d
    to = hidden_out + (row * N + slot)[:, None] * D + cols[None, :]
    move = goes[:, None] & (cols < D)[None, :]
    tl.store(to, tl.load(from_, mask=move), mask=move)
    if LAYERS > 0:
        v = tl.load(visual + begin + i, mask=live, other=0).to(tl.int32)
        from_row = seen + tl.cumsum(v, axis=0) - v
        to_row = stay + tl.cumsum(v * k, axis=0) - v * k
        move = ((v * k > 0) & (from_row < S) & (to_row < S_out))[:, None] & (cols < W)[None, :]
        from_ = from_row.to(tl.int64)[:, None] * W + cols[None, :]
        to = to_row.to(tl.int64)[:, None] * W + cols[None, :]
        for j in tl.static_range(LAYERS):
            tl.store(layers_out[j] + to, tl.load(layers[j] + from_, mask=move), mask=move)


@triton.jit
def _cut_mask(mask, mask_out, mask_k, row, i, slot, goes, k, first, L, N, past, room, BLOCK_L: tl.constexpr):
    """The kept columns of a block, and its share of those that stand before and behind them."""
    grown = tl.where(room > 0, L - N, 0)
    rest = past + room + grown
    to = mask_out + row * (rest + N)
    new = tl.load(mask + (past + i).to(tl.int64) * mask_k, mask=goes & (k > 0), other=0)
    tl.store(to + past + slot, new, mask=goes)
    for at in range(first, rest, tl.num_programs(0) * BLOCK_L):
        r = at + tl.arange(0, BLOCK_L)
        column = tl.where(r < past, r, r + L)
        old = tl.load(mask + column.to(tl.int64) * mask_k, mask=r < past + room, other=0)
        tl.store(to + tl.where(r < past, r, r + N), old, mask=r < rest)
