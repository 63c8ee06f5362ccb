"""A call of the base model: is there something to prune, and what is known of the features it brings?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedCall
from ..core.result import Last
from ..model_adapters.entries import Features
from . import cache as kv
from . import packed
from .checks import check_call, check_guesses
from .past import with_past_mask
from .prefill import Prefill

if TYPE_CHECKING:
    from .session import Patch

# Arguments that tell the grids of images and videos.
GRIDS = ("image_grid_thw", "video_grid_thw", "image_sizes")
MERGED = (
    "inputs_embeds came without pixel values, encoded features or mm_token_type_ids: if features are merged into them, "
    "nothing tells where, and nothing was pruned"
)


def begin_base_call(
    patch: Patch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the base model runs: its arguments, in which a mask over the past may be another."""
    adapter = patch.adapter
    call = adapter.bind(module, args, kwargs)
    tokens = call.get("input_ids")
    ids, tokens = tokens is not None, tokens if tokens is not None else call.get("inputs_embeds")
    if tokens is not None and tokens.shape[1] > 1:  # decode steps leave here: nothing to prune
        given = adapter.given(call)
        kinds = adapter.token_kinds(call, given) if given or not ids else None
        check_call(patch, call, tokens, bool(given))
        if kinds is not None:
            call = _begin_prefill(patch, call, kinds, given)
        elif not ids:
            _without_places(patch, call)
    if patch.plan.masks_in_base:
        cache = call.get(kv.NAME)
        call = with_past_mask(call, None if cache is None else kv.state(cache, kv.reference_layer(cache)))
    return (args, kwargs) if call is kwargs else ((), call)


def may_prune(patch: Patch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for a call of the base model that is a prompt with features, or embeddings that may hold some."""
    call = patch.adapter.bind(module, args, kwargs)
    ids = call.get("input_ids")
    tokens = ids if ids is not None else call.get("inputs_embeds")
    return tokens is not None and tokens.shape[1] > 1 and (ids is None or bool(patch.adapter.given(call)))


def _may_hold_samples(call: dict[str, Any]) -> bool:
    """False where nothing among the arguments could tell several samples in a row apart, as in most calls."""
    mask = call.get("attention_mask")
    told = [name for name in (*packed.LENGTHS, "position_ids") if call.get(name) is not None]
    return bool(told) or (mask is not None and not (torch.is_tensor(mask) and mask.dim() == 2))


def _begin_prefill(patch: Patch, call: dict[str, Any], kinds: Tensor, given: list[str]) -> dict[str, Any]:
    """Start to prune this prompt, whose tokens are of the kinds [B, L]; the call that goes on."""
    local, keeps_all = patch.local, patch.plan.keeps_all
    if not keeps_all and _may_hold_samples(call):
        call, kinds = _unpack(patch, call, kinds)
    local.features = _brought(patch, call, given)
    prefill = local.prefill = Prefill(patch.adapter, patch.plan, kinds, notes=list(patch.notes))
    prefill.start_host_copies(call, local.prompt_length)
    if prefill.behind and prefill.cache is not None and not keeps_all:
        check_guesses(patch)
    return call


def _without_places(patch: Patch, call: dict[str, Any]) -> None:
    """A prompt as embeddings without features, of which nothing tells where features were merged into them."""
    if patch.adapter.types_of(call) is not None:
        return
    named = [name for name in GRIDS if name in _told(patch, call)]
    if named and any(not stage.keeps_all for stage in patch.plan.stages):
        raise UnsupportedCall(
            f"this call has {', '.join(named)} and inputs_embeds without placeholders or pixel values, so features "
            "seem to be merged already, and nothing tells where: pass mm_token_type_ids (0 text, 1 image, 2 "
            "video), or input_ids with mm_encoder_outputs"
        )
    patch.local.last = patch.latest = Last.untouched(call["inputs_embeds"], patch.plan.depth, MERGED)


def _told(patch: Patch, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of this call, and those that `generate` kept from the model."""
    return {**patch.local.told, **{k: v for k, v in call.items() if v is not None}}


# -- features that were there before this call ------------------------------------------------------------------------


def recognised(patch: Patch, call: dict[str, Any]) -> dict[str, Any]:
    """The grids that a call of `generate` was given; features it brings will be found again."""
    ends = ("_grid_thw", "_sizes", "_aspect_ratio")
    told = {k: v for k, v in call.items() if k.endswith(ends) and v is not None}
    encoded = call.get("mm_encoder_outputs")
    for modality, output in encoded.items() if isinstance(encoded, Mapping) else ():
        # Beams repeat the entries later on, so they are counted now.
        known = None if output is None else _known(patch, modality, told, output)
        if known is not None:
            patch.encoded.add(output, known)
    return told


def _brought(patch: Patch, call: dict[str, Any], given: list[str]) -> dict[str, Features | None]:
    """What is known of features that were there before this call; pixels are encoded in the course of it.

    given: the modalities whose pixels or features the call carries.
    """
    encoded, adapter = call.get("mm_encoder_outputs"), patch.adapter
    if not given:
        told = _told(patch, call)
        return {m: adapter.brought(m, told, None) for m in adapter.token_ids}
    if not isinstance(encoded, Mapping):
        return {}
    told = _told(patch, call)  # recognised, not taken for the last
    return {m: _known(patch, m, told, output) for m, output in encoded.items() if output is not None}


def _known(patch: Patch, modality: str, told: dict[str, Any], output: Any) -> Features | None:
    found = patch.encoded.find(output)
    return patch.adapter.brought(modality, told, output) if found is None else found


# -- several samples in a row -----------------------------------------------------------------------------------------


def _unpack(patch: Patch, call: dict[str, Any], kinds: Tensor) -> tuple[dict[str, Any], Tensor]:
    """A call whose rows hold several samples, with each in a row of its own; its kinds of tokens."""
    caches = _caches(patch, call)
    samples = packed.find(call, kinds, patch.adapter, caches=caches)
    if samples is None:
        # What is said of rows that hold one sample each would be out of step with cut rows, and adds nothing.
        told = [name for name in packed.LENGTHS if name in call]
        return {k: v for k, v in call.items() if k not in told} if told else call, kinds
    if caches:
        packed.refuse_cache(samples)
    patch.local.samples = samples
    call = packed.unpack(call, samples, (kinds.shape[0], kinds.shape[1]), patch.plan.linear)
    return call, samples.unpack(kinds)


def _caches(patch: Patch, call: dict[str, Any]) -> bool:
    """True if this call stores keys and values."""
    use, text = call.get("use_cache"), patch.adapter.text
    if use is None:
        use = getattr(text.config, "use_cache", False)
    again = text.training and text.gradient_checkpointing and torch.is_grad_enabled()
    return call.get(kv.NAME) is not None or bool(use and not again)
