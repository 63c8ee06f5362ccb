"""Floating-point operations and bytes of an LLM's prefill, from its config alone.

FLOPs are 2 x MAC. Norms, activations and softmax are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .method import Stage


@dataclass(frozen=True)
class TextCost:
    """Cost model of a decoder with gated MLPs; sizes as in the config, `width` bytes a number."""

    layers: int
    d: int
    d_q: int
    d_kv: int
    mlp: int
    vocab: int
    width: int = 2

    @classmethod
    def of(cls, config: Any, width: int = 2) -> TextCost:
        """Read a transformers text config (Llama, Qwen2 and their kin)."""
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            layers=config.num_hidden_layers,
            d=config.hidden_size,
            d_q=heads * head,
            d_kv=(getattr(config, "num_key_value_heads", None) or heads) * head,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            width=width,
        )

    @property
    def layer_macs(self) -> int:
        """MACs of one layer's linear maps for one token; also its number of weights."""
        return 2 * self.d * self.d_q + 2 * self.d * self.d_kv + 3 * self.d * self.mlp

    def prefill(self, tokens: int | Sequence[int], causal: bool = True) -> int:
        """FLOPs for one row. tokens: one length, or the length that enters each layer.

        causal=False counts the whole attention square, which is what eager attention computes.
        """
        lengths = [tokens] * self.layers if isinstance(tokens, int) else tokens
        square = 2 if causal else 4
        return sum(2 * s * self.layer_macs + square * s * s * self.d_q for s in lengths) + 2 * self.d * self.vocab

    def look(self, dropped: int) -> int:
        """FLOPs of a stage that reads a row of the layer it stands at: the keys of the tokens that it drops there.

        Those of the others are the layer's own, and the queries that are asked are few.
        """
        return 2 * dropped * self.d * self.d_kv

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights one forward pass reads: blocks and LM head."""
        return self.width * (self.layers * self.layer_macs + self.d * self.vocab)

    def kv_bytes(self, tokens: int | Sequence[int]) -> int:
        """Bytes of keys and values of one row."""
        cached = tokens * self.layers if isinstance(tokens, int) else sum(tokens)
        return 2 * self.width * self.d_kv * cached


def looks(text: TextCost, stages: Sequence[Stage], entering: Sequence[int]) -> int:
    """FLOPs of the stages that read the layer they stand at; entering[k]: the tokens before what layer k drops."""
    inside = {
        stage.where
        for stage in stages
        if isinstance(stage.where, int) and "prefill" in stage.method.phases and any(n.layer == 0 for n in stage.needs)
    }
    return sum(text.look(entering[layer] - entering[layer + 1]) for layer in inside)


def text_cost(config: Any, width: int = 2) -> TextCost | None:
    """The cost model of a text config; None for experts, layers without attention, and sizes that it does not name."""
    kinds = getattr(config, "layer_types", None) or ()
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if experts or any("attention" not in kind or "linear" in kind for kind in kinds):
        return None
    try:
        return TextCost.of(config, width)
    except (AttributeError, TypeError):
        return None
