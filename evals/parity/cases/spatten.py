"""SpAtten's slots between two turns of a chat."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import close, same
from vtprune.evals.parity.registry import Arrays, case


@case("spatten_llm_kv")
def spatten_llm_kv(arrays: Arrays, folder: Path) -> str:
    """Slots that every head of every layer keeps between two turns of a chat, and the caches they leave."""
    from vtprune.methods.in_llm.spatten_heads import most_important

    logits = torch.from_numpy(arrays["pre_softmax_logits"]).sum((1, 3))  # [L, H, S]
    names = ("start_size", "important_size", "recent_size", "num_coming")
    first, count, recent, coming = (int(arrays[name]) for name in names)
    kept = most_important(logits, count, first, recent - coming)
    same("slots", kept.flatten(), arrays["kept_indices_per_layer_head"].reshape(-1))
    for name in ("key_cache", "value_cache"):
        held = torch.from_numpy(arrays[name])[:, 0]
        cut = held.gather(2, kept[..., None].expand(*kept.shape, held.shape[-1]))
        close(name, cut, arrays[f"pruned_{name}"][:, 0])
    layers, heads, slots = logits.shape
    return f"{kept.shape[-1]} of {slots} slots of {heads} heads in {layers} layers, keys and values"
