"""`compact` in plain torch, one gather per tensor, for any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Compacted:
    """Rows of L tokens cut to n.

    index: [B, n] int64, the position each slot came from; pads hold tokens that were dropped, the last ones of their
    row, in order. valid: [B, n] bool, False at pads; None if every row keeps n tokens. src: [B, L] int64, the slot
    that answers for each position: its own, else that of the last kept one before it, else the row's first.
    hidden: [B, n, D], pads hold the dropped tokens' states. position_ids: [B, n] or [P, B, n], or None. mask:
    [B, past + n + room], 0 at pads, the room of a static cache grown by what was dropped; or None. visual: [B, n]
    bool, False at pads; or None. deepstack: [kept_visual, W] each. cu_seqlens: [B + 1] int32, kept tokens of the rows
    before.
    """

    index: Tensor
    valid: Tensor | None
    src: Tensor
    hidden: Tensor
    position_ids: Tensor | None
    mask: Tensor | None
    visual: Tensor | None
    deepstack: list[Tensor]
    cu_seqlens: Tensor


def places(keep: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """`index`, `valid` and `src` of `Compacted`, from a mask [B, L] and its row sums, which the host knows."""
    length, n = keep.shape[1], max(counts)
    pads = n - keep.sum(1, keepdim=True)
    # A stable sort by "stays" puts the kept positions last, in order; whatever stands before them is padding.
    index = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, length - n :]
    valid = None if min(counts) == n else torch.arange(n, device=keep.device)[None] >= pads
    src = ((keep.cumsum(1) - 1).clamp(min=0) + pads).clamp(max=n - 1)
    return index, valid, src


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
    """As `kernels.compact`, arguments checked."""
    (batch, length), n = keep.shape, max(counts)
    index, valid, src = places(keep, counts)

    ids = position_ids
    if ids is not None:
        ids = ids.expand(*ids.shape[:-2], batch, length).gather(-1, index.expand(*ids.shape[:-2], batch, n))
    if mask is not None:
        new = mask[:, past : past + length].gather(1, index)
        new = new if valid is None else new.masked_fill(~valid, 0)
        room = mask[:, past + length :]
        grown = mask.new_zeros(batch, length - n if room.shape[1] else 0)
        mask = torch.cat([mask[:, :past], new, room, grown], dim=1)
    stays: Tensor | None = None
    if visual is not None:
        stays = visual.gather(1, index)
        stays = stays if valid is None else stays & valid
    layers = []
    if visual is not None and deepstack:
        # Where the kept visual tokens stand among all positions of the batch, without asking the device how many.
        where = torch.argsort((~(visual & keep)).flatten().to(torch.int8), stable=True)[:kept_visual]
        rows = (visual.flatten().cumsum(0) - 1).index_select(0, where)
        layers = [layer.index_select(0, rows) for layer in deepstack]
    return Compacted(
        index=index,
        valid=valid,
        src=src,
        hidden=hidden.gather(1, index[:, :, None].expand(batch, n, hidden.shape[2])),
        position_ids=ids,
        mask=mask,
        visual=stays,
        deepstack=layers,
        cu_seqlens=pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32),
    )
