"""AIM's merge before the language model, of clips and of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vtprune.evals.parity.clips import budgets, rounds_of, video
from vtprune.evals.parity.compare import Mismatch, agree, close, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("video_aim_merge")
def aim_merge(arrays: Arrays, folder: Path) -> str:
    """Which token each joins and the merged features; stored rows are looked up by their group."""
    v, (t, h, w) = video(arrays)
    worst, counts = [], []
    for tag in budgets(arrays):
        stored, tokens = torch.from_numpy(arrays[f"{tag}_group"]).long(), torch.from_numpy(arrays[f"{tag}_tokens"])
        answer = create("aim", rounds=rounds_of(arrays, tag))(v)
        agree(f"rounds of {tag}", len(arrays[f"{tag}_r_list"]), arrays[f"{tag}_rounds"])
        if len(answer.idx) != tokens.shape[0] * tokens.shape[1]:
            raise Mismatch(f"{tag}: {len(answer.idx)} tokens against {tokens.shape[:2].numel()} stored")
        assert answer.src is not None
        assert answer.dst is not None
        same(f"tokens that flow in {tag}", answer.src, np.arange(t * h * w))
        row = stored.flatten()[answer.idx] + answer.idx // (h * w) * tokens.shape[1]
        same(f"groups of {tag}", row[answer.dst], (stored + torch.arange(t)[:, None] * tokens.shape[1]).flatten())
        worst.append(close(f"features of {tag}", answer.apply(v.x), tokens.flatten(0, 1)[row]))
        counts.append(len(answer.idx))
    return f"{t} frames, groups at {'/'.join(map(str, counts))} of {v.n}; features within {max(worst):.1g}"


@case("video_aim_image")
def aim_image(arrays: Arrays, folder: Path) -> str:
    """An image merged by the likeness of keys; every merged token is one of the stored ones."""
    from vtprune.methods.video.aim import KEYS

    x, keys = torch.from_numpy(arrays["x"])[0], torch.from_numpy(arrays["key"])[0]
    worst, counts = [], []
    for tag in budgets(arrays):
        stored = torch.from_numpy(arrays[f"{tag}_tokens"])[0]
        method = create("aim", metric="keys", rounds=rounds_of(arrays, tag))
        ours = method(Visual(x, None, signals={KEYS: keys})).apply(x)
        agree(f"tokens of {tag}", len(ours), len(stored))
        nearest = torch.cdist(ours, stored).argmin(1)
        same(f"tokens of {tag}", nearest.sort().values, np.arange(len(stored)))
        worst.append(close(f"features of {tag}", ours, stored[nearest]))
        counts.append(len(stored))
    return f"{'/'.join(map(str, counts))} of {len(x)} tokens; features within {max(worst):.1g}"
