"""PruneVid: scenes, and what is merged in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vtprune.evals.parity.clips import budgets, video
from vtprune.evals.parity.compare import Mismatch, close, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create


@case("video_prunevid")
def prunevid(arrays: Arrays, folder: Path) -> str:
    """Scenes, and merged tokens; each of ours is one of the stored ones, which stand by their score."""
    from vtprune.methods.video.prunevid import scenes

    v, (t, h, w) = video(arrays)
    share, k = real(arrays["temporal_segment_ratio"]), int(arrays["k"])
    found = scenes(v.x.view(t, h * w, -1).mean(1), int(t * share), k)
    same("scenes", torch.tensor([b - a + 1 for a, b in found]), arrays["segment_lengths"])
    cuts = np.flatnonzero(np.diff(arrays["frame_labels_refined"])) + 1
    same("cuts", torch.tensor([a for a, _ in found[1:]]), cuts)
    worst, counts = [], []
    for tag in budgets(arrays):
        options = {"tau": real(arrays["tau"]), "scenes": share, "neighbours": k}
        method = create("prunevid", ratio=real(arrays[f"{tag}_cluster_ratio"]), **options)
        ours, stored = method(v).apply(v.x), torch.from_numpy(arrays[f"{tag}_tokens"])
        if len(ours) != len(stored):
            raise Mismatch(f"{tag}: {len(ours)} tokens against {len(stored)} stored")
        nearest = torch.cdist(ours, stored).argmin(1)
        same(f"tokens of {tag}", nearest.sort().values, np.arange(len(stored)))
        worst.append(close(f"features of {tag}", ours, stored[nearest]))
        counts.append(len(stored))
    return f"{len(found)} scenes, {'/'.join(map(str, counts))} of {v.n} tokens; features within {max(worst):.1g}"
