"""Prefill at a few fixed lengths, for CUDA graphs and `torch.compile`: what eager Python costs is paid once a length.

A fixed budget makes the pruned prompt as long as the last one, and a bucket makes prompts of many lengths alike: the
text model runs on the next multiple of `bucket`, the surplus on the right, where causal attention lets no real token
see it. So no mask is needed and the kernels for causal attention stay in use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from vtprune import cache as kv
from vtprune.compact import mask_for
from vtprune.types import UnsupportedCall, UnsupportedModel

MODES = ("eager", "graph", "compile")
# Whatever else the text model is handed is refused: it would have to be padded too, or be answered.
KNOWN = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "return_dict")


class Bucketed:
    """The text model of a VLM, run at bucketed lengths; a context manager around calls of the model.

    Inside the block a prompt without past goes through one CUDA graph ("graph") or one compiled function ("compile")
    per batch size and bucket; everything else (decode steps, later turns) runs as before. Stages before the LLM may be
    patched in, and compose: they cut the prompt before it gets here. Compiled lengths are kept between blocks.

    Use it under one gradient mode throughout; bench uses `torch.inference_mode()`.
    Raises UnsupportedModel where attention is not causal throughout or decoder layers carry hooks (stages inside the
    LLM), UnsupportedCall for arguments it cannot pad, ValueError for an unknown mode, or a graph without CUDA.
    """

    def __init__(self, model: Any, mode: str, bucket: int = 64, backend: Any = "inductor") -> None:
        if mode not in MODES[1:]:
            raise ValueError(f"prefill mode {mode!r}: choose one of {', '.join(MODES)}")
        if mode == "graph" and model.device.type != "cuda":
            raise ValueError("prefill mode 'graph' captures CUDA graphs: use 'compile' on a CPU")
        if bucket < 1:
            raise ValueError(f"bucket={bucket} holds no token: use an int >= 1")
        self.text: nn.Module = model.get_decoder()
        config = model.config.get_text_config(decoder=True)
        kinds = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
        if kinds != ["full_attention"] or not getattr(config, "is_causal", True):
            raise UnsupportedModel(
                f"{type(self.text).__name__} has layers of kinds {kinds}: a padded prefill is exact for causal full "
                "attention only; use prefill='eager'"
            )
        self.mode, self.bucket, self.config = mode, bucket, config
        self.attention = config._attn_implementation or "eager"
        self.runs: dict[tuple[int, int, bool], Callable[..., tuple[Tensor, ...]]] = {}
        self._forward = partial(type(self.text).forward, self.text)  # that of a patch runs outside of compilers
        self._compiled = None
        if mode == "compile":  # fullgraph: more lengths than torch will compile raise instead of running eagerly
            self._compiled = torch.compile(self._run, dynamic=False, fullgraph=True, backend=backend)

    def __enter__(self) -> Bucketed:
        layers: Any = self.text.layers
        if any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers):
            raise UnsupportedModel(
                f"prefill={self.mode!r} runs decoder layers without Python, so stages inside the LLM cannot act there "
                "(flash attention adds hooks too): use prefill='eager', or a method that acts before the LLM"
            )
        self._before = self.text.__dict__.get("forward")
        self.text.__dict__["forward"] = self.forward
        return self

    def __exit__(self, *exc: object) -> None:
        del self.text.__dict__["forward"]
        if self._before is not None:
            self.text.__dict__["forward"] = self._before

    def forward(self, *args: Any, **call: Any) -> Any:
        """The text model's forward, bucketed where it can be; returns BaseModelOutputWithPast like it."""
        embeds, cache = call.get("inputs_embeds"), call.get(kv.NAME)
        past = cache is not None and cache.get_seq_length() > 0
        if args or embeds is None or past or call.get("use_cache") is False:
            return self._forward(*args, **call)
        others = [k for k, v in call.items() if k not in KNOWN and v is not None and v is not False]
        if others or (cache is not None and type(cache) is not DynamicCache):
            what = ", ".join(others) or type(cache).__name__
            raise UnsupportedCall(f"prefill={self.mode!r} cannot serve {what}: use prefill='eager'")
        hidden, *stored = self._prefill(embeds, call.get("position_ids"), call.get("attention_mask"))
        length = embeds.shape[1]
        cache = DynamicCache(config=self.config) if cache is None else cache
        for i, (keys, values) in enumerate(zip(stored[::2], stored[1::2])):
            cache.update(keys[:, :, :length], values[:, :, :length], i)  # copies: a graph will write there again
        return BaseModelOutputWithPast(hidden[:, :length].clone(), cache)  # by place: the name has changed

    def _prefill(self, embeds: Tensor, ids: Tensor | None, mask: Any) -> tuple[Tensor, ...]:
        batch, length = embeds.shape[:2]
        size = -(-length // self.bucket) * self.bucket
        if ids is None:
            ids = torch.arange(length, device=embeds.device)[None]
        inputs = {"embeds": pad(embeds, (0, 0, 0, size - length)), "ids": pad(ids, (0, size - length))}
        masked = mask is not None and not (mask.dim() == 2 and bool(mask.all()))
        if masked:
            if mask.dim() != 2:
                raise UnsupportedCall(f"prefill={self.mode!r} cannot pad a {mask.dim()}-D mask: use prefill='eager'")
            real = pad(mask.bool(), (0, size - length))
            inputs["mask"] = mask_for(self.attention, real, size, embeds.dtype)
        key = (batch, size, masked)
        if key not in self.runs:
            self.runs[key] = self._compiled or Graph(self._run, inputs)
        return self.runs[key](**inputs)

    def _run(self, embeds: Tensor, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """(hidden [B, n, D], keys and values [B, H, n, d] of every layer in turn)."""
        cache = DynamicCache(config=self.config)
        cache.layers = [_Once() for _ in self.text.layers]  # type: ignore[union-attr]
        out = self._forward(
            inputs_embeds=embeds, position_ids=ids, attention_mask=mask, use_cache=True, **{kv.NAME: cache}
        )
        stored = [x for layer in cache.layers for x in (layer.keys, layer.values)]  # type: ignore[union-attr]
        return (out.last_hidden_state, *stored)


class _Once(DynamicLayer):
    """A cache layer for one prefill: it holds what it is given, where the usual one appends a copy to nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class Graph:
    """A function captured once in a CUDA graph: inputs are copied to where the graph reads, results lie in its pool.

    Results are overwritten by the next call. inputs: tensors of the shapes that every call will have.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> None:
        self.static = {name: value.clone() for name, value in inputs.items()}
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate workspaces and choose kernels before anything is recorded
                run(**self.static)
        here.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = run(**self.static)

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        for name, value in inputs.items():
            self.static[name].copy_(value)
        self.graph.replay()
        return self.results
