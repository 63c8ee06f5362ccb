"""The video cases of `evals.parity`: methods that look at frames, on the stored outputs of their official codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import create
from ..types import Assignment, Visual
from .parity import Arrays, Mismatch, case, close, same


def video(arrays: Arrays, **fields: Any) -> tuple[Visual, tuple[int, int, int]]:
    """The stored features [T, P, D] as one unit without a budget, and its grid."""
    grid = tuple(int(n) for n in arrays["grid"])
    return Visual(torch.from_numpy(arrays["feat"]).flatten(0, 1), None, grid=grid, **fields), grid  # type: ignore


def budgets(arrays: Arrays) -> list[str]:
    """The prefixes of the budgets in a file: b0, b1, ..."""
    return sorted({name.split("_")[0] for name in arrays if name[0] == "b" and name[1:2].isdigit()})


def real(value: Any) -> float:
    """A stored float32 as the Python float that was meant."""
    return round(float(value), 6)


def ordered(answer: Assignment) -> Tensor:
    """Positions in the method's own order."""
    return answer.idx if answer.order is None else answer.order


@case("video_vidcom2")
def vidcom2(arrays: Arrays, folder: Path) -> str:
    """Scores, tokens per frame and tokens; where newlines end the rows, they are told apart by their column."""
    v, (t, h, w) = video(arrays)
    counts, worst, ends = [], [], str(arrays["model"]) == "llava_vid"
    for tag in budgets(arrays):
        answer = create("vidcom2", ratio=real(arrays[f"{tag}_R"]))(v)
        per_frame = torch.bincount(answer.idx // (h * w), minlength=t)
        same(f"tokens per frame of {tag}", per_frame, arrays[f"{tag}_k_per_frame"])
        kept = arrays[f"{tag}_out_index"]
        if ends:  # stored as places in a grid with one more column
            kept = kept[kept % (w + 1) < w]
            kept = kept // (w + 1) * w + kept % (w + 1)
        same(f"tokens of {tag}", answer.idx, kept)
        assert answer.scores is not None
        worst.append(close("scores", -answer.scores.view(t, h * w), arrays["score"]))
        counts.append(len(answer.idx))
        exact = create("vidcom2")(Visual(v.x, len(answer.idx), grid=v.grid))
        if len(exact.idx) != len(answer.idx):
            raise Mismatch(f"{tag}: {len(exact.idx)} tokens for a budget of {len(answer.idx)}")
    beside = ", newlines aside" if ends else ""
    return f"{t} frames, {'/'.join(map(str, counts))} of {v.n} tokens{beside}; scores within {max(worst):.1g}"


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


@case("video_holitom_outer")
def holitom(arrays: Arrays, folder: Path) -> str:
    """Segments, places and features of every token; in grid files with the newlines of rows that keep one."""
    from ..methods.segments import cut, run_lengths, still_places
    from ..methods.video.holitom import RECEIVED

    seen = torch.from_numpy(arrays["attn"]).flatten()
    v, (t, _, w) = video(arrays, signals={RECEIVED: seen})
    worst, counts = [], []
    for tag in budgets(arrays):
        tau, beta = real(arrays[f"{tag}_tau"]), None if arrays[f"{tag}_no_beta"] else real(arrays["beta"])
        found = cut(still_places(run_lengths(torch.from_numpy(arrays["sim"]) > tau)))
        same(f"segments of {tag}", torch.tensor(found), arrays[f"{tag}_segments"])
        answer = create("holitom", ratio=real(arrays[f"{tag}_retain_ratio"]), tau=tau, beta=beta)(v)
        stored = arrays[f"{tag}_src_index"]
        same(f"tokens of {tag}", answer.idx, np.sort(stored))
        features = answer.apply(v.x)
        if str(arrays["newline_mode"]) == "grid":
            whole = _with_newlines(features, answer.idx // w, torch.from_numpy(arrays["newline"]))
        else:
            order = torch.searchsorted(answer.idx, torch.from_numpy(stored).long())
            whole = torch.cat([features[order], torch.from_numpy(arrays["newline"])[None]])
        worst.append(close(f"features of {tag}", whole, arrays[f"{tag}_tokens"]))
        counts.append(len(answer.idx))
    return f"{t} frames, {'/'.join(map(str, counts))} of {v.n} tokens; features within {max(worst):.1g}"


def _with_newlines(x: Tensor, row: Tensor, newline: Tensor) -> Tensor:
    """Tokens x [K, D] with one newline [D] behind the last of every row [K] that has any."""
    ends = torch.cat([row[1:] != row[:-1], torch.ones(1, dtype=torch.bool)])
    return torch.cat([torch.stack([token, newline]) if end else token[None] for token, end in zip(x, ends)])


case("video_holitom_edge")(holitom)
