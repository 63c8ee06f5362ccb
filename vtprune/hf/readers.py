"""Readers inside the decoder: hooks and probes on the modules whose signals stages ask for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compilers import outside_while_busy
from ..core.errors import UnsupportedModel
from .attention_probe import probe, probe_change, reweighed
from .heads import read_heads
from .hooks import DryRunDone
from .llm_signals import AttentionProduct, read_rope_weight, read_rows, read_transition
from .plan import layer_of
from .slots import prompt_slots

if TYPE_CHECKING:
    from .session import Patch


def install_readers(patch: Patch) -> None:
    """Put readers on the decoder layers that the stages read; each quantity of a layer is read once."""
    layers, plan, seen = patch.adapter.layers, patch.plan, set()
    for stage in plan.inside:
        for need in stage.method.needs:
            layer, own = layer_of(stage) + need.offset, need.offset == 0
            if need.kind in ("relevance", "head_output"):
                continue
            if need.kind == "rope_weight":
                attention = attention_of(layers[layer])
                hook = attention.register_forward_pre_hook(partial(read_rope, patch, layer), with_kwargs=True)
                patch.undo(hook.remove)
                patch.announce(attention)
                continue
            if need.kind == "transition":
                if ("transition", layer, False) not in seen:
                    seen.add(("transition", layer, False))
                    _watch_transitions(patch, layer)
                continue
            patch.announce(attention_of(layers[layer]))
            if "decode" in stage.method.phases:
                patch.undo(probe(attention_of(layers[layer]), partial(read_step, patch, layer)))
            if "prefill" not in stage.method.phases:
                continue
            for i in range(layer + 1) if need.kind == "received_so_far" else (layer,):
                if (need.kind, i, own) not in seen:
                    seen.add((need.kind, i, own))
                    attention = attention_of(layers[i])
                    patch.undo(probe(attention, partial(read_attention, patch, need.kind, i, own), before=own))
                    patch.announce(attention)
    for i in sorted(plan.dry_run_layers):
        patch.undo(probe(attention_of(layers[i]), partial(stop_dry_run, patch), before=True))
    for i, module in enumerate(layers if plan.reweighing or plan.of_heads else ()):
        patch.undo(probe_change(attention_of(module), partial(change_attention, patch, i)))
        patch.announce(attention_of(module))


def _watch_transitions(patch: Patch, layer: int) -> None:
    for module in (attention_of(patch.adapter.layers[layer]), mlp_of(patch.adapter.layers[layer])):
        hook = module.register_forward_hook(partial(read_module, patch, layer), with_kwargs=True)
        patch.undo(hook.remove)
        patch.announce(module)


# -- what they do -----------------------------------------------------------------------------------------------------


@outside_while_busy
def read_attention(
    patch: Patch,
    kind: str,
    layer: int,
    own: bool,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> None:
    """Read one signal of a layer's attention product; `own`: of the layer's dry run, else of its real one."""
    prefill = patch.acting
    if prefill is not None and q.shape[2] > 1 and patch.local.dry_running == own:
        read_rows(prefill, kind, layer, AttentionProduct(q, k, v, mask, scaling, prefill.past_at(layer)))


def read_step(patch: Patch, layer: int, module: nn.Module, *product: Any) -> None:
    """Read the new token's attention row at a decode step."""
    if patch.local.step is not None:
        patch.local.step.read_row(layer, module, *product)


@outside_while_busy
def change_attention(
    patch: Patch,
    i: int,
    out: Tensor,
    heads: Tensor | None,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """The attention product out [B, n, H, d] of layer i as the methods want it."""
    for method in patch.plan.reweighing:
        out = reweighed(q, k, v, mask, scaling, method.reweigh)
    if heads is not None:
        out = out * heads.to(out.device)[:, None, :, None]
    prefill = patch.acting
    if prefill is not None and out.shape[1] > 1 and i < max(patch.plan.of_heads, default=0):
        with torch.no_grad():
            read_heads(prefill, out, prompt_slots(prefill))
    return out


@outside_while_busy
def read_module(
    patch: Patch, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Read what a module of layer i makes of its input."""
    prefill = patch.acting
    before = args[0] if args else kwargs["hidden_states"]
    if prefill is not None and not patch.local.dry_running and before.shape[1] > 1:
        with torch.no_grad():
            read_transition(prefill, i, before, out[0] if isinstance(out, tuple) else out)


@outside_while_busy
def stop_dry_run(patch: Patch, *_: Any) -> None:
    """End a dry run once the readers before have seen its queries and keys."""
    if patch.local.dry_running:
        raise DryRunDone


@outside_while_busy
def read_rope(patch: Patch, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Read the rotary embeddings that a layer was given."""
    prefill, rope = patch.acting, kwargs.get("position_embeddings")
    if prefill is None or (args[0] if args else kwargs["hidden_states"]).shape[1] == 1:
        return
    if not isinstance(rope, tuple) or rope[0].dim() != 3:
        raise UnsupportedModel(
            f"{type(module).__name__} has no rotary embedding [B, n, d] of a single axis, which the signal "
            "'rope_weight' divides out: choose a method or version without it"
        )
    read_rope_weight(prefill, layer, rope)


# -- modules of a layer -----------------------------------------------------------------------------------------------


def mlp_of(layer: nn.Module) -> nn.Module:
    """The feed-forward module of a decoder layer."""
    for name in ("mlp", "feed_forward"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise UnsupportedModel(f"{type(layer).__name__} has no feed-forward module whose transitions could be read")


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention module of a decoder layer."""
    for name in ("self_attn", "attention", "attn"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise UnsupportedModel(f"{type(layer).__name__} has no self-attention module to read signals from")
