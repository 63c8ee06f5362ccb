"""Everything of sequence length, cut to the tokens that stay: one launch instead of a gather per tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import backend_for
from . import reference
from .reference import Compacted

__all__ = ["Compacted", "compact"]


def compact(
    keep: Tensor,
    counts: Sequence[int],
    hidden: Tensor,
    position_ids: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    past: int = 0,
    visual: Tensor | None = None,
    deepstack: Sequence[Tensor] = (),
    kept_visual: int | None = None,
) -> Compacted:
    """Shorten rows of L tokens to the n = max(counts) that stay; rows that keep fewer are padded on the left.

    keep: [B, L] bool, True = stays. counts: its row sums, which the host must know already, as nobody waits for a
    device here; checked on the CPU only. hidden: [B, L, D] of any dtype. position_ids: [B or 1, L] or
    [P, B or 1, L] (M-RoPE), or None. mask: [B, K], columns [past | L | room of a static cache], 0 = nobody looks
    there, or None; 4-D masks lose rows as well as columns and are none of this kernel's business.
    visual: [B, L] bool, tokens that have rows in `deepstack`: [S, W] tensors of one shape, rows in the order of
    visual's True entries. kept_visual: how many of these stay, in all rows together; checked on the CPU only.

    Raises ValueError for shapes, dtypes and counts that do not fit, and for tensors on several devices.
    """
    _check(keep, counts, hidden, position_ids, mask, past)
    _check_deepstack(keep, visual, deepstack, kept_visual)
    tensors = [t for t in (hidden, keep, position_ids, mask, visual, *deepstack) if t is not None]
    backend = backend_for("compact", *tensors, limit=_limit(hidden, deepstack))
    arguments = (keep, counts, hidden, position_ids, mask, past, visual, deepstack, kept_visual or 0)
    if backend == "reference":
        return reference.compact(*arguments)
    from . import triton

    return triton.compact(*arguments)


def _limit(hidden: Tensor, deepstack: Sequence[Tensor]) -> str:
    batch, length = hidden.shape[:2]
    if batch > 65535 or batch * length >= 2**31 or max(t.shape[-1] for t in (hidden, *deepstack)) > 2**24:
        return f"hidden {list(hidden.shape)} does not fit one grid"
    return ""


def _check(
    keep: Tensor, counts: Sequence[int], hidden: Tensor, ids: Tensor | None, mask: Tensor | None, past: int
) -> None:
    if keep.dtype != torch.bool or keep.dim() != 2:
        raise ValueError(f"compact takes keep [B, L] bool, not {keep.dtype} {list(keep.shape)}")
    batch, length = keep.shape
    if len(counts) != batch or not all(0 <= c <= length for c in counts) or not any(counts):
        raise ValueError(f"counts={list(counts)} must be {batch} row sums of keep, in 0..{length} and not all 0")
    if keep.is_cpu and keep.sum(1).tolist() != list(counts):
        raise ValueError(f"counts={list(counts)} are not the row sums of keep, {keep.sum(1).tolist()}")
    if hidden.dim() != 3 or hidden.shape[:2] != keep.shape:
        raise ValueError(f"compact takes hidden [{batch}, {length}, D] like keep, not {list(hidden.shape)}")
    if ids is not None and (ids.dim() not in (2, 3) or ids.shape[-1] != length or ids.shape[-2] not in (1, batch)):
        raise ValueError(f"position_ids {list(ids.shape)} must be [{batch} or 1, {length}] or [P, .., ..] of these")
    if past < 0:
        raise ValueError(f"past={past} must be at least 0")
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < past + length):
        raise ValueError(f"mask {list(mask.shape)} must be [{batch}, K] with K >= past + L = {past + length}")


def _check_deepstack(keep: Tensor, visual: Tensor | None, deepstack: Sequence[Tensor], kept_visual: int | None) -> None:
    if visual is not None and (visual.dtype != torch.bool or visual.shape != keep.shape):
        raise ValueError(f"visual must be {list(keep.shape)} bool like keep, not {visual.dtype} {list(visual.shape)}")
    if not deepstack:
        return
    shapes = {(t.shape, t.dtype) for t in deepstack}
    if len(shapes) != 1 or deepstack[0].dim() != 2:
        raise ValueError(f"deepstack features must be [S, W] of one shape and dtype, not {sorted(map(str, shapes))}")
    rows = deepstack[0].shape[0]
    if visual is None or kept_visual is None or not 0 <= kept_visual <= rows:
        raise ValueError(f"deepstack features need visual and kept_visual in 0..{rows}, not kept_visual={kept_visual}")
    if keep.is_cpu and (int(visual.sum()), int((visual & keep).sum())) != (rows, kept_visual):
        raise ValueError(
            f"visual holds {int(visual.sum())} tokens, {int((visual & keep).sum())} of them kept, but deepstack has "
            f"{rows} rows and kept_visual={kept_visual}"
        )
