"""Everything that a patch refuses: the conditions, and what the user can do instead.

When the patch is made: `check_stages` (places), `check_reads` (signals). In a call: the functions from `check_call` on.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedCall, UnsupportedModel
from ..core.method import Stage
from ..core.signal import Signal
from ..kernels.clock import capturing
from ..model_adapters.base import Adapter
from ..signals import kind_of
from . import cache as kv
from .plan import DEEPSTACK, LINEAR, Plan, layer_of

if TYPE_CHECKING:
    from .prefill import Prefill
    from .session import Patch

ROW = Signal("last_row", -1)  # what a method reads at decode


# -- when the patch is made: places -----------------------------------------------------------------------------------


def check_stages(adapter: Adapter, plan: Plan) -> None:
    """Refuse stages that this model cannot hold, by name."""
    for stage in plan.stages:
        if isinstance(stage.where, bool) or not (stage.where == "llm" or isinstance(stage.where, int | tuple)):
            raise ValueError(f"where={stage.where!r}: choose 'llm', a decoder layer 0..{plan.depth - 1} or ('vit', k)")
        if isinstance(stage.where, int):
            _check_layer(adapter, plan, _name(stage), stage.where)
        if stage.compact and adapter.mrope:
            raise UnsupportedModel(
                f"{_name(stage)}: positions='compact' is undefined for M-RoPE position ids ({adapter.model_type}); use "
                "'keep'"
            )
    for stage in plan.at_decode:
        _check_order_at_decode(plan, stage)
        _check_model_at_decode(adapter, plan, stage)
    _check_changes(adapter, plan)
    layers = [layer_of(s) for s in plan.inside]
    if layers != sorted(layers):
        raise ValueError(f"stages at layers {layers} must stand in increasing order")


def _name(stage: Stage) -> str:
    return stage.method.name or type(stage.method).__name__


def _check_layer(adapter: Adapter, plan: Plan, name: str, layer: int) -> None:
    if not 0 <= layer < plan.depth:
        raise ValueError(f"{name} at layer {layer}: the model has layers 0..{plan.depth - 1}")
    others = sorted(set(plan.layer_types) - {"full_attention", LINEAR})
    if others:
        raise UnsupportedModel(
            f"{name} at layer {layer}: {adapter.model_type} has layers of kind {', '.join(others)}, and a stage inside "
            "the LLM needs layers that see all tokens; use one that acts before the LLM"
        )
    if layer < plan.deepstack and not hasattr(type(adapter.text), DEEPSTACK):
        raise UnsupportedModel(
            f"{name} at layer {layer}: {adapter.model_type} adds visual features after its first {plan.deepstack} "
            f"layers in a way that cannot be followed (no {DEEPSTACK}); use layer {plan.deepstack} or later"
        )


def _check_order_at_decode(plan: Plan, stage: Stage) -> None:
    """Where a stage that acts at decode may stand among the others."""
    stages, name, last = plan.at_decode, stage.method.name, plan.at_decode[0].where
    if not isinstance(stage.where, int) or stage.where < 1:
        raise ValueError(
            f"{name} at {stage.where!r}: it acts at decode, on the attention of the layer before, so place it "
            "at a decoder layer >= 1"
        )
    if {s.method.name for s in stages} != {name} or len({s.where for s in stages}) != len(stages):
        raise ValueError(
            f"stages of {', '.join(dict.fromkeys(s.method.name for s in stages))} act at decode: choose one of "
            "these methods, at most once a layer"
        )
    deeper = [s for s in plan.inside if s.where > last and s not in stages]  # type: ignore[operator]
    if deeper:
        raise ValueError(
            f"{deeper[0].method.name} at layer {deeper[0].where} drops tokens behind {name} at layer {last}, "
            f"which chooses among them at decode: let {name} stand behind all other stages"
        )
    if stage.compact:
        raise ValueError(f"{name}: positions='compact' is undefined where tokens come back; use 'keep'")


def _check_model_at_decode(adapter: Adapter, plan: Plan, stage: Stage) -> None:
    """What a model must have for a stage that acts at decode."""
    name, layer = stage.method.name, layer_of(stage)
    if plan.linear:
        raise UnsupportedModel(
            f"{name} chooses at decode among the keys that layers store, but {adapter.model_type} has "
            f"layers of kind {LINEAR}, which store none: use a method that acts while the prompt is read"
            f"{_way_out(plan, stage)}"
        )
    if "prefill" not in stage.method.phases:
        return
    if layer < plan.deepstack:
        raise UnsupportedModel(
            f"{name} at layer {layer} lets tokens come back at decode, when {adapter.model_type} no "
            f"longer adds visual features after its first {plan.deepstack} layers: use layer {plan.deepstack} or later"
        )
    if "flash" in adapter.attention():
        raise UnsupportedModel(
            f"{name} lets tokens come back at decode, which needs masks that flash attention does not take: "
            "load the model with attn_implementation='sdpa'"
        )
    if adapter.masks_in_base:
        raise UnsupportedModel(
            f"{name} lets tokens come back at decode, but {adapter.model_type} reads its prompt in both "
            "directions, so they would see later tokens: use a method that acts while the prompt is read"
        )


def _check_changes(adapter: Adapter, plan: Plan) -> None:
    """What changes attention itself, and not only what it sees."""
    heads = [s for s in plan.stages if s.method.of == "heads"]
    for stage in heads:
        if not isinstance(stage.where, int) or stage.where < 1:
            raise ValueError(
                f"{stage.method.name} at {stage.where!r} chooses among heads by what they said in the layers "
                "before: place it at a decoder layer >= 1"
            )
    names = [method.name for method in plan.reweighing]
    if len(names) > 1:
        raise ValueError(f"{', '.join(names)} with different options change the attention of all layers: use one")
    if (names or heads) and "flash" in adapter.attention():
        name = names[0] if names else heads[0].method.name
        raise UnsupportedModel(
            f"{name} changes softmax rows or single heads, which flash attention does not show: load the model "
            "with attn_implementation='sdpa', or leave out values= and heads="
        )


# -- when the patch is made: signals inside the LLM -------------------------------------------------------------------


def check_reads(adapter: Adapter, plan: Plan) -> None:
    """Refuse signals that a stage inside the LLM cannot have at its place."""
    for stage in plan.inside:
        for need in stage.method.needs:
            _check_offset(stage, need)
            _check_keys(adapter, plan, stage, need)
            if kind_of(need).source in ("modules", "layer") and need.offset == 0:
                raise ValueError(
                    f"{stage.method.name} at layer {stage.where} reads the {need.kind} of that layer, which has not "
                    "run yet: use a negative offset"
                )
            if "decode" in stage.method.phases and need != ROW:
                raise ValueError(f"{stage.method.name} reads {need} at decode, where there is only {ROW}")


def _check_offset(stage: Stage, need: Signal) -> None:
    where, kind = f"{stage.method.name} at layer {stage.where}", kind_of(need)
    if "llm" not in kind.where:
        raise ValueError(
            f"{where} reads {need.kind!r}, a signal of the vision tower: use the method's own place, 'llm' or ('vit', "
            "k)"
        )
    layer = layer_of(stage) + need.offset
    if layer < 0:
        raise ValueError(f"{where} reads layer {layer}: use layer {-need.offset} or later")
    if need.offset > 0:
        raise ValueError(
            f"{where} reads layer {layer}, which has not run yet: use the offset 0 (the layer itself) or a negative one"
        )
    if (kind.source == "heads") != (stage.method.of == "heads"):
        raise ValueError(
            f"{stage.method.name} chooses among {stage.method.of} and reads {need}: signals of heads, such as "
            "'head_output', are for methods that choose among heads, and these read nothing else"
        )
    if (kind.so_far or kind.source == "heads") and need.offset != -1:
        raise ValueError(f"{where} reads {need}, which is a sum over all layers that ran: use the offset -1")


def _check_keys(adapter: Adapter, plan: Plan, stage: Stage, need: Signal) -> None:
    """Linear attention has a state in place of attention rows."""
    kinds, layer = plan.layer_types, layer_of(stage)
    found = [i for i in layers_read(need, layer) if kinds[i] == LINEAR]
    if not found or kind_of(need).source == "layer":  # which asks for no attention
        return
    needs = stage.method.needs
    first = max(-other.offset for other in needs)
    rows = [other for other in needs if kind_of(other).source != "layer"]
    read = {k: [i for other in rows for i in layers_read(other, k)] for k in range(first, len(kinds))}
    fit = [k for k, layers in read.items() if all(kinds[i] != LINEAR for i in layers)]
    raise UnsupportedModel(
        f"{stage.method.name} at layer {layer} reads layer {found[0]} of {adapter.model_type}, whose "
        f"kind is {LINEAR}: there are no attention rows; use {f'a layer of {fit}' if fit else 'another method'}"
        f"{_way_out(plan, stage)}"
    )


def layers_read(need: Signal, layer: int) -> range:
    """The decoder layers that a stage at `layer` reads for a signal."""
    kind, last = kind_of(need), layer + need.offset
    if kind.source == "embeddings":
        return range(0)
    return range(0 if kind.so_far else last, last + 1)


def _way_out(plan: Plan, stage: Stage) -> str:
    """The option of another stage's method that leaves this stage out, where it brought it."""
    for other in (s.method for s in plan.stages if s.method is not stage.method):
        for option in (f.name for f in fields(other) if getattr(other, f.name) is True):  # type: ignore[arg-type]
            rest = replace(other, **{option: False}).stages(None, plan.depth)  # type: ignore[type-var]
            if all(type(s.method) is not type(stage.method) for s in rest):
                return f", or leave this stage out of {other.name}: {option}=False"
    return ""


