"""What a call on a pruned cache is told of its past: masks and position ids, in the coordinates of what is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.masks import hidden_like, hide, mask_for, tensor_mask
from ..model_adapters.base import Adapter
from . import cache as kv
from .once import once


def past_mask_2d(mask: Tensor, layer: kv.Pruned) -> Tensor:
    """A logical padding mask [B, K] in the coordinates of the stored tokens: column j + dropped is stored token j."""
    if not layer.rebuild_mask:
        return mask
    end = layer.dropped + layer.prefix
    head = mask.new_ones(mask.shape[0], end)
    if layer.valid is not None:
        head[:, layer.dropped :] = layer.valid.to(mask.dtype)
    return torch.cat([head, mask[:, end:]], dim=1)


def past_mask(mask: Tensor, layer: kv.Pruned, reference: kv.Pruned | None) -> Tensor:
    """A mask sized by the reference layer, for another layer that stores fewer (or other) tokens.

    mask: [B, K] or [B, 1, Q, K]. Static caches keep their width: what is shifted out on the left comes in as room
    on the right.
    """
    shift = layer.dropped - (reference.dropped if reference else 0)
    width = mask.shape[-1]
    if shift:
        mask = mask[..., shift:]
    if layer.rebuild_mask:
        open_ = mask.new_ones if mask.dtype == torch.bool or mask.dim() == 2 else mask.new_zeros
        head = open_((*mask.shape[:-1], layer.prefix))
        if layer.valid is not None:
            head = hide(head, layer.valid)
        mask = torch.cat([head, mask[..., layer.prefix :]], dim=-1)
    if shift and kv.is_static(layer):
        mask = torch.cat([mask, hidden_like(mask, (*mask.shape[:-1], width - mask.shape[-1]))], dim=-1)
    return mask


def with_past_mask(call: dict[str, Any], layer: kv.Pruned | None) -> dict[str, Any]:
    """The call of the base or the text model with its mask over the past in the coordinates of what `layer` stores.

    layer: the reference layer of the call's cache, if it is a pruned one.
    """
    if layer is None or not layer.rebuild_mask:
        return call
    mask = call.get("attention_mask")
    if mask is None:
        if layer.valid is None:
            return call
        tokens = call.get("inputs_embeds")
        tokens = tokens if tokens is not None else call["input_ids"]
        total = int(layer.get_seq_length()) + tokens.shape[1]
        mask = torch.ones(tokens.shape[0], total, dtype=torch.long, device=tokens.device)
    if isinstance(mask, dict):
        return {**call, "attention_mask": {kind: _over_past(m, layer) for kind, m in mask.items()}}
    return {**call, "attention_mask": _over_past(mask, layer)}


def _over_past(mask: Any, layer: kv.Pruned) -> Any:
    if mask is None:
        return None
    mask = tensor_mask(mask)
    return past_mask_2d(mask, layer) if mask.dim() == 2 else past_mask(mask, layer, layer)


def set_layer_mask(
    call: dict[str, Any], layer: kv.Pruned, reference: kv.Pruned | None, adapter: Adapter, made: dict[Any, Any]
) -> None:
    """Give one layer the mask over its own past, in place of the one sized by the reference layer.

    made: the masks of this call, which layers that store the same share.
    """
    mask = call.get("attention_mask")
    stored = (layer.valid, layer.dropped, layer.prefix, layer.rebuild_mask, kv.is_static(layer))
    if mask is not None:
        of = (mask, *stored, reference.dropped if reference else 0)
        call["attention_mask"] = once(made, of, lambda: past_mask(mask, layer, reference))
    elif layer.valid is not None:
        hidden = call["hidden_states"]
        call["attention_mask"] = once(made, stored, lambda: _mask_over(layer, hidden, adapter.attention()))


def _mask_over(layer: kv.Pruned, hidden: Tensor, attention: str) -> Tensor:
    """What stands for no mask, where the layer stores padding."""
    assert layer.valid is not None
    stored = int(layer.get_seq_length()) - layer.dropped
    valid = hidden.new_ones(hidden.shape[0], stored + hidden.shape[1], dtype=torch.bool)
    valid[:, : layer.prefix] = layer.valid
    return mask_for(attention, valid, hidden.shape[1], hidden.dtype)


def with_position_offset(call: dict[str, Any], layer: kv.Pruned) -> dict[str, Any]:
    """positions="compact": a new token's id is its logical position less what its row dropped."""
    ids, embeds = call.get("position_ids"), call["inputs_embeds"]
    if ids is None:
        ids = torch.arange(embeds.shape[1], device=embeds.device)[None] + layer.get_seq_length()
    assert layer.position_offset is not None
    return {**call, "position_ids": ids - layer.position_offset.to(ids.device)[:, None]}


class ReadOnlyCache:
    """Stands in for a cache while a layer is looked at before it runs: past keys are seen, nothing is stored."""

    def __init__(self, cache: Any, past: int) -> None:
        self._cache, self._past = cache, past

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Past and new keys and values of a layer, side by side."""
        if not self._past:
            return keys, values
        held = self._cache.layers[layer]
        past = slice(0, self._past)
        return torch.cat([held.keys[:, :, past], keys], 2), torch.cat([held.values[:, :, past], values], 2)
