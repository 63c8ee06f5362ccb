"""HiPrune: anchors, neighbours and registers, in LLaVA and in Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vtprune.evals.parity.compare import Mismatch, agree, close, listed, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.kernels import attention_received
from vtprune.registry import create
from vtprune.types import Visual


@case("hiprune_")
def hiprune(arrays: Arrays, folder: Path) -> str:
    """Scores from queries and keys; tokens kept by the official edges, each crop on its own share of the total."""
    scores, grid, of_each = _hiprune_qwen(arrays) if "window_index" in arrays else _hiprune_llava(arrays)
    worst = max(close(name, ours, arrays[name]) for name, ours in zip(("shallow_score", "deep_score"), scores))
    crops, n = scores[0].view(-1, grid[0] * grid[1] * grid[2]).shape
    fewer = []
    for j, (budget, alpha) in enumerate(zip(of_each, map(real, arrays["alpha"]), strict=True)):
        stored = arrays[f"keep_mask_{j}"] if f"keep_mask_{j}" in arrays else _mask(arrays[f"kept_{j}"], n)
        for crop, mask in enumerate(stored.reshape(crops, n)):
            for exact in (True, False):
                method = create("hiprune", alpha=alpha, edges="clamp_flat", exact_budget=exact)
                signals = {need: score.view(crops, n)[crop] for need, score in zip(method.needs, scores)}
                ours = method(Visual(torch.zeros(n, 1), budget, grid=grid, signals=signals)).idx
                if exact and len(ours) != budget:
                    raise Mismatch(f"run {j}, crop {crop}: {len(ours)} tokens kept, not {budget}")
                if "window_index" not in arrays:
                    agree(f"run {j}, crop {crop}: tokens", mask.sum(), budget)
                if exact and mask.sum() < budget:  # the official count falls short: ours holds all of those and more
                    ours = ours[torch.from_numpy(mask)[ours]]
                    fewer.append(f"{mask.sum()} of {budget}")
                elif not exact and "window_index" not in arrays:
                    continue
                same(f"run {j}, crop {crop}, exact_budget={exact}", ours, np.flatnonzero(mask))
    rule = f"; official short counts {', '.join(fewer)} repeated by exact_budget=False" if fewer else ""
    return f"tokens at {listed(of_each)} of {n}, {crops} crop(s); scores within {worst:.1g}{rule}"


def _hiprune_llava(arrays: Arrays) -> tuple[list[Tensor], tuple[int, int, int], list[int]]:
    """Attention received in both layers [crops, N], the grid, and the tokens of one crop per run."""
    q, k = (torch.from_numpy(arrays[name]) for name in "qk")
    scores = [attention_received(q[i], k[i], None, q.shape[-1] ** -0.5)[:, 1:] for i in (0, 1)]
    height, width = arrays["grid"].tolist()
    return scores, (1, height, width), [total // q.shape[1] for total in arrays["retention"].tolist()]


def _hiprune_qwen(arrays: Arrays) -> tuple[list[Tensor], tuple[int, int, int], list[int]]:
    """Sums over queries per merged token [N] in raster order; the object layer may attend within windows."""
    frames, height, width = arrays["grid_thw"].tolist()
    merge = int(arrays["spatial_merge_size"])
    grid, order = (frames, height // merge, width // merge), torch.from_numpy(arrays["window_index"])
    side = int(arrays["window_size"]) // int(arrays["patch_size"]) // merge
    lengths = [
        min(side, grid[1] - top) * min(side, grid[2] - left) * merge**2
        for top in range(0, grid[1], side)
        for left in range(0, grid[2], side)
    ] * frames
    scores = []
    for layer, whole in enumerate((bool(arrays["shallow_full_attention"]), True)):
        q, k = (torch.from_numpy(arrays[f"{name}_window_order"][layer])[None] for name in "qk")
        cuts = [q.shape[2]] if whole else lengths
        parts = zip(q.split(cuts, 2), k.split(cuts, 2))
        sums = [attention_received(a, b, None, q.shape[-1] ** -0.5)[0] * a.shape[2] for a, b in parts]
        scores.append(torch.cat(sums).view(-1, merge**2).mean(1)[order.argsort()])
    return scores, grid, [round(len(order) * real(share)) for share in arrays["retain_ratio"]]


def _mask(kept: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[kept] = True
    return mask
