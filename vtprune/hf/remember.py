"""What a prefill leaves on the cache: how much each layer stores, and what stages at decode will want to know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedCall
from ..core.method import Stage
from . import cache as kv
from .decode_selection import DecodeSelection, pick
from .prefill import Prefill


def remember(prefill: Prefill, i: int, hidden: Tensor, rope: Any, stages: list[Stage]) -> DecodeSelection | None:
    """What stages at layer i that act at decode will want to know of the visual tokens entering it."""
    state, first = prefill.prompt, next(iter(prefill.selections.values()), None)
    if first is None:
        rows = [[group for group in state.groups if group.row == row] for row in range(len(state.counts))]
        counts = [sum(group.left for group in row) for row in rows]
        totals = [sum(group.total for group in row) for row in rows]
        where = torch.full((len(rows), max(counts)), -1, dtype=torch.int64, device=hidden.device)
        for line, row, n in zip(where, rows, counts):
            line[:n] = torch.cat([line[:0], *(group.positions for group in row)]).sort().values
    else:
        where, counts, totals = first.where, first.counts, first.totals
    if not max(counts):
        return None
    place = where.clamp(min=0)
    slots = place if state.whole is None else state.whole.src.gather(1, place)
    before = slots.masked_fill(where < 0, -1) if first is None else first.kv_index_before
    selection = DecodeSelection(where, where, slots, counts, totals, before)
    if any("prefill" in s.method.phases for s in stages):
        selection.hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1])).detach()
        selection.rope = first.rope if first is not None else _ropes(prefill, rope, slots)
    return selection


def _ropes(prefill: Prefill, rope: Any, slots: Tensor) -> tuple[Tensor, ...]:
    """Rotary embeddings [.., B, V, d] of the current slots [B, V]."""
    if not isinstance(rope, tuple) or not all(torch.is_tensor(x) and x.dim() >= 3 for x in rope):
        raise UnsupportedCall(
            f"{prefill.adapter.model_type} hands its layers no rotary embeddings (cos, sin) of shape [.., B, n, d], "
            "so tokens cannot come back at decode: use a method that acts while the prompt is read"
        )
    rope = rope if prefill.inner is None else prefill.inner.cut_all(rope)
    return tuple(pick(x, slots) for x in rope)


def remembered(prefill: Prefill, i: int, selection: DecodeSelection) -> None:
    """Where what the stages at layer i left is stored from there on, counted in this call alone."""
    state, place = prefill.prompt, selection.where.clamp(min=0)
    kept = (selection.where >= 0) & state.keep.gather(1, place)
    slots = place if state.whole is None else state.whole.src.gather(1, place)
    selection.kv_index = slots.masked_fill(~kept, -1)
    if state.whole is None:
        kind = prefill.token_kind
        order = torch.arange(kind.shape[1], device=place.device).where(kind != 0, -1)
    else:
        valid = state.whole.valid
        order = state.whole.index if valid is None else state.whole.index.masked_fill(~valid, -1)
    selection.order = order
    prefill.selections[i] = selection


def shrink_cache(prefill: Prefill, cache: Any) -> None:
    """Let every layer of the cache answer for what it did not store."""
    layers, length = prefill.layers, prefill.token_kind_on_host.shape[1]
    lowered = {id(x): x[:, -1] for x in layers.position_offset if x is not None}  # rows end with a real token
    stored = {i: _stored_before(prefill, cache, i) for i in prefill.selections}
    entered = prefill.past_at(min(prefill.selections) - 1) if prefill.selections else 0
    tail, first = _text_at_end(prefill.token_kind_on_host), kv.reference_layer(cache)
    told: list[dict[str, Any]] = []
    for ran, valid, offset, heads in zip(layers.lengths, layers.valid, layers.position_offset, layers.heads):
        own = ran != layers.lengths[first] or valid is not layers.valid[first]
        rebuild = prefill.holes and ran < length
        told.append(
            {"ran": ran, "valid": valid, "rebuild_mask": rebuild, "own_tokens": own, "heads": heads}
            | {"layer_position_offset": lowered.get(id(offset))}
        )
    call: dict[str, Any] = {
        "past": prefill.past,
        "fed": length,
        "tail": tail,
        "position_offset": prefill.position_offset,
    }
    made: dict[Any, Any] = {}
    # All of them change, also those that were not cut: none may be cropped where another refuses.
    for i in range(min(len(cache.layers), len(told))):
        kv.shrink(cache, i, **told[i], **call, made=made)
    if prefill.selections:
        _leave_selections(prefill, cache, entered, stored)
    kv.set_gate(cache)


def _leave_selections(prefill: Prefill, cache: Any, entered: int, stored: dict[int, Tensor]) -> None:
    """Put what stages at decode will know on the layers where they stand, behind what earlier turns left there.

    entered: tokens of earlier calls in the layer before the first such stage. stored: for each of the layers of those
    stages, which tokens of earlier calls it holds.
    """
    past = prefill.past
    for i, selection in prefill.selections.items():
        layer: Any = kv.state(cache, i)
        if layer is None:  # nothing is stored under gradient checkpointing
            continue
        before = stored[i]
        later = replace(
            selection,
            where=selection.where + past * (selection.where >= 0),
            order=torch.cat([before, selection.order + past * (selection.order >= 0)], 1),
            kv_index=selection.kv_index + before.shape[1] * (selection.kv_index >= 0),
            kv_index_before=selection.kv_index_before + entered * (selection.kv_index_before >= 0),
            memory=[],
        )
        layer.selection = later if layer.selection is None else layer.selection.joined(later)


def _text_at_end(host: Tensor) -> int:
    """How many of the last tokens are text in every row: these are stored one by one as they were fed."""
    place = torch.arange(1, host.shape[1] + 1)
    return host.shape[1] - int((((host > 1) | (host == 0)) * place).max())


def _stored_before(prefill: Prefill, cache: Any, i: int) -> Tensor:
    """[B, P] positions as fed of what layer i stored before this call, -1 for padding."""
    was, kind = kv.state(cache, i), prefill.token_kind
    order = torch.arange(prefill.past, device=kind.device).expand(len(kind), -1)
    if prefill.real_past is not None:
        order = order.where(prefill.real_past, -1)
    if was is None:
        return order
    order = order[:, was.dropped :]
    if was.selection is not None:
        return torch.cat([was.selection.order, order[:, was.selection.order.shape[1] :]], 1)
    if was.valid is not None:
        head = order[:, : was.prefix].where(was.valid, -1)
        order = torch.cat([head, order[:, was.prefix :]], 1)
    return order
