"""CDPruner: a DPP of token features, scaled by their relevance to the text."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import agree, grid_of, listed, ordered, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.methods.pre_llm.cdpruner import paired_relevance
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_cdpruner_")
def cdpruner(arrays: Arrays, folder: Path) -> str:
    """Picks in order of all crops at once, relevance from the stored embeddings, normalised over all of them."""
    x, image, text = (torch.from_numpy(arrays[name]) for name in ("features", "image_embeds", "text_embeds"))
    found = [paired_relevance(crop, text) for crop in image]
    method = create("cdpruner", relevance=lambda units: found, normalize="batch")
    n = x.shape[1]
    if "grid" in arrays:
        grid_of(arrays, n)
    budgets = arrays["budgets"].tolist()
    for k in budgets:
        for i, answer in enumerate(method.batch([Visual(crop, k) for crop in x])):
            same(f"order of crop {i} at {k}", ordered(answer), arrays[f"order_{k}"][i])
            mask = torch.zeros(n, dtype=torch.bool).index_fill(0, answer.idx, True)
            agree(f"tokens of crop {i} at {k}", mask, arrays[f"mask_{k}"][i])
    return f"picks and order at {listed(budgets)} of {n}, {len(x)} crop(s), {len(text)} segment(s) of text"
