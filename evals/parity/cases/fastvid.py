"""FastVID: scenes, and the tokens of each, in its three variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtprune.evals.parity.clips import budgets, video, with_newlines
from vtprune.evals.parity.compare import close, real, same
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create


@case("video_fastvid")
def fastvid(arrays: Arrays, folder: Path) -> str:
    """Scenes, tokens and features of the variant that the file is of; "lv" with the newlines of rows that keep one."""
    from vtprune.methods.shared.frames import likeness
    from vtprune.methods.shared.scenes import cut_at
    from vtprune.methods.video.fastvid import LOOKED_AT

    v, (t, h, w) = video(arrays, signals={LOOKED_AT: torch.from_numpy(arrays["attn"]).flatten()})
    ends = "newline" in arrays
    variant = "qwen" if "dyseg_ignore" in arrays else "lv" if ends else "ov"
    stored = torch.from_numpy(arrays["frame_global"]) if "frame_global" in arrays else None
    frames = v.x.view(t, h * w, -1).mean(1) if stored is None else stored
    similar = likeness(frames[1:], frames[:-1])
    worst = [close("similarity of frames", similar, arrays["frame_sim"])]
    found = cut_at(similar.tolist(), real(arrays["dyseg_tau"]), int(arrays["c"]))
    same("scenes", torch.tensor([b - a + 1 for a, b in found]), arrays["segment_sizes"])
    start, counts = int(arrays["start"]), []
    options: dict[str, Any] = {"context": real(arrays["d"]), "beta": real(arrays["beta"])}
    options |= {"tau": real(arrays["dyseg_tau"]), "frames": None if stored is None else lambda x: stored}
    options |= {name: int(arrays[key]) for name, key in (("scenes", "c"), ("period", "p"), ("neighbours", "knn"))}
    if variant == "qwen":
        options["alike"] = real(arrays["dyseg_ignore"])
    for tag in budgets(arrays):
        answer = create("fastvid", variant=variant, ratio=real(arrays[f"{tag}_retention_ratio"]), **options)(v)
        features, at = answer.apply(v.x), answer.idx
        if ends:
            features = with_newlines(features, at // w, torch.from_numpy(arrays["newline"]))
            at = at // w * (w + 1) + at % w
            at = torch.cat([at, (at // (w + 1)).unique() * (w + 1) + w]).sort().values
        total = start + t * h * (w + ends)
        whole = torch.cat([torch.arange(start), start + at, total + torch.arange(int(arrays["n_after"]))])
        same(f"tokens of {tag}", whole, arrays[f"{tag}_keep_positions"])
        worst.append(close(f"features of {tag}", features, arrays[f"{tag}_tokens"]))
        counts.append(len(answer.idx))
    return f"{variant}, {len(found)} scenes, {'/'.join(map(str, counts))} of {v.n} tokens; within {max(worst):.1g}"
