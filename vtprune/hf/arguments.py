"""What has the length of the prompt among the arguments of the text model and of its layers, cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.compaction import Compaction
from ..core.errors import UnsupportedCall
from ..core.masks import hidden_like, hide, in_window, mask_for, tensor_mask
from ..core.prompt import Merge
from ..kernels import compact, recording
from . import cache as kv
from .plan import LINEAR
from .prefill import Prefill

# Arguments of text models that have the sequence length and no say in which tokens are visual.
CUT_AS_IDS = ("token_type_ids", "mm_token_type_ids")
OF_THE_HEAD = ("labels", "shift_labels", "logits_to_keep", "num_items_in_batch")  # as long as logits are again
CUT_BEFORE = ("attention_mask", "position_ids", "inputs_embeds", "deepstack_visual_embeds", "visual_pos_masks")


# -- of the text model ------------------------------------------------------------------------------------------------


def cut_text_call(prefill: Prefill, call: dict[str, Any]) -> dict[str, Any]:
    """Every argument of the text model that has the sequence length, cut; in one launch, but for 4-D masks."""
    state = prefill.prompt
    embeds, device = state.hidden, state.hidden.device
    mask, ids = call.get("attention_mask"), call.get("position_ids")
    flat = mask.to(device) if torch.is_tensor(mask) and mask.dim() == 2 else None
    where, deepstack = call.get("visual_pos_masks"), call.get("deepstack_visual_embeds")
    visual, features = None, []
    fused = where is not None and deepstack is not None and not state.merges
    if fused:
        visual = (where[..., 0] if where.dim() == 3 else where).to(device)  # type: ignore
        features = [layer.to(device) for layer in deepstack]  # type: ignore
    if ids is None:
        ids = torch.arange(embeds.shape[1], device=device)[None] + prefill.past
    with recording(state.kernels):
        cut = compact(
            state.keep, state.counts, embeds, ids.to(device), flat,
            past=0 if flat is None else flat.shape[1] - embeds.shape[1],
            visual=visual,
            deepstack=features,
            kept_visual=sum(state.counts) - prefill.others,
        )  # fmt: skip
    state.whole = Compaction(cut.index, cut.valid, cut.src)
    note_lengths(prefill, state.whole, 0)
    assert cut.position_ids is not None
    new = {**call, "inputs_embeds": cut.hidden, "position_ids": _positions(prefill, state.whole, cut.position_ids)}
    new["attention_mask"] = cut.mask if flat is not None else _masks(prefill, state.whole, mask)
    if fused:
        new["deepstack_visual_embeds"], new["visual_pos_masks"] = cut.deepstack, cut.visual
    elif deepstack is not None and where is not None:
        parts = [_cut_features(where, layer, [(state.merges, state.whole)]) for layer in deepstack]
        new["deepstack_visual_embeds"], new["visual_pos_masks"] = [rows for _, rows in parts], parts[0][0]
    _cut_rest(prefill, state.whole, new)
    return new


def note_lengths(prefill: Prefill, whole: Compaction, first: int) -> None:
    """From layer `first` on, layers run on what a cut left."""
    if whole.valid is not None and prefill.past and prefill.plan.linear:
        raise UnsupportedCall(
            f"rows keep different numbers of tokens ({prefill.prompt.counts}) behind a cache, and the linear-attention "
            f"layers of {prefill.adapter.model_type} would run over the padding between: continue the rows one by one"
        )
    layers, left, n = prefill.layers, prefill.plan.depth - first, whole.index.shape[1]
    layers.lengths[first:], layers.valid[first:] = [n] * left, [whole.valid] * left


def _positions(prefill: Prefill, cut: Compaction, ids: Tensor) -> Tensor:
    """Position ids of the kept tokens: the original ones as cut, or renumbered (positions="compact")."""
    if not prefill.plan.renumber:
        return ids
    rank = torch.arange(cut.n, device=ids.device)[None]
    real = cut.valid if cut.valid is not None else torch.ones_like(cut.index, dtype=torch.bool)
    pads = (~real).sum(1, keepdim=True)
    first = ids.expand(len(real), -1).gather(1, pads)
    renumbered = (first + rank - pads).clamp(min=0)
    prefill.position_offset = (ids.expand(len(real), -1) - renumbered)[:, -1]
    return renumbered


def _masks(prefill: Prefill, cut: Compaction, mask: Any) -> Any:
    """The mask of the text model, cut, in the form in which it came; made, where transformers would misread none."""
    if isinstance(mask, dict):
        made = {LINEAR: cut.valid}  # it knows padding only
        new = {
            kind: _cut_mask(prefill, cut, m) if m is not None else made[kind] if kind in made else causal_mask(prefill)
            for kind, m in mask.items()
        }
        window = getattr(prefill.adapter.text.config, "sliding_window", None)
        sliding = new.get("sliding_attention")
        if window and sliding is not None:
            new["sliding_attention"] = in_window(sliding, new.get("full_attention"), window)
        return new
    if mask is not None:
        return _cut_mask(prefill, cut, mask)
    # Without a mask transformers takes gaps in the position ids for packed sequences.
    real = torch.ones(cut.index.shape, dtype=torch.long, device=cut.index.device)
    past = real.new_ones(real.shape[0], prefill.past)
    return torch.cat([past, real if cut.valid is None else hide(real, cut.valid)], dim=1)


def _cut_mask(prefill: Prefill, cut: Compaction, mask: Any, layer: int = 0) -> Tensor:
    mask = tensor_mask(mask)
    return cut.cut_mask(mask, prefill.past_columns(mask, layer, cut.length))


def causal_mask(prefill: Prefill, layer: int | None = None) -> Tensor | None:
    """The mask of a layer that was given none, where rows hold padding now: [B, K] for flash, else 4-D.

    layer: one behind a stage inside the LLM; None for what the text model is given for all of a kind.
    """
    state = prefill.prompt
    assert state.whole is not None
    valid = state.whole.valid
    if valid is None:
        return None
    i = kv.reference_layer(prefill.cache) if layer is None else layer
    held = getattr(prefill.cache, "layers", ())
    stored = prefill.past_at(i)
    room = held[i].max_cache_len if i < len(held) and kv.is_static(held[i]) else 0
    key = ("causal", len(state.results), stored, room)
    if key not in prefill.memo:
        keys = torch.nn.functional.pad(valid, (stored, 0), value=True)
        if (before := getattr(kv.state(prefill.cache, i), "valid", None)) is not None:
            keys[:, : before.shape[1]] = before
        mask = mask_for(prefill.adapter.attention(), keys, valid.shape[1], prefill.dtype)
        if mask.dim() == 4 and room:  # what a static layer hands out is as wide as all it has room for
            rest = hidden_like(mask, (*mask.shape[:-1], max(0, room - mask.shape[-1])))
            mask = torch.cat([mask, rest], dim=-1)
        prefill.memo[key] = mask
    return prefill.memo[key]


def _cut_rest(prefill: Prefill, cut: Compaction, call: dict[str, Any]) -> None:
    """Known arguments of sequence length; an unknown one would go out of step, so it is refused."""
    length = cut.src.shape[1]
    for name, value in call.items():
        if not torch.is_tensor(value) or value.dim() < 1 or name in CUT_BEFORE or name in OF_THE_HEAD:
            continue
        if name in CUT_AS_IDS:
            if value.shape[1] == length:
                call[name] = cut.cut(value, 1)
        elif length in value.shape[:3] and length > 1:
            raise UnsupportedCall(
                f"the text model takes {name!r} of shape {tuple(value.shape)}, which has the sequence length "
                f"{length}: the adapter of {prefill.adapter.model_type} does not know how to cut it"
            )


# -- visual features that the text model adds after its first layers (Qwen3-VL) ---------------------------------------


def cut_features(prefill: Prefill, where: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [S, D] of the True positions of where [B, L] as the text model has them, for the layer running."""
    return _cut_features(where, features, prefill.inner_cuts) if prefill.inner_cuts else (where, features)