# -- in a call --------------------------------------------------------------------------------------------------------


def check_call(patch: Patch, call: dict[str, Any], tokens: Tensor, features: bool) -> None:
    """Refuse recordings, and caches that cannot hold a pruned prompt.

    tokens: ids or embeddings of the call. features: the call carries pixels or encoded features.
    """
    from transformers.cache_utils import Cache, EncoderDecoderCache

    cache = call.get(kv.NAME)
    if features:
        _check_tracers(tokens)
    if features and ("paged" in patch.adapter.attention() or not (cache is None or isinstance(cache, Cache))):
        raise UnsupportedCall(
            f"paged caches and continuous batching ({type(cache).__name__}) cannot hold pruned prompts: use "
            "model.generate with its own cache, or handle.remove() first; requests without images work"
        )
    if cache is None:
        return
    if isinstance(cache, EncoderDecoderCache):
        raise UnsupportedCall("an encoder-decoder cache cannot hold pruned prompts; use a DynamicCache")
    layers = getattr(cache, "layers", ())
    windows = any(kv.is_static(x) and getattr(x, "is_sliding", False) for x in layers)
    if windows and not patch.plan.keeps_all and features:
        raise UnsupportedCall(
            "a static cache with sliding-window layers cannot hold pruned prompts; drop "
            "cache_implementation='static' (a DynamicCache works)"
        )


