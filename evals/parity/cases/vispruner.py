"""VisPruner, and FasterVLM, which is its attention part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtprune.evals.parity.compare import agree, grid_of, listed, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_vispruner_")
def vispruner(arrays: Arrays, folder: Path) -> str:
    """Tokens of every crop; for FasterVLM those of `cls_topk` and those that are all important."""
    x, rows = torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["cls_attn"]).mean(1)[:, 1:]
    grid_of(arrays, x.shape[1])
    budgets = arrays["visual_token_num"].tolist()
    runs: list[tuple[str, Any, int]] = [
        (f"mask_{j}", create("vispruner", important=real(ratio)), budget)
        for j, (budget, ratio) in enumerate(zip(budgets, arrays["important_ratio"], strict=True))
    ]
    runs += [("fastervlm_mask_0", create("cls_topk", layer=None), budgets[0])]
    runs += [("fastervlm_mask_0", create("vispruner", important=1.0), budgets[0])]
    for name, method, budget in runs:
        for crop, mask in enumerate(arrays[name]):
            signals = {need: (x if need.kind == "hidden" else rows)[crop] for need in method.needs}
            answer = method(Visual(x[crop], budget, signals=signals))
            agree(f"{name}: tokens", mask.sum(), budget)
            same(f"{name} of crop {crop}", answer.idx, np.flatnonzero(mask))
    return f"tokens at {listed(budgets)} of {x.shape[1]}, {len(x)} crop(s), and FasterVLM's at {budgets[0]}"
