"""Read q, k, v of one attention module while it runs, and the few rows of its softmax that a method asks for.

The module gets a shallow copy of its config that names a registered attention function. That function calls
the one the model would have called, hands its result on untouched, and then shows q, k, v to the readers. No
other module, no mask and no kernel changes: outputs are bit-identical, no full attention matrix is formed.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedCall, UnsupportedModel
from ..kernels import attention_rows, full_precision
from ..model_adapters.attention_interface import interface_of
from ..signals import MASKED, LayerAttention, bias_of, kind_of

Reader = Callable[[nn.Module, Tensor, Tensor, Tensor, "Tensor | None", float], None]
# out [B, M, H, d], heads (as `HEADS`), then as a reader -> what the module is given in place of out
Change = Callable[[Tensor, "Tensor | None", nn.Module, Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]
HEADS = "vtprune_heads"  # argument of a decoder layer, for its probe: [B, H] bool, the query heads that speak
# Arguments by which some attention functions change the logits beyond scaling and mask.
LOGIT_CHANGES = ("softcap", "s_aux", "position_bias")


class DryRunDone(Exception):
    """Ends a layer's forward once its queries and keys are known."""


def probe(
    module: nn.Module, reader: Reader, before: bool = False, wanted: Callable[[], bool] | None = None
) -> Callable[[], None]:
    """Call `reader(module, q, k, v, mask, scaling)` after every attention product of `module`; return the undo.

    before: call it before the product instead, which it may stop by an exception.
    wanted: where it answers False, nothing is made ready for the reader and it is not called.

    q: [B, H, M, d]; k, v: [B, G, N, d], all after RoPE and norms, detached, under no_grad.
    mask: None, or broadcastable to [B, H, M, N], boolean (True = attend) or additive. scaling: factor on q.k.
    Variable-length flash attention is shown segment by segment, as the other implementations run it.
    Several readers may share a module; undo them in any order. The last undo puts the same config object back.
    Raises UnsupportedModel if the module does not go through transformers' attention interface.
    """
    installed = _probe_on(module)
    entry = [reader, before, wanted]  # a fresh object: the same reader may be attached twice
    installed.entries = (*installed.entries, entry)
    return partial(_detach, module, installed, entry)  # not a closure, so that a copied model's undo undoes the copy


def probe_change(module: nn.Module, change: Change) -> Callable[[], None]:
    """Give `module` what `change` makes of every attention product, in place of the product; return the undo.

    Not for flash attention, whose variable-length products have no common output. Errors as `probe`.
    """
    installed = _probe_on(module)
    entry = [change]
    installed.changes = (*installed.changes, entry)
    return partial(_detach, module, installed, entry)


def _probe_on(module: nn.Module) -> AttentionProbe:
    installed = _probe_of(module)
    if installed is None:
        installed = AttentionProbe(module)
        module.config = installed.config
    return installed


def _detach(module: nn.Module, installed: AttentionProbe, entry: list[Any]) -> None:
    installed.entries = tuple(e for e in installed.entries if e is not entry)
    installed.changes = tuple(e for e in installed.changes if e is not entry)
    if not installed.entries and not installed.changes and module.config is installed.config:
        module.config = installed.original
        installed.release()


_lock = threading.RLock()  # a finalizer may run while the lock is held
_registered: dict[str, set[int]] = {}  # by name: the probes that are about
_before: dict[str, tuple[Any, ...]] = {}  # by name: what transformers knew under it


class AttentionProbe:
    """The state of one tapped module. Lives on the copied config: dropping the copy drops everything."""

    def __init__(self, module: nn.Module) -> None:
        names = interface_of(module)
        if names is None:
            raise UnsupportedModel(
                f"{type(module).__name__} does not call transformers' attention interface, so its queries "
                "and keys cannot be read; choose a method without attention signals (see `vtprune methods`)"
            )
        config: Any = module.config
        self.original = config
        self.implementation: str | None = config._attn_implementation
        base = config._attn_implementation or "eager"
        self.function = _function_of(module, base)
        self.flash = "flash" in base
        self.sdpa = base == "sdpa"
        self.entries: tuple[list[Any], ...] = ()
        self.changes: tuple[list[Any], ...] = ()
        # transformers recognises flash attention by name, so the probe's name contains that of its base.
        self.name = f"{base}+vtprune"
        self.register()
        self.config = copied = copy.copy(config)
        # The dict form leaves sub-configs alone: they are shared with the original.
        copied._attn_implementation = {"": self.name}
        copied.vtprune_probe = self

    def register(self) -> None:
        """Name `probed_attention` to transformers for as long as a probe of that name is about."""
        from transformers import AttentionInterface

        key = id(self)
        with _lock:
            probes = _registered.setdefault(self.name, set())
            names = AttentionInterface._global_mapping
            if not probes:
                _before[self.name] = (names[self.name],) if self.name in names else ()
                AttentionInterface.register(self.name, probed_attention)
            probes.add(key)
        self.release = weakref.finalize(self, _release, self.name, key)
        self.release.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "release"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied probe, and one unpickled in another process, needs the name as long as it lives itself."""
        self.__dict__.update(state)
        self.register()


def _release(name: str, key: int) -> None:
    """A probe is gone; the last one of its name takes the name with it, or brings back what had it before."""
    from transformers import AttentionInterface

    with _lock:
        probes = _registered[name]
        probes.discard(key)
        if probes:
            return
        names = AttentionInterface._global_mapping
        before = _before.pop(name)
        if names.get(name) is probed_attention:
            del names[name]
            if before:
                names[name] = before[0]


class _Unprobed:
    """The module with its own config: flash attention picks the kernel by the name it finds there."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def probed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: the base function's result, and its arguments for the readers."""
    installed = cast(Any, module).config.vtprune_probe
    now = installed.original._attn_implementation
    if now != installed.implementation:
        if "paged" in (now or ""):  # continuous batching, where prompts with images are refused by the session
            return _function_of(module, now)(
                _Unprobed(module, installed.original), query, key, value, attention_mask, **kwargs
            )
        raise UnsupportedCall(
            f"the attention implementation changed from {installed.implementation!r} to "
            f"{now!r} while patched: call vtprune.unpatch(model), switch, and "
            "patch again"
        )
    owner, heads = _Unprobed(module, installed.original) if installed.flash else module, kwargs.pop(HEADS, None)
    _show(installed, True, module, query, key, value, attention_mask, kwargs)
    result = installed.function(owner, query, key, value, attention_mask, **kwargs)
    if installed.changes:
        result = (_changed(installed, result[0], heads, module, query, key, value, attention_mask, kwargs), *result[1:])
    _show(installed, False, module, query, key, value, attention_mask, kwargs)
    return result


