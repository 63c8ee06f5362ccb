"""DiffRate: its merge, and a stock timm model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vtprune import patch
from vtprune.evals.parity.compare import Mismatch, close, same, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.stock_vit import stock_timm
from vtprune.methods.in_vit import diffrate


@case("diffrate_merge_")
def diffrate_merge(arrays: Arrays, folder: Path) -> str:
    """Sources of a sorted sequence into its first rows."""
    x, size, kept = tensor(arrays, "x"), tensor(arrays, "size"), int(arrays["kept"])
    places = torch.arange(x.shape[1]).expand(len(x), -1)
    step = diffrate.merge_into(x, size, places[:, :kept], places[:, kept:], int(arrays["class_token"]))
    assert step.dst is not None
    same("destinations", step.dst, arrays["dst_idx"])
    sizes = step.resize(size)
    assert sizes is not None
    worst = close("features", step.apply(x), arrays["x_merged"]), close("sizes", sizes, arrays["size_merged"])
    return f"destinations; features and sizes within {max(worst):.1g}"


@case("diffrate_e2e_")
@torch.no_grad()
def diffrate_e2e(arrays: Arrays, folder: Path) -> str:
    """A stock timm model, patched; ours keeps raster order, so slots are compared as groups of tokens."""
    model, image = stock_timm(arrays), tensor(arrays, "img")
    n = model.patch_embed.num_patches + 1
    lists = {name: arrays[f"{name}_kept"].tolist() for name in ("prune", "merge")}
    worst = [close("unpatched", model(image), arrays["logits_unpatched"])]
    with patch(model, "diffrate", tokens=n, **lists) as handle:
        logits = model(image)
    last = handle.last
    same("tokens", torch.tensor(last.lengths), arrays["ntok"])
    stays, stored = last.slots >= 0, arrays["merged_any"].astype(bool)
    same("tokens that live on", stays, stored)
    for row, (ours, theirs) in enumerate(zip(last.slots, tensor(arrays, "assign").long())):
        _groups(f"row {row}", ours[stays[row]], theirs[stays[row]])
        sizes = last.size[row][ours[stays[row]]], arrays["size"][row][theirs[stays[row]]]
        worst.append(close("sizes", *sizes))
    worst.append(close("logits", logits, arrays["logits"]))
    return f"tokens and groups; sizes and logits within {max(worst):.1g}"


def _groups(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Two labellings that put the same tokens together."""
    pairs = {(a, b) for a, b in zip(ours.tolist(), theirs.tolist())}
    if not len(pairs) == len(set(ours.tolist())) == len(set(theirs.tolist())):
        raise Mismatch(f"{what}: tokens are grouped differently")
