"""A schedule for `diffrate` without labels or gradients: where features of a few images suffer least from fewer tokens.

DiffRate's published counts come from a gradient search with labels. This one tries, for every block alone, to prune or
to merge a few shares of the patches, looks how far the model's features turn, and then spends a token budget step by
step where a step costs least per work saved. Distortions of several blocks are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtprune
from vtprune.methods.in_vit.diffrate import DiffRate
from vtprune.model_adapters.vit_blocks import vit_of
from vtprune.types import Stage, UnsupportedModel

SHARES = (0.0625, 0.125, 0.25)


@dataclass(frozen=True)
class Found:
    """method: `diffrate` with the counts found. cost: estimated work against dense. distortion: estimated, 1 - cos.

    measured: the distortion of the whole schedule on the same images.
    """

    method: DiffRate
    cost: float
    distortion: float
    measured: float


@torch.inference_mode()
def search(
    model: Any,
    images: Tensor,
    work: float,
    features: Callable[[Any, Tensor], Tensor] = lambda model, x: model(x),
    shares: Sequence[float] = SHARES,
) -> Found:
    """Counts for `diffrate` that leave at most `work` (0..1) of what a model's blocks do, from unlabelled images.

    images: [B, 3, H, W]. features: (model, images) -> [B, D], what must not turn. A block's work is taken to be
    proportional to its tokens, a third of it (attention) to those that enter and two thirds (MLP) to those that stay.
    Runs the model 2 * depth * len(shares) + 3 times. Raises ValueError for work outside (0, 1) or out of reach,
    UnsupportedModel for no ViT.
    """
    if not 0 < work < 1:
        raise ValueError(f"work={work}: the share of a dense model's work to leave, between 0 and 1")
    vit = vit_of(model)
    if vit is None:
        raise UnsupportedModel(f"{type(model).__name__} is no vision transformer alone; a schedule is searched for one")
    depth = len(vit.blocks)
    dense = features(model, images)
    with vtprune.patch(model, "topk_cls", keep=1.0) as handle:
        features(model, images)
        n = handle.last.n - vit.prefix

    def turned(stages: Sequence[Stage]) -> float:
        with vtprune.patch(model, stages):
            return float((1 - torch.cosine_similarity(features(model, images), dense, dim=-1)).mean())

    # [block][0 = prune, 1 = merge]: distortion at 0 and at every share; nothing is gained by dropping more.
    curves = []
    for k in range(depth):
        kinds = []
        for pruned in (1.0, 0.0):
            method = DiffRate(pruned=pruned)
            points = [turned([Stage(("vit", k), method, keep=max(1, n - round(s * n)))]) for s in shares]
            kinds.append([0.0, *(max(points[: i + 1]) for i in range(len(points)))])
        curves.append(kinds)
    steps = _spend(curves, [0.0, *shares], depth, work)
    left = 1.0
    prune: list[int] = []
    merge: list[int] = []
    for k in range(depth):
        for kind, counts in enumerate((prune, merge)):
            left -= [0.0, *shares][steps[k][kind]]
            counts.append(1 + max(1, round(left * n)))
    method = DiffRate(prune=prune, merge=merge, tokens=n + 1)
    total = sum(curves[k][kind][steps[k][kind]] for k in range(depth) for kind in (0, 1))
    return Found(method, _work(steps, [0.0, *shares]), total, turned([Stage(("vit", slice(None)), method)]))


def _work(steps: Sequence[Sequence[int]], shares: Sequence[float]) -> float:
    """Work of the blocks against dense, of the levels taken in each: a third before, two thirds after they go."""
    left, total = 1.0, 0.0
    for levels in steps:
        after = left - sum(shares[level] for level in levels)
        total += (left + 2 * after) / 3
        left = after
    return total / len(steps)


def _spend(curves: Any, shares: Sequence[float], depth: int, work: float) -> list[list[int]]:
    """Levels [block][kind]: the step of least distortion per work saved after another, until little enough is left."""
    steps = [[0, 0] for _ in range(depth)]
    while _work(steps, shares) > work:
        best = None
        gone = sum(shares[level] for levels in steps for level in levels)
        for k in range(depth):
            for kind in (0, 1):
                level = steps[k][kind]
                if level + 1 == len(shares) or gone + shares[level + 1] - shares[level] > 0.95:
                    continue
                saved = (shares[level + 1] - shares[level]) * (depth - k - 1 / 3)
                price = (curves[k][kind][level + 1] - curves[k][kind][level]) / saved
                if best is None or price < best[0]:
                    best = price, k, kind
        if best is None:
            raise ValueError(f"work={work} cannot be reached with shares of at most {shares[-1]} a block: allow larger")
        steps[best[1]][best[2]] += 1
    return steps
