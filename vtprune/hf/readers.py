"""Readers inside the decoder: what they put on the modules of its layers, and what they keep of the signals there.

A signal is kept for the slots of this call (`vtprune.signals` has the formulas).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedModel
from ..core.signal import SignalKind
from ..kernels import recording
from ..kernels.clock import Clock
from ..signals import LayerAttention, LayerPass, kind_of
from .attention_probe import DryRunDone, Reader, probe, probe_change, reweighed
from .checks import layers_read
from .hooks import untraced_while_pruning
from .look import install_look
from .plan import layer_of
from .prefill import Prefill
from .slots import PromptSlots, prompt_slots

if TYPE_CHECKING:
    from .session import Patch


def install_readers(patch: Patch) -> None:
    """Put readers on the decoder layers that the stages read; each quantity of a layer is read once."""
    plan, seen = patch.plan, set()
    for stage in plan.inside:
        for need in stage.method.needs:
            for layer in layers_read(need, layer_of(stage)):
                key = (kind_of(need), layer, need.offset == 0)
                if "prefill" in stage.method.phases and key not in seen:
                    seen.add(key)
                    _read(patch, *key)
                if "decode" in stage.method.phases:
                    _probe(patch, layer, partial(read_step, patch, layer), partial(at_step, patch))
    for i in sorted(plan.dry_run_layers):
        _probe(patch, i, partial(stop_dry_run, patch), partial(acts, patch, True), before=True)
        kinds = [kind for kind, layer, dry in seen if layer == i and dry and kind.source == "attention"]
        install_look(patch, i, attention_of(patch.adapter.layers[i]), kinds)
    for i, module in enumerate(patch.adapter.layers if plan.reweighing or plan.of_heads else ()):
        patch.undo(probe_change(attention_of(module), partial(change_attention, patch, i)))
        patch.announce(attention_of(module))


def _read(patch: Patch, kind: SignalKind, i: int, dry: bool) -> None:
    """Put the reader of one signal on layer i; dry: it reads the layer's dry run, else its real one."""
    layer, source = patch.adapter.layers[i], kind.source
    if source == "rotary":
        hook = attention_of(layer).register_forward_pre_hook(partial(rope_reader, patch, kind, i), with_kwargs=True)
        patch.undo(hook.remove)
        patch.announce(attention_of(layer))
    elif source == "modules":
        for module in (attention_of(layer), mlp_of(layer)):
            hook = module.register_forward_hook(partial(module_reader, patch, kind, i), with_kwargs=True)
            patch.undo(hook.remove)
            patch.announce(module)
    elif source == "layer":
        patch.undo(layer.register_forward_hook(partial(layer_reader, patch, kind, i), with_kwargs=True).remove)
        patch.announce(layer)
    elif source == "attention":
        if kind.rope:
            hook = attention_of(layer).register_forward_pre_hook(partial(rope_keeper, patch, i), with_kwargs=True)
            patch.undo(hook.remove)
        _probe(patch, i, partial(attention_reader, patch, kind, i), partial(acts, patch, dry), before=dry)


def _probe(patch: Patch, i: int, reader: Reader, wanted: Callable[[], bool], before: bool = False) -> None:
    attention = attention_of(patch.adapter.layers[i])
    patch.undo(probe(attention, reader, before=before, wanted=wanted))
    patch.announce(attention)


# -- what they do -----------------------------------------------------------------------------------------------------


def _acting(patch: Patch) -> Prefill | None:
    """The prefill whose stages read signals by now; none where all tokens stay."""
    prefill = patch.local.prefill
    return prefill if prefill is not None and prefill.acting else None


def acts(patch: Patch, dry: bool) -> bool:
    """True while a prompt is pruned by signals, in a dry run of a layer or in its real one."""
    return _acting(patch) is not None and patch.local.dry_running == dry


def at_step(patch: Patch) -> bool:
    """True in a decode step at which stages act."""
    return patch.local.step is not None


