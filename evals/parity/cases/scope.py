"""SCOPE: coverage of the tokens, weighted by CLS attention."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import grid_of, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_scope_")
def scope(arrays: Arrays, folder: Path) -> str:
    """Picks in order, of every crop, with the whole matrix and with rows on demand; attention as sum over heads."""
    features, attention = (torch.from_numpy(arrays[name]) for name in ("features", "cls_attn"))
    crops, n, _ = features.shape
    height, width = grid_of(arrays, n)
    modes = []
    runs = zip(arrays["budgets"].tolist(), map(real, arrays["alpha"]), arrays["combine_add"].tolist(), strict=True)
    for j, (k, alpha, adds) in enumerate(runs):
        for memory in ("fast", "low"):
            combine = "add" if adds else "multiply"
            method = create("scope", alpha=alpha, combine=combine, heads=attention.shape[1], memory=memory)
            cls, *_, states = method.needs
            rows = attention.mean(1)[:, 1:]
            units = [Visual(x, k, (1, height, width), signals={cls: row, states: x}) for x, row in zip(features, rows)]
            for crop, answer in enumerate(method.batch(units)):
                same(f"run {j}, crop {crop}, memory={memory}", ordered(answer), arrays[f"order_{j}"][crop])
        modes.append(f"{k} ({combine}, alpha {alpha:g})")
    return f"picks in order at {', '.join(modes)} of {n}, {crops} crop(s), with and without the whole matrix"
