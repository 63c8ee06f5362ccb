"""The video cases of `evals.parity`: methods that look at frames, on the stored outputs of their official codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import create
from ..types import Assignment, Visual
from .parity import Arrays, Mismatch, agree, case, close, real, same


def video(arrays: Arrays, **fields: Any) -> tuple[Visual, tuple[int, int, int]]:
    """The stored features [T, P, D] as one unit without a budget, and its grid."""
    grid = tuple(int(n) for n in arrays["grid"])
    agree("grid", arrays["feat"].shape[:2], (grid[0], grid[1] * grid[2]))
    return Visual(torch.from_numpy(arrays["feat"]).flatten(0, 1), None, grid=grid, **fields), grid  # type: ignore


def budgets(arrays: Arrays) -> list[str]:
    """The prefixes of the budgets in a file: b0, b1, ..."""
    tags = sorted({name.split("_")[0] for name in arrays if name[0] == "b" and name[1:2].isdigit()})
    if not tags:
        raise Mismatch("the file holds no budget: no array is called b0_...")
    if "n_budgets" in arrays:
        agree("budgets", len(tags), arrays["n_budgets"])
    return tags


def ordered(answer: Assignment) -> Tensor:
    """Positions in the method's own order."""
    return answer.idx if answer.order is None else answer.order


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
    from ..methods.clips import likeness
    from ..methods.segments import cut, run_lengths, still_places
    from ..methods.video.holitom import RECEIVED

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


@case("video_aim_merge")
def aim_merge(arrays: Arrays, folder: Path) -> str:
    """Which token each joins and the merged features; stored rows are looked up by their group."""
    v, (t, h, w) = video(arrays)
    worst, counts = [], []
    for tag in budgets(arrays):
        stored, tokens = torch.from_numpy(arrays[f"{tag}_group"]).long(), torch.from_numpy(arrays[f"{tag}_tokens"])
        answer = create("aim", rounds=_rounds(arrays, tag))(v)
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


def _rounds(arrays: Arrays, tag: str) -> tuple[int, ...]:
    return tuple(arrays[f"{tag}_r_list"].tolist())


@case("video_aim_image")
def aim_image(arrays: Arrays, folder: Path) -> str:
    """An image merged by the likeness of keys; every merged token is one of the stored ones."""
    from ..methods.video.aim import KEYS

    x, keys = torch.from_numpy(arrays["x"])[0], torch.from_numpy(arrays["key"])[0]
    worst, counts = [], []
    for tag in budgets(arrays):
        stored = torch.from_numpy(arrays[f"{tag}_tokens"])[0]
        method = create("aim", metric="keys", rounds=_rounds(arrays, tag))
        ours = method(Visual(x, None, signals={KEYS: keys})).apply(x)
        agree(f"tokens of {tag}", len(ours), len(stored))
        nearest = torch.cdist(ours, stored).argmin(1)
        same(f"tokens of {tag}", nearest.sort().values, np.arange(len(stored)))
        worst.append(close(f"features of {tag}", ours, stored[nearest]))
        counts.append(len(stored))
    return f"{'/'.join(map(str, counts))} of {len(x)} tokens; features within {max(worst):.1g}"


@case("video_prunevid")
def prunevid(arrays: Arrays, folder: Path) -> str:
    """Scenes, and merged tokens; each of ours is one of the stored ones, which stand by their score."""
    from ..methods.video.prunevid import scenes

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


@case("video_fastvid")
def fastvid(arrays: Arrays, folder: Path) -> str:
    """Scenes, tokens and features of the variant that the file is of; "lv" with the newlines of rows that keep one."""
    from ..methods.clips import likeness
    from ..methods.scenes import cut_at
    from ..methods.video.fastvid import LOOKED_AT

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
            features = _with_newlines(features, at // w, torch.from_numpy(arrays["newline"]))
            at = at // w * (w + 1) + at % w
            at = torch.cat([at, (at // (w + 1)).unique() * (w + 1) + w]).sort().values
        total = start + t * h * (w + ends)
        whole = torch.cat([torch.arange(start), start + at, total + torch.arange(int(arrays["n_after"]))])
        same(f"tokens of {tag}", whole, arrays[f"{tag}_keep_positions"])
        worst.append(close(f"features of {tag}", features, arrays[f"{tag}_tokens"]))
        counts.append(len(answer.idx))
    return f"{variant}, {len(found)} scenes, {'/'.join(map(str, counts))} of {v.n} tokens; within {max(worst):.1g}"