@untraced_while_pruning
def attention_reader(
    patch: Patch,
    kind: SignalKind,
    layer: int,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> None:
    """Read one signal of a layer's attention product, where it `acts`."""
    prefill = _acting(patch)
    if prefill is not None and q.shape[2] > 1:
        past, prompt = prefill.past_at(layer) if prefill.past else 0, PromptSlots(prefill)
        rope = prefill.readings.rope.get(layer)
        read_attention(prefill, kind, layer, LayerAttention(q, k, v, mask, scaling, past, prompt, rope=rope))


def read_step(patch: Patch, layer: int, module: nn.Module, *product: Any) -> None:
    """Read the new token's attention row at a decode step."""
    patch.local.step.read_row(layer, module, *product)  # type: ignore[union-attr]


@untraced_while_pruning
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
    prefill = _acting(patch)
    if prefill is not None and out.shape[1] > 1 and i < max(patch.plan.of_heads, default=0):
        with torch.no_grad():
            read_heads(prefill, patch.plan.head_signals, out)
    return out


@untraced_while_pruning
def module_reader(
    patch: Patch, kind: SignalKind, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Read what a module of layer i makes of its input."""
    prefill = _acting(patch)
    before = args[0] if args else kwargs["hidden_states"]
    if prefill is not None and not patch.local.dry_running and before.shape[1] > 1:
        with torch.no_grad():
            read_module(prefill, kind, i, before, out[0] if isinstance(out, tuple) else out)


@untraced_while_pruning
def layer_reader(
    patch: Patch, kind: SignalKind, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Read what layer i makes of its input."""
    prefill = _acting(patch)
    before = args[0] if args else kwargs["hidden_states"]
    if prefill is not None and before.shape[1] > 1:
        after, norm = out[0] if isinstance(out, tuple) else out, partial(final_norm, patch.adapter.text)
        with torch.no_grad():
            read_layer(prefill, kind, i, LayerPass(before, after, norm, PromptSlots(prefill)))


@untraced_while_pruning
def stop_dry_run(patch: Patch, *_: Any) -> None:
    """End a dry run once the readers before have seen its queries and keys."""
    raise DryRunDone


@untraced_while_pruning
def rope_keeper(patch: Patch, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the rotary embeddings that layer i was given, for signals of its attention; those of several axes are not.

    Positions of several axes are counted from the mask, so that they begin with 0 behind the padding.
    """
    prefill, rope = _acting(patch), kwargs.get("position_embeddings")
    if prefill is not None:
        prefill.readings.rope[i] = rope if isinstance(rope, tuple) and rope[0].dim() == 3 else None


@untraced_while_pruning
def rope_reader(
    patch: Patch, kind: SignalKind, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Read the rotary embeddings that a layer was given."""
    prefill, rope = _acting(patch), kwargs.get("position_embeddings")
    if prefill is None or (args[0] if args else kwargs["hidden_states"]).shape[1] == 1:
        return
    if not isinstance(rope, tuple) or rope[0].dim() != 3:
        raise UnsupportedModel(
            f"{type(module).__name__} has no rotary embedding [B, n, d] of a single axis, which the signal "
            f"{kind.name!r} is made of: choose a method or version without it"
        )
    read_rope(prefill, kind, layer, rope)


# -- what is kept ------------------------------------------------------------------------------------------------------


def read_attention(prefill: Prefill, kind: SignalKind, layer: int, attention: LayerAttention) -> None:
    """Keep a signal of this layer's attention, [B, n, ...] for the slots of this call."""
    rows, clock = prefill.readings.rows, Clock(attention.q.device)
    with recording(prefill.prompt.kernels):
        found = kind(attention)
        before = rows.pop((kind.name, layer - 1), None) if kind.so_far else None  # read by now, if a stage stands here
        keep_reading(prefill, kind, layer, found if before is None else found + before.to(found.device))
    prefill.prompt.clocks.append(clock.stop())


def read_module(prefill: Prefill, kind: SignalKind, layer: int, before: Tensor, after: Tensor) -> None:
    """Add a signal of what one module of a layer does to its tokens, before and after [B, n, D]."""
    rows, clock = prefill.readings.rows, Clock(before.device)
    found = kind(before, after, prompt_slots(prefill).to(before.device))
    rows[kind.name, layer] = rows[kind.name, layer] + found if (kind.name, layer) in rows else found
    prefill.prompt.clocks.append(clock.stop())


def read_layer(prefill: Prefill, kind: SignalKind, layer: int, run: LayerPass) -> None:
    """Keep a signal of what enters and leaves a layer, of the tokens of this call."""
    clock = Clock(run.before.device)
    keep_reading(prefill, kind, layer, kind(run))
    prefill.prompt.clocks.append(clock.stop())


def keep_reading(prefill: Prefill, kind: SignalKind, layer: int, found: Any) -> None:
    """Keep what was read of one layer: [B, n, ...] for the slots of this call, or a tensor [T, ...] each row."""
    if kind.of_words:
        prefill.readings.words[kind.name, layer] = found
    else:
        prefill.readings.rows[kind.name, layer] = found


def read_rope(prefill: Prefill, kind: SignalKind, layer: int, rope: tuple[Tensor, Tensor]) -> None:
    """Keep a signal of the rotary embeddings (cos, sin) [B or 1, n, d] that a layer was given."""
    prefill.readings.rows[kind.name, layer] = kind(*rope, PromptSlots(prefill))


def read_heads(prefill: Prefill, kinds: Iterable[SignalKind], out: Tensor) -> None:
    """Keep signals of what each head says in one layer: out [B, n, H, d], its output before the projection."""
    real, heads = prompt_slots(prefill).to(out.device), prefill.readings.heads
    for known in kinds:
        found, before = known(out, real), heads.get(known.name) if known.so_far else None
        heads[known.name] = found if before is None else before.to(out.device) + found


# -- modules of a text model -------------------------------------------------------------------------------------------


def final_norm(text: nn.Module, x: Tensor) -> Tensor:
    """x [.., D] through the norm that stands behind the last layer of a text model."""
    norm = getattr(text, "norm", None)
    if not isinstance(norm, nn.Module):
        raise UnsupportedModel(
            f"{type(text).__name__} has no norm behind its last layer that could be found (no module `norm`), which a "
            "signal of this method asks for: choose another method"
        )
    return norm.forward(x)  # not a call: hooks on the module are for what the model itself computes


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
