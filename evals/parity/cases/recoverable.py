"""Recoverable compression, as its official code does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vtprune.evals.parity.compare import close, grid_of, ordered, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Signal, Visual


@case("recoverable_")
def recoverable(arrays: Arrays, folder: Path) -> str:
    """The adaptive rule with all official quirks, fed with the stored text similarities; features in official order."""
    q, k = (torch.from_numpy(arrays[name])[0] for name in ("q_proj_out", "k_proj_out"))
    x, text = torch.from_numpy(arrays["hidden"])[0, 1:], torch.from_numpy(arrays["text_similarity"]).flatten()
    row = (q[0] @ k.T / q.shape[1] ** 0.5).softmax(0)[1:]
    grid_of(arrays, len(x))
    method = create(
        "recoverable",
        faithful=True,
        text_similarity=lambda _: text,
        text_weight=float(arrays["text_weight"]),
        neighbours=tuple(arrays["lof_neighbors"].tolist()),
        nearest=int(arrays["knn_k"]),
    )
    answer = method(Visual(x, None, signals={Signal("cls_full", -1): row, Signal("keys", -1): k[1:]}))
    order, main, centres = ordered(answer), arrays["kept_main"], arrays["center_local_idx"]
    rest = np.setdiff1d(np.arange(len(x)), main)
    same("main tokens", order[: len(main)], main)
    same("merge centres", order[len(main) : len(main) + len(centres)], rest[centres])
    worst = close("features", answer.apply(x)[torch.searchsorted(answer.idx, order)], arrays["features"][0])
    return f"{len(main)} main tokens, {len(centres)} centres and one of the rest; features within {worst:.1g}"
