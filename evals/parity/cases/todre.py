"""ToDRE: the pivot and the diverse tokens around it."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import listed, ordered, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Signal, Span, Visual


@case("todre_spec_")
def todre(arrays: Arrays, folder: Path) -> str:
    """Pivot and picks in order, both objectives; the pivot is looked for among the thumbnail's tokens."""
    x = torch.from_numpy(arrays["features"])
    n, thumbnail = x.shape[0], int(arrays["thumbnail_tokens"])
    parts = [(0, thumbnail), (thumbnail, n)] if thumbnail < n else [(0, n)]
    spans = tuple(Span(start, (1, 1, stop - start)) for start, stop in parts)
    signals = {Signal("cls", -1): torch.from_numpy(arrays["cls_attention"])}
    for objective in ("maxsum", "kcenter"):
        method = create("todre", objective=objective)
        for k in arrays["budgets"].tolist():
            answer = method(Visual(x, k, spans=spans, signals=signals))
            same(f"{objective} pivot", ordered(answer)[:1], arrays["pivot"].reshape(1))
            same(f"{objective} order at {k}", ordered(answer), arrays[f"order_{objective}_k{k}"])
            same(f"{objective} kept at {k}", answer.idx, arrays[f"keep_{objective}_k{k}"])
    return f"pivot, picks and order at {listed(arrays['budgets'].tolist())} of {n}, maxsum and kcenter"