def check_guesses(patch: Patch) -> None:
    """Refuse a call whose last tokens are guesses, where these change what a stage chooses."""
    plan = patch.plan
    if plan.at_decode:
        raise UnsupportedCall(
            f"{plan.at_decode[0].method.name} chooses among the visual tokens at every decode step, but this call "
            "verifies several guessed tokens at once, as assisted decoding and prompt lookup do: leave out "
            "assistant_model and prompt_lookup_num_tokens, or use a method that acts while the prompt is read only"
        )
    if plan.inside and plan.masks_in_base:
        raise UnsupportedCall(
            f"{plan.inside[0].method.name} acts inside the LLM, and {patch.adapter.model_type} reads its prompt in "
            "both directions, so guessed tokens (assisted decoding, prompt lookup) would have a say in which tokens "
            "stay: leave out assistant_model and prompt_lookup_num_tokens, or use a method that acts before the LLM"
        )


def check_checkpointing(adapter: Adapter, plan: Plan) -> None:
    """Refuse to cut inside layers that will be run again for their gradients."""
    text = adapter.text
    if plan.inside and text.training and text.gradient_checkpointing and torch.is_grad_enabled():
        raise UnsupportedCall(
            "gradient checkpointing re-runs decoder layers, which a stage inside the LLM cannot follow: use stages "
            "before the LLM, or model.activation_checkpointing_disable(), in older transformers "
            "gradient_checkpointing_disable()"
        )


