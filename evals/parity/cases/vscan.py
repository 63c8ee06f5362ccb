"""VScan's first stage: tokens of windows and of the whole image, and merged features, in LLaVA and in Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtprune.evals.parity.compare import Mismatch, agree, close, listed, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Signal, Visual


@case("leaders_vscan_llava_")
def vscan_llava(arrays: Arrays, folder: Path) -> str:
    """Tokens and merged features of every crop, with as few tokens as the official code keeps.

    The exact budget must keep all of these, and no others where that many were asked for.
    """
    x = torch.from_numpy(arrays["features"])
    rows = [torch.from_numpy(arrays[name]).mean(1)[:, 1:] for name in ("cls_attn_l5", "cls_attn_l22")]
    side, worst, counts = round(x.shape[1] ** 0.5), [], []
    for budget in arrays["budgets"].tolist():
        masks, features = arrays[f"mask_{budget}"], arrays[f"features_{budget}"]
        for crop, mask in enumerate(masks):
            for exact in (False, True):
                method: Any = create("vscan", exact_budget=exact)
                signals = dict(zip(_read(method), (row[crop] for row in rows)))
                answer = method(Visual(x[crop], budget, grid=(1, side, side), signals=signals))
                what, few = f"tokens of crop {crop} at {budget}", mask.sum() < budget
                if exact and few:
                    agree(f"{what}: count", len(answer.idx), budget)
                    if not set(np.flatnonzero(mask)) <= set(answer.idx.tolist()):
                        raise Mismatch(f"{what}: an exact budget lacks some of those kept officially")
                    continue
                same(what, answer.idx, np.flatnonzero(mask))
                worst.append(close(f"features of crop {crop} at {budget}", answer.apply(x[crop]), features[crop]))
        counts.append(int(masks[0].sum()))
    return f"tokens at {listed(counts)} of {x.shape[1]}, {len(x)} crop(s); merged features within {max(worst):.1g}"


@case("leaders_vscan_qwen_")
def vscan_qwen(arrays: Arrays, folder: Path) -> str:
    """Local tokens in the order they were accepted, all tokens, and merged features, without a CLS token."""
    x = torch.from_numpy(arrays["features"])
    (frames, height, width) = arrays["grid_thw"].reshape(-1).tolist()
    grid = frames, height // 2, width // 2
    agree("tokens of the grid", grid[0] * grid[1] * grid[2], len(x))
    agree("tokens of a window's side", 4, arrays["window_size"])
    method: Any = create("vscan")
    scores = (torch.from_numpy(arrays[name]) for name in ("attn_local", "attn_global"))
    signals = dict(zip(_read(method, "received"), scores))
    worst, counts = [], []
    for j, ratio in enumerate(map(real, arrays["image_token_ratio"])):
        kept, local = arrays[f"kept_{j}"], arrays[f"local_order_{j}"]
        (stage, *_) = method.stages(ratio, 28)
        (budget,) = stage.budgets([len(x)])
        answer = method(Visual(x, budget, grid=grid, signals=signals))
        same(f"local tokens of run {j}", ordered(answer)[: len(local)], local)
        same(f"tokens of run {j}", answer.idx, kept)
        worst.append(close(f"features of run {j}", answer.apply(x), arrays[f"features_{j}"]))
        counts.append(len(kept))
    return f"tokens at {listed(counts)} of {len(x)}; merged features within {max(worst):.1g}"


def _read(method: Any, kind: str = "cls") -> list[Signal]:
    return [need for need in method.needs if need.kind == kind]
