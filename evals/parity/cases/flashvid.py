"""FlashVID: the picks of its salient tokens, its segments, and the merged tokens of whole clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vtprune.evals.parity.clips import budgets, video
from vtprune.evals.parity.compare import TOLERANCE, Mismatch, listed, real, same, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual

NAMES = {"v1": "attn_div", "v2": "attn_div_v2", "div": "div", "attn": "attn"}  # as the files call the picks


@case("leaders_flashvid")
def flashvid(arrays: Arrays, folder: Path) -> str:
    """Segments, places and features of every token, merged as officially; a place that is given twice moves here."""
    from vtprune.methods.shared.frames import likeness
    from vtprune.methods.shared.scenes import cut_at
    from vtprune.methods.video.flashvid import RECEIVED

    v, (t, h, w) = video(arrays, signals={RECEIVED: tensor(arrays, "attn").flatten()})
    frames, counts, worst, moved = v.x.view(t, h * w, -1).mean(1), [], [], 0
    for tag in budgets(arrays):
        threshold, least = real(arrays[f"{tag}_segment_threshold"]), int(arrays[f"{tag}_min_segment_num"])
        if arrays[f"{tag}_do_segment"]:
            found = cut_at(likeness(frames[1:], frames[:-1]).tolist(), threshold, least)
            same(f"segments of {tag}", torch.tensor([b - a + 1 for a, b in found]), arrays[f"{tag}_segments"])
        method = create(
            "flashvid",
            ratio=real(arrays[f"{tag}_retention_ratio"]),
            expansion=real(arrays[f"{tag}_expansion"]),
            alpha=real(arrays[f"{tag}_alpha"]),
            tau=real(arrays[f"{tag}_temporal_threshold"]),
            threshold=threshold,
            segments=least if arrays[f"{tag}_do_segment"] else None,
            salient=str(arrays[f"{tag}_token_selection_method"]),
            counts="direct",
            single="whole",
        )
        answer = method(v)
        difference, twice = _alike(tag, answer.idx, answer.apply(v.x), arrays[f"{tag}_index"], arrays[f"{tag}_tokens"])
        worst.append(difference)
        counts.append(len(answer.idx))
        moved += twice
    return f"{listed(counts)} of {v.n} tokens, {moved} at places given twice; features within {max(worst):.1g}"


def _alike(tag: str, idx: Tensor, features: Tensor, stored_idx: np.ndarray, stored: np.ndarray) -> tuple[float, int]:
    """Largest difference of the features, and how many stored tokens share a place with another one.

    Where the official code gives a place twice, ours gives one of the two tokens another place.
    """
    if len(idx) != len(stored_idx):
        raise Mismatch(f"tokens of {tag}: {len(idx)} against {len(stored_idx)} stored")
    ours, worst, left = dict(zip(idx.tolist(), features)), [0.0], []
    for place, row in sorted(zip(stored_idx.tolist(), torch.from_numpy(stored)), key=lambda pair: pair[0]):
        apart = float((ours[place] - row).abs().max()) if place in ours else np.inf
        if apart <= TOLERANCE:
            worst.append(apart)
            del ours[place]
        else:
            left.append((place, row))
    shared = sorted(place for place in set(stored_idx.tolist()) if (stored_idx == place).sum() > 1)
    if not {place for place, _ in left} <= set(shared):
        raise Mismatch(f"tokens of {tag}: {sorted({place for place, _ in left} - set(shared))} differ")
    for place, row in left:
        apart, at = min(((float((x - row).abs().max()), i) for i, x in ours.items()), default=(np.inf, 0))
        if apart > TOLERANCE:
            raise Mismatch(f"tokens of {tag}: the second token at {place} is missing")
        worst.append(apart)
        del ours[at]
    return max(worst), len(left)


@case("leaders_flashvid_adts")
def flashvid_adts(arrays: Arrays, folder: Path) -> str:
    """The salient tokens of every frame by each rule, the clip being one segment."""
    from vtprune.methods.video.flashvid import RECEIVED

    x, seen = tensor(arrays, "feat"), tensor(arrays, "attn")
    (t, p), sizes = seen.shape, arrays["budgets"].tolist()
    grid = tuple(int(n) for n in arrays["grid"])
    for k in sizes:
        for name, rule in NAMES.items():
            method = create("flashvid", salient=rule, alpha=1.0, segments=None)
            unit = Visual(x.flatten(0, 1), k * t, grid=grid, signals={RECEIVED: seen.flatten()})  # type: ignore
            places = method(unit).idx.view(t, k) - torch.arange(t)[:, None] * p
            same(f"{name} at {k}", places, arrays[f"{name}_{k}"])
    return f"{t} frames of {p}, {listed(sizes)} tokens each, by {', '.join(NAMES)}"
