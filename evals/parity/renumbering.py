"""Schedules of stages inside the language model that renumber positions, as PyramidDrop and TransPrune have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtprune import patch
from vtprune.evals.parity.compare import agree, close, listed, real, same
from vtprune.evals.parity.registry import Arrays
from vtprune.evals.parity.stock import llama_of, run_base, visual_of


def renumbering(arrays: Arrays, folder: Path, method: str, options: dict[str, Any]) -> str:
    """A schedule of stages that renumber positions, against the stored run of its official code."""
    model, inputs = llama_of(arrays, folder)
    ids: list[Tensor] = []
    see = lambda module, args, kwargs: ids.append(kwargs["position_ids"][0])  # noqa: E731
    layers = arrays["layer_list"].tolist()
    options = {"layers": tuple(layers), "ratios": tuple(map(real, arrays["ratio_list"])), **options}
    with patch(model, method, positions="compact", **options) as handle:
        watched = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in model.get_decoder().layers]
        out = run_base(model, inputs)
        last, cache = handle.last, out.past_key_values
        step = {"inputs_embeds": torch.from_numpy(arrays["decode_embed"])[None], "past_key_values": cache}
        stored = torch.tensor([layer.keys.shape[2] for layer in cache.layers])
        decoded = run_base(model, step).last_hidden_state[0]
        for hook in watched:
            hook.remove()
    assert last is not None
    same("layers of the stages", torch.tensor([unit.where for unit in last.units]), arrays["layer_list"])
    worst = []
    text = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    text[visual_of(arrays)] = False
    for i, unit in enumerate(last.units):
        assert unit.scores is not None
        agree(f"tokens kept at stage {i}", len(unit.idx), arrays[f"stage{i}_keep"])
        worst.append(close(f"scores of stage {i}", unit.scores, arrays[f"stage{i}_score_visual"]))
        kept = torch.cat([text.nonzero().flatten(), unit.positions]).sort().values
        same(f"kept at stage {i}", kept, arrays[f"stage{i}_kept_indices"])
        same(f"ids behind stage {i}", ids[layers[i]], arrays[f"stage{i}_position_ids"])
    same("kept at the end", last.index[0], arrays["final_kept_indices"])
    same("cached tokens per layer", stored, arrays["kv_lengths_after_prefill"])
    same("ids of the decoded token", torch.cat(ids[len(stored) :]), arrays["decode_position_id_per_layer"])
    worst.append(close("states", out.last_hidden_state[0, last.index[0]], arrays["last_hidden_state"]))
    worst.append(close("decoded state", decoded, arrays["decode_last_hidden_state"]))
    counts = listed([len(unit.idx) for unit in last.units])
    return f"stock LLaVA, {counts} tokens kept, ids renumbered, one decode step; all within {max(worst):.1g}"
