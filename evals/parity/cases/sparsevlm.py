"""SparseVLM: the rank rule, and the whole path of both versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vtprune import patch
from vtprune.evals.parity.compare import TOLERANCE, Mismatch, agree, close, listed, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock import decode_step, run_base, stock_llava, visual_of
from vtprune.registry import create
from vtprune.types import Visual


@case("sparsevlm_rank")
def sparsevlm_rank(arrays: Arrays, folder: Path) -> str:
    """The rank rule of the first release, and that of the video branch, from the raters' rows."""
    from vtprune.methods.in_llm.sparsevlm import RELEVANCE, ROWS

    rows, n = torch.from_numpy(arrays["attn_mean_heads_rater_rows"]), int(arrays["vis_len"])
    agree("visual tokens", rows.shape[1], n)
    agree("rank", int(torch.linalg.matrix_rank(rows)), arrays["rank"])
    relevance = torch.cat([torch.ones(len(rows)), torch.zeros(1)])  # one more text token, which is no rater
    signals = {ROWS: torch.cat([rows.T, torch.ones(n, 1)], dim=1), RELEVANCE: relevance}
    x, counts = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), []
    for tag, scale, bias in (("v1", real(arrays["v1_scale"]), real(arrays["v1_bias"])), ("video", 1.0, 0.0)):
        answer = create("sparsevlm", scale=scale, bias=bias)(Visual(x, None, signals=signals))
        stored = np.flatnonzero(arrays[f"{tag}_keep_mask"])
        kept = n if int(arrays["rank"]) == n else min(int(int(arrays["rank"]) * scale + bias), n - 1)
        agree(f"tokens by {tag}", kept, len(stored))
        recycled = (int(0.3 * (n - kept)) + 1) // 10 + 1 if kept < n else 0
        agree(f"tokens of {tag} with merged ones", len(answer.idx), kept + recycled)
        same(f"kept by {tag}", ordered(answer)[: len(stored)].sort().values, stored)
        if (len(answer.idx) > len(stored)) != bool(arrays[f"{tag}_merge_flag"]):
            raise Mismatch(f"{tag}: {len(answer.idx) - len(stored)} merged tokens, stored flag says otherwise")
        assert answer.scores is not None
        worst = close("scores", answer.scores, arrays["score_visual"])
        counts.append(len(stored))
    return f"tokens by rank {int(arrays['rank'])}: {listed(counts)} of {n}; scores within {worst:.1g}"


@case("sparsevlm_")
def sparsevlm(arrays: Arrays, folder: Path) -> str:
    """The whole path: scores and kept tokens of every stage, merged states, prefill, cache and one decode step."""
    plus = "stage0_merge_output" not in arrays
    heads = arrays["num_heads"]
    weights = dict(np.load(folder / "model_llama.npz"), num_heads=heads, num_kv_heads=heads)
    visual = visual_of(arrays)
    model, inputs = stock_llava(weights, torch.from_numpy(arrays["inputs_embeds"]), visual)
    layers, counts = tuple(arrays["pruning_layers"].tolist()), tuple(arrays["keep_list"].tolist())
    version = {"version": "plus", "heads": 14} if plus else {"version": "v1", "positions": "compact"}
    with patch(model, "sparsevlm", layers=layers, counts=counts, order="official", **version) as handle:
        out = run_base(model, inputs)
        last, states = handle.last, out.last_hidden_state[0]
        worst, cached = decode_step(model, out, arrays)
    assert last is not None
    agree("layers", [unit.where for unit in last.units], [layer + 1 for layer in layers])
    for i, unit in enumerate(last.units):
        assert unit.scores is not None
        stored = arrays[f"stage{i}_score_visual"]
        agree(f"tokens before stage {i}", unit.n, arrays[f"stage{i}_vis_before"])
        if not plus:
            agree(f"merged at stage {i}", len(unit.idx) - counts[i], arrays[f"stage{i}_merge_cluster_num"])
        # Division by nearly zero rotary weights amplifies rounding.
        loose = TOLERANCE / (1e-3 + 1e-3 * torch.from_numpy(stored).abs()) if plus else torch.ones(unit.n)
        worst.append(close(f"scores of stage {i}", unit.scores * loose, torch.from_numpy(stored) * loose))
        kept = ordered(unit.assignment)[: counts[i]].sort().values
        same(f"kept at stage {i}", kept, np.flatnonzero(arrays[f"stage{i}_keep_mask"]))
    worst.append(close("states", states[last.index[0]], arrays["last_hidden_state"]))
    return f"stock LLaVA, tokens of {len(counts)} stages, {cached} tokens; all within {max(worst):.1g}"
