"""The hooks on the text model and its decoder layers: they cut arguments, and restore the length of the output.

Each is a function of the patch, which `functools.partial` binds: a copied model's hooks then hold the copied patch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedCall, UnsupportedModel
from . import cache as kv
from . import decode
from .arguments import cut_features, cut_layer_call, cut_text_call
from .attention_probe import HEADS, DryRunDone
from .checks import check_cache_of_past, check_checkpointing, check_features, check_guesses, check_room
from .compilers import outside
from .layers import run_layer
from .look import hand_over
from .once import once
from .past import ReadOnlyCache, set_layer_mask, with_past_mask, with_position_offset
from .prefill import Prefill, keep_all, open_prompt, replaced, report, run_before_llm
from .remember import shrink_cache
from .slots import PromptSlots

if TYPE_CHECKING:
    from .session import Patch


Hook = TypeVar("Hook", bound=Callable[..., Any])


def untraced_while_pruning(hook: Hook) -> Hook:
    """The function of a patch, which a compiler does not trace while this thread prunes a prompt."""
    plain = outside(hook)

    @wraps(hook)
    def chosen(patch: Patch, *args: Any, **kwargs: Any) -> Any:
        return plain(patch, *args, **kwargs) if patch.local.prefill is not None else hook(patch, *args, **kwargs)

    return cast(Hook, chosen)


# -- the text model ---------------------------------------------------------------------------------------------------


@untraced_while_pruning
def before_text(patch: Patch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Masks and positions over a pruned past; then the units of a prompt, the stages before the LLM, and the cut."""
    if not patch.local.depth:  # called without the base model
        patch.check_still_in_place()
        patch.local.clear()
    call = kwargs if not args and kv.NAME in kwargs else patch.adapter.bind(module, args, kwargs)
    cache = call.get(kv.NAME)
    held = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, kv.Pruned)]
    patch.local.pruned_past, patch.local.own_arguments = bool(held), any(layer.own_arguments for layer in held)
    if held:
        call = _over_past(patch, call, cache)
    prefill = patch.local.prefill
    if prefill is not None and call.get("inputs_embeds") is not None:
        elsewhere = open_prompt(prefill, call, patch.local.features)
        if patch.plan.keeps_all:
            keep_all(prefill)
        else:
            call = _prune(patch, prefill, call, elsewhere)
    return None if call is kwargs else ((), call)


def _over_past(patch: Patch, call: dict[str, Any], cache: Any) -> dict[str, Any]:
    """What is said of the past, in the coordinates of what the cache stores."""
    check_cache_of_past(patch, cache)
    _open_step(patch, cache, call)
    layer = kv.state(cache, kv.reference_layer(cache))
    if layer is None:
        return call
    if not patch.plan.masks_in_base:
        call = with_past_mask(call, layer)
    return call if layer.position_offset is None else with_position_offset(call, layer)


def _open_step(patch: Patch, cache: Any, call: dict[str, Any]) -> None:
    """Before a call on a cache with stages that act at decode: one token is a step, several see everything."""
    if not decode.selections(cache):
        return
    embeds = call.get("inputs_embeds")
    if embeds is None or embeds.shape[1] > 1:
        prompt = patch.local.prompt_length
        if prompt is not None and embeds is not None and cache.get_seq_length() + embeds.shape[1] > prompt:
            check_guesses(patch)
        decode.show_all(cache)
    elif all(getattr(kv.state(cache, s.where), "selection", None) is not None for s in patch.plan.at_decode):  # type: ignore
        patch.local.step = decode.DecodeStep(cache, patch.plan.at_decode)


def _prune(patch: Patch, prefill: Prefill, call: dict[str, Any], elsewhere: list[str]) -> dict[str, Any]:
    """Run the stages before the LLM; the text model's call with what they left."""
    if patch.plan.inside and patch.adapter.text.training:
        check_checkpointing(patch.adapter, patch.plan)
    if elsewhere:
        check_features(patch.plan, elsewhere)
    if (patch.plan.before or patch.plan.in_tower) and run_before_llm(prefill):
        call = cut_text_call(prefill, call)
    for kind in patch.plan.of_words:
        prefill.readings.words[kind.name, None] = kind(call["inputs_embeds"], PromptSlots(prefill))
    return call


