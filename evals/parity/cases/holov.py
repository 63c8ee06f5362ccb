"""HoloV: shares of the budget for runs of the token list, and the tokens of most attention in each."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import agree, close, grid_of, listed, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_holov_")
def holov(arrays: Arrays, folder: Path) -> str:
    """Positions in official order and features; what the official code loses of the budget is lost by ours as well.

    With redistribute=True all of the budget stays, and the same tokens where nothing was lost.
    """
    x, attention = torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["attention"])
    n = x.shape[1]
    if "grid" in arrays:
        grid_of(arrays, n)
    budgets = arrays["budgets"].tolist()
    worst, lost = [0.0], 0
    for j, (budget, runs) in enumerate(zip(budgets, arrays["num_crops"].tolist(), strict=True)):
        options = {"runs": runs, "order": "official"} | ({"alpha": real(arrays["alpha"])} if "alpha" in arrays else {})
        official, ours = (create("holov", redistribute=whole, **options) for whole in (False, True))
        for i, (tokens, row) in enumerate(zip(x, attention)):
            unit = Visual(tokens, budget, signals={official.needs[0]: row})
            answer, whole = official(unit), ours(unit)
            features, positions = tokens.new_zeros(budget, x.shape[2]), torch.full((budget,), -1)
            features[: len(answer.idx)], positions[: len(answer.idx)] = answer.apply(tokens), ordered(answer)
            same(f"positions of run {j}, image {i}", positions, arrays[f"positions_{j}"][i])
            worst.append(close(f"features of run {j}, image {i}", features, arrays[f"features_{j}"][i]))
            agree(f"tokens of run {j}, image {i}, redistributed", len(whole.idx), budget)
            lost += budget - len(answer.idx)
            if len(answer.idx) == budget:
                same(f"redistributed tokens of run {j}, image {i}", ordered(whole), ordered(answer))
    rule = f"; {lost} rows of zeros repeated by redistribute=False" if lost else ""
    return f"positions at {listed(budgets)} of {n}, {len(x)} image(s); features within {max(worst):.1g}{rule}"
