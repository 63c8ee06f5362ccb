"""PruMerge and PruMerge+: centres, those spaced evenly, and merged features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtprune.evals.parity.compare import Mismatch, close, listed, ordered, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_prumerge_")
def prumerge(arrays: Arrays, folder: Path) -> str:
    """Centres in official order and all features, the counts adaptive or by a fixed ratio."""
    q, k, x = (torch.from_numpy(arrays[name])[0] for name in ("q", "k", "hidden"))
    row = (q[0] @ k.T / q.shape[1] ** 0.5).softmax(0)[1:]
    worst, counts, tags = [], [], [name.removeprefix("index_") for name in arrays if name.startswith("index_")]
    for tag in tags:
        variant, rule = tag.split("_", 1)
        if rule != "adaptive" and not (variant == "base" and rule[1:].isdigit()):
            raise Mismatch(f"index_{tag}: no such rule of counts")
        # The official token of the rest comes on top of a fixed share, ours counts.
        budget = None if rule == "adaptive" else int((len(x) - 1) * (1 / int(rule[1:]))) + 1
        nearest = int(arrays["cluster_k"])
        method: Any = create("prumerge", variant=variant, nearest=nearest, order="official", fallback="error")
        answer = method(Visual(x[1:], budget, signals=dict(zip(method.needs, (row, k[1:])))))
        same(f"centres of {tag}", ordered(answer)[:-1], arrays[f"index_{tag}"][0])
        worst.append(close(f"features of {tag}", answer.apply(x[1:]), arrays[f"features_{tag}"][0]))
        counts.append(len(answer.idx))
    return f"{', '.join(tags)}: {listed(counts)} of {len(x) - 1} tokens; features within {max(worst):.1g}"
