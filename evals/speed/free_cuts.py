"""The limit that a pruned prefill is measured against: the stock model on as many tokens, chosen for nothing.

Every stock module runs on the first so many rows of what would enter it, in the vision tower, the projector and the
decoder layers. Which tokens these are says nothing about speed, so a slice takes the place of the selection, and all
that a patched call takes beyond this is what pruning itself costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.handle import Handle
from vtprune.model_adapters.cache_argument import NAME
from vtprune.model_adapters.tower_layout import Modality, tower_of
from vtprune.model_adapters.tower_tokens import blocks_of
from vtprune.model_adapters.towers import attention_modules
from vtprune.types import UnsupportedModel

Hook = Callable[..., Any]
SEGMENTS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")  # a tower that packs its images is told where each ends


@dataclass
class Lengths:
    """What the modules of a pruned prefill ran on.

    llm: tokens by decoder layer. tower: rows by block, empty where nothing is cut there. segments: by block, what the
    attention of a packed tower was told of its segments. features: rows that leave the projector of a cut tower.
    """

    llm: list[int]
    tower: list[int] = field(default_factory=list)
    segments: list[dict[str, Tensor]] = field(default_factory=list)
    features: int = 0


def lengths_of(handle: Handle, model: Any, modality: Modality, call: Callable[[], Any]) -> Lengths:
    """The lengths of `call`, a prefill of the patched `model`. Raises UnsupportedModel where no projector is known."""
    if not any(isinstance(stage.where, tuple) for stage in handle.stages):
        call()
        return Lengths(list(handle.last.lengths))
    tower = tower_of(model.base_model, modality)
    attention, projector = attention_modules(tower), projector_of(model, tower)
    segments: list[dict[str, Tensor]] = [{} for _ in attention]
    features = [0]

    def told(k: int) -> Hook:
        def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            segments[k] = {name: kwargs[name] for name in SEGMENTS if torch.is_tensor(kwargs.get(name))}

        return note

    hooks = [module.register_forward_pre_hook(told(k), with_kwargs=True) for k, module in enumerate(attention)]
    hooks += [projector.register_forward_hook(lambda _, args, output: features.append(output.shape[-2]))]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    tower_lengths = list(handle.last.tower_lengths.get(modality, []))
    return Lengths(list(handle.last.lengths), tower_lengths, segments, features[-1])


class FreeCuts:
    """A context manager in which the unpatched `model` runs on these lengths, by hooks that slice.

    Raises UnsupportedModel for a model whose projector is not known, where the tower is cut, and inside the block for
    arguments of the text model that cannot be sliced.
    """

    def __init__(self, model: Any, modality: Modality, lengths: Lengths) -> None:
        self.model, self.lengths = model, lengths
        text = model.get_decoder()
        self.hooks: list[tuple[nn.Module, bool, Hook]] = [(text, True, self._text)]
        self.hooks += [(layer, True, self._layer(i)) for i, layer in enumerate(text.layers)]
        if lengths.tower:
            tower = tower_of(model.base_model, modality)
            self.hooks += [(block, True, self._block(k)) for k, block in enumerate(blocks_of(tower))]
            self.hooks += [(tower, True, self._start), (projector_of(model, tower), False, self._pad)]

    def __enter__(self) -> FreeCuts:
        self._undo = [
            module.register_forward_pre_hook(hook, with_kwargs=True) if before else module.register_forward_hook(hook)
            for module, before, hook in self.hooks
        ]
        self._sliced: dict[tuple[int, int], Any] = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._undo:
            hook.remove()

    def _once(self, value: Any, n: int, dim: int) -> Any:
        """Layers share their arguments: each object is sliced once a length, and kept alive while its id is a key."""
        key = id(value), n
        if key not in self._sliced:
            cut = tuple(first(t, n, dim) for t in value) if isinstance(value, tuple) else first(value, n, dim)
            self._sliced[key] = value, cut
        return self._sliced[key][1]

    # -- the vision tower: as many rows as each block is left with, and as many features as before behind the projector

    def _start(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._sliced.clear()

    def _block(self, k: int) -> Hook:
        n, segments = self.lengths.tower[k], self.lengths.segments[k]

        def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = {**kwargs, **{name: value for name, value in segments.items() if name in kwargs}}
            hidden = args[0] if args else call.pop("hidden_states")
            if call.get("position_embeddings") is not None:
                call["position_embeddings"] = self._once(call["position_embeddings"], n, -2)
            return (first(hidden, n, -2), *args[1:]), call

        return cut

    def _pad(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return pad(output, (0, 0, 0, self.lengths.features - output.shape[-2]))

    # -- the text model

    def _text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._sliced.clear()
        n, whole = self.lengths.llm[0], kwargs["inputs_embeds"].shape[1]
        call = {**kwargs, "inputs_embeds": kwargs["inputs_embeds"][:, :n]}
        for name, value in kwargs.items():
            if name in ("attention_mask", "position_ids") and torch.is_tensor(value) and value.dim() < 4:
                call[name] = first(value, n, -1)
            elif name != "inputs_embeds" and torch.is_tensor(value) and whole in value.shape:
                raise UnsupportedModel(
                    f"the text model of {self.model.config.model_type} takes {name!r} of shape {list(value.shape)}, "
                    "which the limit cannot slice: measure this model with vtprune bench without --overhead"
                )
        return args, call

    def _layer(self, i: int) -> Hook:
        n = self.lengths.llm[i]

        def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if n == self.lengths.llm[0]:
                return None
            call = dict(kwargs)
            hidden = args[0] if args else call.pop("hidden_states")
            for name, dim in (("position_embeddings", -2), ("position_ids", -1)):
                if call.get(name) is not None:
                    call[name] = self._once(call[name], n, dim)
            if call.get("attention_mask") is not None:
                call["attention_mask"] = call["attention_mask"][..., :n, :n]
            return (first(hidden, n, -2), *args[1:]), call

        return cut


def first(x: Tensor, n: int, dim: int) -> Tensor:
    """The first n of a dimension; x itself where there are no more."""
    return x if x.shape[dim] <= n else x.narrow(dim, 0, n)


def projector_of(model: Any, tower: nn.Module) -> nn.Module:
    """What makes the tower's states features of the LLM."""
    found = getattr(model.base_model, "multi_modal_projector", None) or getattr(tower, "merger", None)
    if found is None:
        raise UnsupportedModel(
            f"no projector of {model.config.model_type} is known, so the limit of stages in its tower cannot be run: "
            "leave out the methods inside the tower, or measure llava or qwen2.5-vl"
        )
    return found


def plain_cache(cache: Any, config: Any) -> Any:
    """A stock cache that stores the keys and values that `cache` does."""
    from transformers import DynamicCache

    plain = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        plain.update(layer.keys.clone(), layer.values.clone(), i)
    return plain


def continued(cache: Any) -> dict[str, Any]:
    """The arguments of a decode step on this cache."""
    return {NAME: cache, "use_cache": True}
