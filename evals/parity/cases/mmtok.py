"""MMTok: coverage of the words and of the tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import grid_of, listed, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_mmtok_")
def mmtok(arrays: Arrays, folder: Path) -> str:
    """Picks in order and kept tokens, with the whole matrix and with rows on demand; a border is excluded."""
    x, states, words = (torch.from_numpy(arrays[name]) for name in ("vision", "vision_clip", "text_embedding"))
    n = len(x)
    height, width = grid_of(arrays, n)
    border = torch.zeros(n, dtype=torch.bool)
    border[torch.from_numpy(arrays["padding"]).long()] = True
    for memory in ("fast", "low"):
        method = create(
            "mmtok",
            alpha=real(arrays["alpha"]),
            image_temperature=real(arrays["vv_temp"]),
            text_temperature=real(arrays["tv_temp"]),
            padding=(lambda v: border) if border.any() else None,
            memory=memory,
        )
        for k in arrays["budgets"].tolist():
            signals = {method.needs[0]: states}
            answer = method(Visual(x, k, (1, height, width), signals=signals, text=words))
            same(f"order at {k}, memory={memory}", ordered(answer), arrays[f"order_{k}"])
            same(f"kept at {k}, memory={memory}", answer.idx, arrays[f"kept_{k}"])
    said = f", {int(border.sum())} of them border" if border.any() else ""
    return f"picks in order at {listed(arrays['budgets'].tolist())} of {n}{said}, {len(words)} words"
