"""VidCom2: tokens per frame by how much a frame differs."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.clips import budgets, video
from vtprune.evals.parity.compare import Mismatch, agree, close, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual

MODELS = ("llava_ov", "llava_vid", "qwen2_5_vl")


@case("video_vidcom2")
def vidcom2(arrays: Arrays, folder: Path) -> str:
    """Scores, tokens per frame and tokens; where newlines end the rows, they are told apart by their column."""
    v, (t, h, w) = video(arrays)
    model = str(arrays["model"])
    if model not in MODELS:
        raise Mismatch(f"model {model!r}: the official code knows {', '.join(MODELS)}")
    counts, worst, ends = [], [], model == "llava_vid"
    for tag in budgets(arrays):
        answer = create("vidcom2", ratio=real(arrays[f"{tag}_R"]))(v)
        per_frame = torch.bincount(answer.idx // (h * w), minlength=t)
        same(f"tokens per frame of {tag}", per_frame, arrays[f"{tag}_k_per_frame"])
        kept = arrays[f"{tag}_out_index"]
        if ends:  # stored as places in a grid with one more column
            agree(f"newlines of {tag}", int((kept % (w + 1) == w).sum()), t * h)
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
