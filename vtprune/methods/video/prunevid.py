"""PruneVid: scenes by clustering frames, still places averaged over a scene, and what is left clustered in space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ...core.method import Method, Newlines, Positions
from ...core.visual import Assignment, Visual
from ...kernels import to_device
from ...registry import register_own as register
from .. import check_cosine, check_counts
from ..shared.clips import Clip, by_clip, check_ratio
from ..shared.density_peaks import cluster_weights, clusters
from ..shared.frames import flow, likeness, norms
from ..shared.scenes import refined
from ..shared.segments import Segment
from ..shared.still import Split

SMALL = 14  # sets that are not clustered


@register("prunevid", paper="https://arxiv.org/abs/2412.16117", seam="pre_llm")
@dataclass(frozen=True)
class PruneVid(Method):
    """Frames clustered around density peaks and cut into scenes; in each the places that stand still become one token.

    A place is still in a scene if the mean cosine similarity of its tokens over all pairs of frames is above tau. The
    still tokens of a scene, averaged over its frames, and the other tokens of each frame are clustered around density
    peaks of seven neighbours and merged by the plain mean; a merged token stands at its centre, in the first frame of
    the scene where it was still. These sets share the budget in proportion; beyond one token for each still place those
    still tokens stay for themselves that differ most from their mean. The official code renumbers position ids,
    positions="compact". This is the merging before the LLM; the selection at the LLM's tenth layer is another stage,
    such as Stage(10, create("fastv")). Two host transfers a video.

    ratio: without keep, int(ratio * size) tokens of each set of more than 14 stay, all of a smaller one.
    scenes: share of the frames that are centres of scenes, cut off to a count as officially, at least one.
    neighbours: that make a density.
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    official_positions: ClassVar[Positions] = "compact"
    ratio: float = 0.5
    tau: float = 0.8
    scenes: float = 0.25
    neighbours: int = 7

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_cosine("tau", self.tau)
        check_counts(neighbours=self.neighbours)
        if not 0.0 < self.scenes <= 1.0:
            raise ValueError(f"scenes={self.scenes}: use a share of the frames in (0, 1]")

    @property
    def adaptive(self) -> bool:
        return True

    def __call__(self, v: Visual) -> Assignment:
        return by_clip(v, self.name, self._reduce)

    def _reduce(self, clip: Clip, budget: int | None) -> Assignment:
        (t, p), device = clip.at.shape, clip.at.device
        found = scenes(clip.x.mean(1), max(1, int(t * self.scenes)), self.neighbours)
        split = _still(clip.x, found, self.tau)
        if budget is None:
            sizes, spare = [*(n for _, n in split.windows), *split.dynamic], 0
            given = [n if n <= SMALL else int(n * self.ratio) for n in sizes]
            still, moving = given[: len(split.windows)], given[len(split.windows) :]
        else:
            still, moving, spare = split.shares(budget)
        sets, real = clip.x, ~split.still
        if split.windows:
            means, places = split.means(clip.x)
            sets, real = torch.cat([means, sets]), torch.cat([places, real])
        counts = to_device(torch.tensor([*still, *moving]), device)
        centre, member = clusters(sets, real, counts, real.sum(1).clamp(1, self.neighbours), self.neighbours)
        w, g = cluster_weights(centre, member, real, None), len(split.windows)
        kept, used = centre[g:], real[g:] & centre[g:].any(1, keepdim=True)
        to, share = torch.arange(t, device=device)[:, None] * p + member[g:], w[g:]
        if g:
            unlike = 1 - likeness(clip.x, means[split.number]) if spare else share
            alone = split.stand_alone(unlike, spare)
            one = split.fold(centre[:g], member[:g], w[:g], alone)
            own = torch.arange(t * p, device=device).view(t, p)
            to, share = (
                torch.where(alone, own, torch.where(one.flows, one.to, to)),
                torch.where(one.flows, one.w, share),
            )
            share = share.masked_fill(alone, 1)
            kept, used = kept | one.kept | alone, used | one.flows | alone
        flowing = sum(n for n, m in zip(split.dynamic, moving) if m) + split.flowing(still)
        return flow(kept, used, to, share, None, sum(still) + sum(moving) + spare, flowing)


def scenes(frames: Tensor, count: int, neighbours: int = 7) -> list[Segment]:
    """Cut a video into runs of frames that belong together. frames: [T, D] float32."""
    all_ = torch.ones(1, len(frames), dtype=torch.bool, device=frames.device)
    one = torch.ones(1, dtype=torch.int64, device=frames.device)
    _, member = clusters(frames[None], all_, count * one, min(neighbours, len(frames)) * one, neighbours)
    return refined(member[0].tolist())


def _still(x: Tensor, found: Sequence[Segment], tau: float) -> Split:
    """The places of every scene that stand still, x [T, P, D]."""
    share = 1 / norms(x)
    ones = (share * vector_norm(x, dim=-1)).square()  # 0 for a row of zeros
    masks = []
    for a, b in found:
        n, scene = b - a + 1, slice(a, b + 1)
        total = torch.einsum("tp,tpd->pd", share[scene], x[scene])  # of rows of length one
        pairs = vector_norm(total, dim=-1).square() - ones[scene].sum(0)  # over ordered pairs of different frames
        masks.append(pairs / max(1, n * (n - 1)) > (tau if n > 1 else torch.inf))
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    still = torch.stack([mask for mask, (a, b) in zip(masks, found) for _ in range(a, b + 1)])
    return Split.of(found, counts, still)