def _cut_features(where: Tensor, features: Tensor, cuts: list[tuple[list[Merge], Compaction]]) -> tuple[Tensor, Tensor]:
    """Features [S, D] of the True positions of where [B, L] (or [B, L, D]) and those positions, after some cuts.

    A merged token gets its members' features by the weights that merged their states: had they been added before the
    merge, it would hold the same.
    """
    where = where[..., 0] if where.dim() == 3 else where
    full = features.new_zeros(*where.shape, features.shape[-1])
    full[where] = features
    for merges, c in cuts:
        for row, slots, answer in merges:
            full[row, slots[answer.idx]] = answer.apply(full[row, slots])
        full, where = c.cut(full, 1), c.cut(where, 1)
        where = where if c.valid is None else where & c.valid.to(where.device)
    return where, full[where]


# -- of a layer behind a stage ----------------------------------------------------------------------------------------


def cut_layer_call(prefill: Prefill, layer: int, call: dict[str, Any]) -> None:
    """Give a layer behind a stage the mask and positions of the tokens that are left."""
    cut = prefill.inner
    assert cut is not None
    placed: dict[str, Any] = {k: call[k] for k in ("position_embeddings", "position_ids") if k in call}
    call |= _once(prefill, placed, cut.cut_all)
    mask = call.get("attention_mask")
    if mask is not None:
        cut_mask = partial(_cut_mask, prefill, cut, layer=layer)
        call |= _once(prefill, {"attention_mask": mask}, lambda found: {k: cut_mask(m) for k, m in found.items()})
    elif cut.valid is not None and prefill.plan.layer_types[layer] == LINEAR:
        call["attention_mask"] = cut.valid
    elif cut.valid is not None:
        call["attention_mask"] = causal_mask(prefill, layer)


def _once(prefill: Prefill, values: dict[str, Any], cut: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Layers share their arguments: cut the same objects once per stage (and keep them alive while ids are a key)."""
    key = (*map(id, values.values()), len(prefill.prompt.results))
    if key not in prefill.memo:
        prefill.memo[key] = (values, cut(values))
    found: dict[str, Any] = prefill.memo[key][1]
    return found