def _function_of(module: nn.Module, implementation: str) -> Any:
    """The attention function of that name, as the module's own file would find it."""
    names = interface_of(module)
    assert names is not None
    return names["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, names.get("eager_attention_forward"))


def _changed(
    installed: AttentionProbe,
    out: Tensor,
    heads: Tensor | None,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    scaling = kwargs.get("scaling")
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    for queries, keys, values, seen in _products(installed, module, q, k, v, mask, kwargs):
        for (change,) in installed.changes:
            out = change(out, heads, module, queries, keys, values, seen, scaling)
    return out


def _show(
    installed: AttentionProbe,
    before: bool,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> None:
    """Call the readers that stand before or behind the product."""
    readers = [
        reader for reader, early, wanted in installed.entries if early == before and (wanted is None or wanted())
    ]
    if not readers:
        return
    with torch.no_grad(), full_precision(q.device):
        scaling = kwargs.get("scaling")
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        for queries, keys, values, seen in list(_products(installed, module, q, k, v, mask, kwargs)):
            for reader in readers:
                reader(module, queries.detach(), keys.detach(), values.detach(), seen, scaling)


def _products(
    installed: AttentionProbe, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """The attention products that one call stands for, each with a mask that rows can be computed with."""
    for name in LOGIT_CHANGES:
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} changes its attention logits by {name!r}, which signals do not "
                "reproduce; choose a method without attention signals or another layer"
            )
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedCall(
            f"attention signals cannot be read with a mask of type {type(mask).__name__} (flex attention): "
            "load the model with attn_implementation='sdpa'"
        )
    if installed.flash:
        window = kwargs.get("sliding_window")
        if window is not None and k.shape[2] > window:
            raise UnsupportedCall(
                f"{type(module).__name__} attends to a window of {window} tokens inside the flash kernel, "
                f"{k.shape[2]} are there: choose a full-attention layer or attn_implementation='sdpa'"
            )
        lengths = kwargs.get("cu_seq_lens_q")
        if lengths is not None:
            cuts = lengths.diff().tolist()
            yield from ((*parts, None) for parts in zip(*(x.split(cuts, dim=2) for x in (q, k, v))))
            return
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if installed.sdpa and causal and 1 < q.shape[2] < k.shape[2]:
            # A static cache before its first decode step: keys beyond the queries are empty, never seen.
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    elif mask.dim() == 2:  # flash attention: which keys are real
        mask = mask.bool()[:, None, None]
    else:
        mask = mask[..., : k.shape[2]]
    yield q, k, v, mask


def _probe_of(module: nn.Module) -> AttentionProbe | None:
    return getattr(getattr(module, "config", None), "vtprune_probe", None)


def read(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    block: int | None = None,
) -> Tensor:
    """One signal of an attention product, as a reader sees it; `vtprune.signals` says what each is, and its shape.

    block: queries handled at a time where a signal asks all of them; None chooses by memory.
    Raises ValueError on a signal that nobody registered, or that is not read of an attention product.
    """
    known = kind_of(kind)
    if known.source != "attention":
        raise ValueError(f"signal {kind!r} is read of {known.source}, and not of an attention product")
    found: Tensor = known(LayerAttention(q, k, v, mask, scaling, block=block))
    return found


def reweighed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    reweigh: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The attention product [B, M, H, d] with other softmax rows (`Method.reweigh`), a block of queries at a time."""
    (batch, heads, queries, _), (_, groups, keys, width) = q.shape, v.shape
    slots, values, out = torch.arange(queries, device=q.device).expand(batch, -1), v.float(), []
    step = max(1, MASKED // (batch * heads * keys))
    for start in range(0, queries, step):
        some = slice(start, start + step)
        bias = bias_of(mask, slots[:, some], queries, keys)
        open_ = bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min
        rows = reweigh(attention_rows(q[:, :, some], k, bias, scaling), open_.sum(-1))
        stacked = rows.reshape(batch, groups, -1, keys) @ values
        out.append(stacked.reshape(batch, heads, -1, width).transpose(1, 2))
    return torch.cat(out, 1).to(v.dtype)
