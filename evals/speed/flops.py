"""Floating-point operations and bytes of a VLM's prefill and decode, and the roofline that follows from them.

FLOPs are 2 x MAC everywhere. The LLM is computed from its config; the vision tower and projector, which differ by
family, are counted by `torch.utils.flop_counter` on a real call. Norms, activations and softmax are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vtprune.evals.speed.meter import seconds

FORMULA = (
    "FLOPs = 2 x MAC. LLM prefill = sum over layers l of s_l*c + 2*s_l^2*d, plus 2*d*V, with "
    "c = 2*(2*d^2 + 2*d*d_kv + 3*d*m) and s_l the tokens that enter layer l; causal attention counts half the square, "
    "the LM head one token. Vision tower and projector: torch.utils.flop_counter."
)


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


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of a call as torch counts them: attention as the whole square, and in its plain form, because the counter
    of some versions (seen: 2.14) knows no fused attention of the CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Card:
    """What a processor reaches in practice, in one data type: dense FLOP/s and bytes/s."""

    flops: float
    bandwidth: float


# Half precision. Measured on such a card, not taken from its data sheet: a large product, and a copy.
CARDS = {"NVIDIA H200": Card(790e12, 4.3e12)}


def card(name: str | None) -> Card | None:
    """The half-precision figures of a GPU by its CUDA name; None for an unknown one."""
    return next((figures for known, figures in CARDS.items() if name and name.startswith(known)), None)


def peak(device: torch.device, dtype: torch.dtype) -> Card:
    """What this processor reaches: from `CARDS` if it is known, else measured now in a second or two."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    known = card(name) if dtype.itemsize == 2 else None
    return known or measured(device, dtype)


def measured(device: torch.device, dtype: torch.dtype, side: int | None = None) -> Card:
    """Best of five: a square product [side, side], and a copy that no cache holds (read and write counted)."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a = torch.ones(side, side, device=device, dtype=dtype)
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return Card(2 * side**3 / product, 2 * source.nbytes / copy)


def ideal_llm(gpu: Card, text: TextCost, tokens: int | Sequence[int], batch: int = 1) -> float:
    """Seconds of an LLM prefill at the card's limit: the larger of compute and bytes (weights once, KV written)."""
    compute = batch * text.prefill(tokens) / gpu.flops
    return max(compute, (text.weight_bytes + batch * text.kv_bytes(tokens)) / gpu.bandwidth)
