"""DyCoke's merge over time."""

from __future__ import annotations

from pathlib import Path

from vtprune.evals.parity.clips import budgets, video
from vtprune.evals.parity.compare import ordered, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create


@case("video_dycoke_ttm")
def dycoke(arrays: Arrays, folder: Path) -> str:
    """Tokens in the official order, with the official slips about the last frames."""
    v, (t, _, _) = video(arrays)
    counts = []
    for tag in budgets(arrays):
        answer = create("dycoke", k=real(arrays[f"{tag}_k"]), faithful=True)(v)
        same(f"tokens of {tag}", ordered(answer), arrays[f"{tag}_src_index"])
        counts.append(len(answer.idx))
    return f"{t} frames, {'/'.join(map(str, counts))} of {v.n} tokens in order"