def check_features(plan: Plan, elsewhere: list[str]) -> None:
    """Refuse features that another model encoded, where stages act or read in the tower.

    elsewhere: their modalities.
    """
    if not elsewhere:
        return
    way = (
        f"the {elsewhere[0]} features came pre-encoded from elsewhere: pass pixel_values, or encode through the "
        "patched model's own get_image_features"
    )
    if plan.in_tower:
        raise UnsupportedCall(f"{plan.in_tower[0].method.name} acts inside the vision tower, but {way}")
    needed = [need for need in plan.tower_needs if not need.optional]
    if needed:
        kinds = ", ".join(sorted(map(str, needed)))
        raise UnsupportedCall(f"the method needs {kinds} of the vision tower, but {way}")


def check_runs(prefill: Prefill) -> None:
    """Features of unknown origin come without sizes, so a part of an image must be told by where it stands."""
    host = prefill.token_kind_on_host
    first = [int(row.nonzero()[0, 0]) if row.any() else 0 for row in host]
    starts = prefill.past > 0 and any(row[i] > 1 for row, i in zip(host, first))
    if starts or bool((host[:, -1 - prefill.behind] > 1).any()):
        raise UnsupportedCall(
            "this call ends or goes on inside an image, as chunked prefill does, so a method would see only a part "
            "of it: set prefill_chunk_size=None"
        )


def check_cache_of_past(patch: Patch, cache: Any) -> None:
    """Refuse a cache whose layers renumber, store other tokens or are silent where this patch does not look."""
    layers = getattr(cache, "layers", ())
    for layer in layers[: patch.plan.first_hook]:
        if getattr(layer, "own_tokens", False) or getattr(layer, "layer_position_offset", None) is not None:
            raise UnsupportedCall(
                "this cache was filled by a patched model that dropped tokens (or renumbered them) inside the LLM, "
                "at layers where this patch has no stage: continue with the same patch, or start a new cache"
            )
    for layer in layers[: min(patch.plan.of_heads, default=len(layers))]:
        if getattr(layer, "heads", None) is not None:
            raise UnsupportedCall(
                "this cache was filled by a patched model whose heads are silent in layers where this patch "
                "silences none: continue with the same patch, or start a new cache"
            )


def check_room(prefill: Prefill, cache: Any) -> None:
    """Refuse a cache without room for tokens that come back at decode."""
    cache = prefill.cache if cache is None else cache
    returning = any(selection.hidden is not None for selection in prefill.selections.values())
    if returning and any(kv.is_static(layer) for layer in getattr(cache, "layers", ())):
        raise UnsupportedCall(
            "a static cache has no room for tokens that come back at decode: use the default dynamic cache"
        )


def _check_tracers(tokens: Tensor) -> None:
    """Refuse a call that is recorded to be run again on other inputs, which would keep its picks."""
    from torch._C._functorch import TransformType, get_interpreter_stack
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if torch.compiler.is_exporting():
        what = "torch.export"
    elif torch.jit.is_tracing():
        what = "torch.jit.trace"
    elif isinstance(tokens, torch.fx.Proxy) or get_proxy_mode() is not None:
        what = "torch.fx"
    elif any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()):
        what = "torch.vmap"
    elif isinstance(tokens, FakeTensor) or tokens.is_meta:
        what = "a run on fake or meta tensors"
    elif capturing(tokens.device):
        what = "a CUDA graph"
    else:
        return
    raise UnsupportedCall(
        f"this call is recorded by {what}, but which visual tokens are kept depends on the image: a recording would "
        "keep those of its own example; call the model itself, use torch.compile, or handle.remove() first"
    )
