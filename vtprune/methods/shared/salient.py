"""Salient tokens of each frame: those that are looked at, as unlike each other as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...kernels import farthest_point, to_device
from .frames import ranks_in_rows
from .segments import Segment

Salient = Literal["attn_div", "attn_div_v2", "div", "attn"]


def salient_places(
    x: Tensor, frames: Tensor, seen: Tensor, found: Sequence[Segment], counts: Sequence[int], rule: Salient
) -> Tensor:
    """[T, P] bool: counts[i] tokens of frame i.

    x: [T, P, D] float32; frames: [T, D] their means; seen: [T, P] attention received. rule: "attn" takes the most
    looked at. The others pick greedily by max-min distance, (1 - cosine) times the weight of the later token: "div" 1,
    "attn_div" the attention it receives, "attn_div_v2" that times the mean product of its features with the mean of
    each frame of its segment. A token of negative weight comes last, and none is picked twice.
    """
    if rule == "attn":
        return ranks_in_rows(seen) < to_device(torch.tensor(counts), seen.device)[:, None]
    weights = torch.ones_like(seen) if rule == "div" else seen
    if rule == "attn_div_v2":
        means = torch.cat([frames[a : b + 1].mean(0, keepdim=True).expand(b - a + 1, -1) for a, b in found])
        weights = weights * (x * means[:, None]).sum(-1)
    some = [i for i, count in enumerate(counts) if count]
    picks = farthest_point([x[i] for i in some], [counts[i] for i in some], weights=[weights[i] for i in some])
    picked = torch.zeros_like(seen, dtype=torch.bool)
    for i, pick in zip(some, picks):
        picked[i].index_fill_(0, pick, True)
    return picked
