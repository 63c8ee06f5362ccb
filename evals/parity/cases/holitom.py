"""HoliTom's segments and its merge before the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vtprune.evals.parity.clips import budgets, video, with_newlines
from vtprune.evals.parity.compare import Mismatch, agree, close, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create


@case("video_holitom_outer")
def holitom(arrays: Arrays, folder: Path) -> str:
    """Segments, places and features of every token; in grid files with the newlines of rows that keep one."""
    from vtprune.methods.shared.frames import likeness
    from vtprune.methods.shared.segments import cut, run_lengths, still_places
    from vtprune.methods.video.holitom import RECEIVED

    seen = torch.from_numpy(arrays["attn"]).flatten()
    v, (t, h, w) = video(arrays, signals={RECEIVED: seen})
    frames, counts, mode = v.x.view(t, h * w, -1), [], str(arrays["newline_mode"])
    worst = [close("similarity of frames", likeness(frames[1:], frames[:-1]), arrays["sim"])]
    if mode not in ("grid", "one_token"):
        raise Mismatch(f"newline_mode {mode!r}: the official code works with 'grid' and 'one_token'")
    options: dict[str, Any] = {"neighbours": int(arrays["K"])}
    for tag in budgets(arrays):
        tau, beta = real(arrays[f"{tag}_tau"]), None if arrays[f"{tag}_no_beta"] else real(arrays["beta"])
        still, ratio = still_places(run_lengths(torch.from_numpy(arrays["sim"]) > tau)), arrays[f"{tag}_retain_ratio"]
        found = cut(still)
        same(f"segments of {tag}", torch.tensor(found), arrays[f"{tag}_segments"])
        windows = [(int(still[a, b - a]), b - a) for a, b in found if b > a]
        saved = sum(places * width for places, width in windows)
        agree(f"still places of {tag}", [places for places, _ in windows], arrays[f"{tag}_n_static"])
        agree(f"tokens saved by {tag}", saved, arrays[f"{tag}_total_reduced"])
        adjusted = torch.tensor(min(1.0, real(ratio) / ((v.n - saved) / v.n)))
        worst.append(close("adjusted ratio", adjusted, arrays[f"{tag}_adj_ratio"]))
        answer = create("holitom", ratio=real(ratio), tau=tau, beta=beta, **options)(v)
        stored = arrays[f"{tag}_src_index"]
        same(f"tokens of {tag}", answer.idx, np.sort(stored))
        features = answer.apply(v.x)
        if mode == "grid":
            whole = with_newlines(features, answer.idx // w, torch.from_numpy(arrays["newline"]))
        else:
            order = torch.searchsorted(answer.idx, torch.from_numpy(stored).long())
            whole = torch.cat([features[order], torch.from_numpy(arrays["newline"])[None]])
        worst.append(close(f"features of {tag}", whole, arrays[f"{tag}_tokens"]))
        counts.append(len(answer.idx))
    return f"{t} frames, {'/'.join(map(str, counts))} of {v.n} tokens; features within {max(worst):.1g}"


case("video_holitom_edge")(holitom)
