"""AIM inside the language model: importance by PageRank, and the tokens that each layer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune import patch
from vtprune.evals.parity.compare import agree, close, listed, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock import run_base, stock_llava, visual_of
from vtprune.registry import create
from vtprune.types import Assignment, Method, Visual


@case("aim_inllm")
def aim_inllm(arrays: Arrays, folder: Path) -> str:
    """Importance and tokens of the first stage; with the stored choices, dropping must give what masking gave.

    Later choices of ours may differ: a masked token still hands out its start in the next PageRank, a dropped one does
    not.
    """
    from vtprune.methods.in_llm.withdraw import Withdraw
    from vtprune.types import Stage

    visual, embeds = visual_of(arrays), torch.from_numpy(arrays["inputs_embeds"])
    model, inputs = stock_llava(np.load(folder / "model_qwen2_28l.npz"), embeds, visual)
    shown = _shown_importance(arrays)
    agree("tau, iters, damping of the whole path", [0.1, 5, 0.0], [real(arrays["tau"]), *_iterations(arrays)])
    with patch(model, "aim_inllm", rates=tuple(map(real, arrays["retain_rate"]))) as handle:
        run_base(model, inputs)
        last = handle.last
    assert last is not None
    places = [unit.where for unit in last.units if isinstance(unit.where, int)]
    masks = {place: arrays["keep_mask_after_layer"][place - 1, visual].astype(bool) for place in places}
    first = last.units[0]
    assert first.scores is not None
    worst = [*shown, close("importance", first.scores, arrays["importance_all_layers"][places[0] - 1, visual])]
    same("kept at the first stage", first.idx, np.flatnonzero(masks[places[0]]))
    counts = [len(unit.idx) for unit in last.units]
    same("tokens per stage", torch.tensor(counts), [int(mask.sum()) for mask in masks.values()])
    behind = [int((visual.stop - visual.start) * real(share)) for share in arrays["retain_rate"]]
    agree("tokens behind every layer", behind, arrays["keep_mask_after_layer"][:, visual].sum(1, dtype=int))
    stages, before = [], np.ones_like(masks[places[0]])
    for place in places:
        chosen = torch.from_numpy(np.flatnonzero(masks[place][before]))
        stages.append(Stage(place, Chosen(chosen), len(chosen)) if len(chosen) else Stage(place, Withdraw(None)))
        before = masks[place]
    with patch(model, stages) as handle:
        out = run_base(model, inputs)
        left = handle.last
        step = {"inputs_embeds": torch.from_numpy(arrays["decode_embed"])[None], "past_key_values": out.past_key_values}
        decoded = run_base(model, step).last_hidden_state[0]
    assert left is not None
    worst.append(close("states", out.last_hidden_state[0, left.index[0]], arrays["last_hidden_state"][left.index[0]]))
    worst.append(close("decoded state", decoded, arrays["decode_last_hidden_state"].reshape(1, -1)))
    return f"stock LLaVA with Qwen2, {listed(counts)} tokens; on the stored choices all within {max(worst):.1g}"


class Chosen(Method):
    """Keeps what a stored run kept: idx among the tokens that are there."""

    per = "sample"

    def __init__(self, idx: Tensor) -> None:
        self.idx = idx

    def __call__(self, v: Visual) -> Assignment:
        return Assignment(self.idx)


def _iterations(arrays: Arrays) -> tuple[int, float]:
    return int(arrays["iters"]), real(arrays["damping"])


def _shown_importance(arrays: Arrays) -> list[float]:
    """Differences of the importance from logits [H, N, N] of single layers, where a file has some."""
    names = [name for name in arrays if name.startswith("logits_layer")]
    return [
        close(name, _importance(arrays[name], None, arrays), arrays[name.replace("logits", "importance")])
        for name in names
    ]


def _importance(logits: Any, seen: Tensor | None, arrays: Arrays) -> Tensor:
    """[N] from masked logits [H, N, N]; seen [N]: keys that are not masked. Settings the file lacks: as published."""
    from vtprune.kernels import page_rank

    z = torch.from_numpy(logits)[None]
    mask = z > torch.finfo(z.dtype).min / 2
    mask = mask if seen is None else mask & seen
    keys = torch.eye(z.shape[-1]).expand(z.shape)  # so that q.k are the stored logits
    sharpness = 1 / real(arrays["tau"]) if "tau" in arrays else 10.0
    steps, damping = _iterations(arrays) if "iters" in arrays else (5, 0.0)
    scores = page_rank(z.masked_fill(~mask, 0), keys, mask, sharpness, steps, damping=damping)
    return scores[0].square().mean(0).sqrt()


@case("video_aim_prune")
def video_aim_prune(arrays: Arrays, folder: Path) -> str:
    """Importance of every stored layer, masked tokens left in as officially, and the tokens kept behind it."""
    start, stop, n = arrays["bounds"].tolist()
    method, worst, counts = create("aim_inllm"), [], []
    masks, text = torch.from_numpy(arrays["mask_after_layer"]), n - (stop - start)
    shares = [real(share) for share in arrays["retain_rate"]]
    agree("layers", len(shares), len(masks))
    for layer, logits, stored in zip(arrays["layers"].tolist(), arrays["logits"], arrays["importance"], strict=True):
        seen = masks[layer - 1] if layer else torch.ones(n, dtype=torch.bool)
        score = _importance(logits, seen, arrays)
        worst.append(close(f"importance at layer {layer}", score, stored))
        there = seen[start:stop].nonzero().flatten()
        kept = int((stop - start) * shares[layer] + text) - text
        agree(f"tokens behind layer {layer}", kept, int(masks[layer, start:stop].sum()))
        if 0 < kept < len(there):
            signals = {method.needs[0]: score[start:stop][there]}
            answer = method(Visual(torch.zeros(len(there), 1), kept, signals=signals))
            same(f"kept behind layer {layer}", there[answer.idx], np.flatnonzero(masks[layer, start:stop]))
        counts.append(kept)
    return f"{listed(counts)} of {stop - start} tokens behind {len(counts)} layers; importance within {max(worst):.1g}"
