"""DyCoke's choice of cached tokens at every decode step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtprune import patch
from vtprune.evals.parity.compare import agree, close, listed, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock import run_base, stock_llava, visual_of
from vtprune.registry import create
from vtprune.types import Signal, Visual


@case("dycoke_kv_")
def dycoke_kv(arrays: Arrays, folder: Path) -> str:
    """Prefill and decode steps of a stock LLaVA; the official code sees all tokens where a step is like the last."""
    from vtprune.cache import NAME, state

    visual, layer = visual_of(arrays), int(arrays["L"])
    model, inputs = stock_llava(np.load(folder / "model_qwen2.npz"), torch.from_numpy(arrays["inputs_embeds"]), visual)
    keep = _dycoke_count(visual.stop - visual.start, arrays["prune_ratio"])
    worst, seen, threshold = [], [], real(arrays["similarity_threshold"])
    with patch(model, "dycoke_kv", layer=layer, keep=keep, threshold=threshold, similar="all") as handle:
        out = run_base(model, inputs)
        worst.append(close("prefill states", out.last_hidden_state[0], arrays["prefill_last_hidden_state"]))
        length, cache = inputs["input_ids"].shape[1], out[NAME]
        for t, embed in enumerate(torch.from_numpy(arrays["decode_embeds"])):
            states = run_base(model, {"inputs_embeds": embed[None, None], NAME: cache}).last_hidden_state[0]
            assert handle.last is not None
            text = [*range(visual.start), *range(visual.stop, length + t + 1)]
            agree(f"pruned at step {t}", len(handle.last.recalled[layer][0]) == keep, bool(arrays[f"step{t}_pruned"]))
            kept = torch.cat([handle.last.recalled[layer][0], torch.tensor(text)]).sort().values
            same(f"tokens seen at step {t}", kept, arrays[f"step{t}_kept_sorted"])
            worst.append(close(f"states of step {t}", states, arrays[f"step{t}_last_hidden_state"]))
            memory: Any = state(cache, layer)
            row = memory.selection.memory[0]["row"]
            worst.append(close(f"attention of step {t}", row, arrays[f"step{t}_image_attention"]))
            seen.append(len(kept))
    return f"stock LLaVA, layers from {layer} on see {listed(seen)} tokens; all within {max(worst):.1g}"


@case("video_dycoke_kv_")
def video_dycoke_kv(arrays: Arrays, folder: Path) -> str:
    """The method on the stored rows, step by step."""
    start, n = int(arrays["start"]), int(arrays["img_len"])
    budgets = sorted(name.split("_")[0] for name in arrays if name.endswith("_similarity"))
    for b in budgets:
        state: dict[str, Any] = {}
        for t in range(int(arrays["n_steps"])):
            heads = torch.from_numpy(arrays[f"attn_step{t}"])
            rows = heads.mean(0)[start : start + n]
            keep = _dycoke_count(n, arrays[f"{b}_p"])
            view = Visual(rows.new_zeros(n, 0), keep, signals={Signal("last_row", -1): rows}, state=state)
            chosen = create("dycoke_kv", similar="all")(view).idx + start
            agree(f"{b} pruned at step {t}", len(chosen) < n, bool(arrays[f"{b}_pruned"][t]))
            rest = [*range(start), *range(start + n, heads.shape[1])]
            agree(f"tokens at step {t}", heads.shape[1], start + n + int(arrays["tail"]) + t + 1)
            same(f"{b}, step {t}", torch.cat([chosen, torch.tensor(rest)]).sort().values, arrays[f"{b}_keep{t}"])
    return f"{n} visual tokens, {len(budgets)} ratios, {int(arrays['n_steps'])} steps: tokens seen"


def _dycoke_count(n: int, ratio: Any) -> int:
    """What the official code keeps of n tokens, in its float64 arithmetic."""
    return int(n * (1 - real(ratio)))