@untraced_while_pruning
def after_text(patch: Patch, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Checks that waited, the cache's own lengths, and hidden states of the prompt's length."""
    try:
        return _close(patch, output)
    finally:
        if not patch.local.depth:
            patch.local.clear()


def _close(patch: Patch, output: Any) -> Any:
    prefill, step = patch.local.prefill, patch.local.step
    if step is not None:
        return _close_step(patch, step, output)
    if prefill is None or not prefill.opened:
        return None
    state, cache = prefill.prompt, getattr(output, kv.NAME, None)
    try:
        if state.checks:
            state.raise_if_failed()
        if prefill.selections:
            check_room(prefill, cache)
    except BaseException:
        patch.roll_back()
        raise
    cut = state.whole
    if cut is not None or prefill.selections or prefill.active_heads:
        cache = cache if cache is not None else prefill.cache
        if cache is not None:
            shrink_cache(prefill, cache)
    if cut is not None:
        output = replaced(output, cut.restore(output[0]))
    patch.local.last = patch.latest = report(prefill)
    return output


def _close_step(patch: Patch, step: decode.DecodeStep, output: Any) -> Any:
    try:
        step.raise_if_failed()
    except BaseException:
        step.roll_back()
        raise
    last = patch.local.last or patch.latest
    if last is not None:
        last.recalled.update(step.kept())
    return replaced(output, output[0][:, -1:]) if step.back else output


# -- a decoder layer --------------------------------------------------------------------------------------------------


@untraced_while_pruning
def before_layer(patch: Patch, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of layer i: what its stages left, and masks and positions of what this layer stores."""
    local, plan = patch.local, patch.plan
    prefill, step = local.prefill, local.step
    prefill = prefill if prefill is not None and prefill.acting else None
    if prefill is None and step is None and not local.pruned_past:
        return None  # nothing is pruned in this call, nor was in one before it
    hidden = args[0] if args else kwargs["hidden_states"]
    without_mask = hidden.shape[1] == 1 and kwargs.get("attention_mask") is None
    if prefill is None and step is None and without_mask and not local.own_arguments:
        return None  # decode without padding: every layer sees all it stores, so there is nothing to change
    if len(args) == 1 and kv.NAME in kwargs:
        call = {"hidden_states": hidden, **kwargs}
    else:
        call = patch.adapter.bind(module, args, kwargs)
    held = kv.state(call.get(kv.NAME), i) if local.pruned_past else None
    if step is not None:
        hidden = step.enter(i, hidden)
        call = {**call, "hidden_states": hidden}
    changed = dict(call)
    hides = step is not None and step.hides
    if held is not None and not hides and i != (reference := kv.reference_layer(call[kv.NAME])):
        set_layer_mask(changed, held, kv.state(call[kv.NAME], reference), patch.adapter, local.made)
    if prefill is not None:
        _prune_layer(patch, prefill, i, module, changed)
    lowered = prefill.layers.position_offset[i] if prefill else None
    held_offset = held.layer_position_offset if held else None
    if lowered is not None or held_offset is not None:
        _lower_positions(patch, changed, lowered, held_offset)
    if step is not None:
        step.extend(i, hidden, changed, patch.adapter, local.made)
    heads = prefill.layers.heads[i] if prefill else None
    heads = held.heads if heads is None and held is not None else heads
    if heads is not None:
        changed[HEADS] = heads
    if plan.flash and (prefill or held or step):
        # Flash attention takes gaps in position ids for packed sequences; rotary embeddings are already made.
        width = changed["hidden_states"].shape[1]
        if torch.is_tensor(changed.get("position_ids")):
            changed["position_ids"] = torch.arange(width, device=changed["position_ids"].device)[None]
    # Positional, because gradients pass reentrant checkpoints by no other way.
    return (changed.pop("hidden_states"),), changed


def _prune_layer(patch: Patch, prefill: Prefill, i: int, layer: nn.Module, call: dict[str, Any]) -> None:
    """Run the stages at layer i, and cut its arguments to what is left."""
    if i in patch.plan.stage_layers:
        if i in patch.plan.dry_run_layers:
            _dry_run(patch, i, layer, dict(call), prefill)
        ids, rope, cuts = call.get("position_ids"), call.get("position_embeddings"), len(prefill.inner_cuts)
        call["hidden_states"] = run_layer(prefill, i, call["hidden_states"], ids, rope)
        if i in prefill.keys:
            hand_over(prefill, i, cuts)
    if prefill.inner is not None:
        cut_layer_call(prefill, i, call)


def _dry_run(patch: Patch, i: int, layer: nn.Module, call: dict[str, Any], prefill: Prefill) -> None:
    """Run layer i up to its attention product on what enters it, for the signals of stages that stand there."""
    if prefill.inner is not None:
        cut_layer_call(prefill, i, call)
    cache = call.get(kv.NAME)
    held = kv.state(cache, i) if cache is not None else None
    lowered, before = prefill.layers.position_offset[i], held.layer_position_offset if held else None
    if lowered is not None or before is not None:
        _lower_positions(patch, call, lowered, before)
    if cache is not None:
        call[kv.NAME] = ReadOnlyCache(cache, prefill.past_at(i))
    patch.local.dry_running = True
    try:
        with torch.no_grad():
            layer.forward(**call)
    except DryRunDone:
        return
    finally:
        patch.local.dry_running = False
    raise UnsupportedModel(f"{type(layer).__name__} ran without an attention product that could be looked at")


def _lower_positions(patch: Patch, call: dict[str, Any], lowered: Tensor | None, held: Tensor | None) -> None:
    """positions="compact" inside the LLM: this layer's own ids, by `lowered` [B, n] of this call and `held` [B]."""
    ids = call["position_ids"]

    def place() -> tuple[Tensor, Any]:
        low = ids if lowered is None else ids - lowered.to(ids.device)
        low = low if held is None else low - held.to(ids.device)[:, None]
        return low, patch.adapter.text.rotary_emb(call["hidden_states"], low)  # type: ignore[operator]

    call["position_ids"], call["position_embeddings"] = once(patch.local.made, (ids, lowered, held), place)


def add_features(patch: Patch, hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
    """The text model's own step on what its layers run on by now: hidden [B, n, D], where [B, L], [S, D]."""
    if patch.local.prefill is not None:
        where, features = cut_features(patch.local.prefill, where, features)
    return patch.add_features(hidden, where, features)


def refuse_changed_forward() -> UnsupportedCall:
    """Another library stands before this patch."""
    return UnsupportedCall(
        "another library changed the forward of this model after vtprune.patch, which is not seen any "
        "more: call vtprune.unpatch(model) and patch again"
    )
