"""DivPrune: greedy max-min diversity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vtprune.evals.parity.compare import Mismatch, agree, grid_of, listed, ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("divprune_")
def divprune(arrays: Arrays, folder: Path) -> str:
    """Picks in order.

    The official code does not mask picked tokens, so repeated rows can come out twice: from the first repeat on, the
    rule is only that our picks are distinct; with repeated rows that is also checked with nothing dropped.
    """
    x = torch.from_numpy(arrays["features"])
    method = create("divprune")
    budgets = arrays["budgets"].tolist()
    cut = 0
    if arrays["grid"].any() if "grid" in arrays else False:
        grid_of(arrays, x.shape[0])
    if "ratios" in arrays:
        agree("budgets", [round(real(share) * x.shape[0]) for share in arrays["ratios"]], budgets)
    if "duplicate_rows" in arrays:
        agree("different rows", len(x[arrays["duplicate_rows"]].unique(dim=0)), 1)
    for k in budgets:
        ours = ordered(method(Visual(x, k)))
        official = arrays[f"order_{k}"]
        distinct = _before_repeat(official)
        same(f"order at {k}", ours[:distinct], official[:distinct])
        if len(set(ours.tolist())) != k:
            raise Mismatch(f"order at {k}: {len(set(ours.tolist()))} distinct tokens")
        if distinct == k:
            same(f"kept at {k}", ours.sort().values, arrays[f"kept_{k}"])
        cut += distinct < k
    rule = f"; {cut} compared up to the first repeated official pick" if cut else ""
    if "duplicate_rows" in arrays:
        if len(set(ordered(method(Visual(x, x.shape[0]))).tolist())) != x.shape[0]:
            raise Mismatch(f"a token is picked twice when all {x.shape[0]} are asked for")
        rule += f"; all {x.shape[0]} distinct despite {len(arrays['duplicate_rows'])} equal rows"
    return f"picks and order at {listed(budgets)} of {x.shape[0]}{rule}"


def _before_repeat(picks: np.ndarray) -> int:
    """Length of the longest start of `picks` without a repeated index."""
    repeats = np.setdiff1d(np.arange(len(picks)), np.unique(picks, return_index=True)[1])
    return int(repeats[0]) if len(repeats) else len(picks)
