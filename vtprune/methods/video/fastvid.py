"""FastVID: scenes by frame similarity; in each, what is looked at stays and a few frames merge the rest around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.method import Method, Newlines
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite, to_device
from ...registry import register_own as register
from .. import check_choices, check_cosine, check_counts, check_parts, signal_of
from ..shared.clips import Clip, by_clip, check_ratio
from ..shared.density_peaks import centres
from ..shared.frames import likeness, norms, places, ranks_in_rows
from ..shared.scenes import Plan, Variant, cut_at, filled, shared_out
from ..shared.segments import Segment

LOOKED_AT = Signal("mean_query", None)


@register("fastvid", paper="https://arxiv.org/abs/2503.11187", seam="pre_llm")
@dataclass(frozen=True)
class FastVID(Method):
    """Salient tokens by attention, and in every fourth frame of a scene, counted from its last, centres that merge.

    1. A scene ends at each of the seven lowest cosines of neighbouring frames, and wherever one is below tau.
    2. In every frame the salient tokens stay, those that are looked at most.
    3. Every fourth frame of a scene, counted from its last, has centres: the density peaks among its other tokens.
    4. Each token of the scene that is neither salient nor one of these centres joins the one it is most like, for every
       such frame by itself. With w = max(1 / (q + 1), beta) for the q that join, a merged token is
       w * centre + (1 - w) * mean of the q, and stands at its centre.

    Positions are kept. The host waits for the device once a video.

    The official code reads attention and frames from SigLIP's pooling head, which LLaVA checkpoints do not have, and on
    Qwen from the mean query of a frame. Here it is always the mean query of the tower's last layer and, for a frame,
    the mean of its tokens. With a budget, what the official shares leave or cannot place goes to salient tokens.

    variant: the three official codes differ in how tokens are shared out, and whether a centre is averaged with itself:
        "ov" (LLaVA-OneVision: it is; the same share in every frame), "lv" (LLaVA-Video: by scene), "qwen" (by scene,
        and only the last of a run of frames alike gets any).
    ratio: without keep, the share of tokens; shares are cut off as officially. context: the share of merged ones.
    tau: None: 0.9, with "qwen" 0.84. frames: [T, P, D] -> [T, G], what frames are compared by.
    scenes: found at least. period: every which frame of a scene merges. neighbours: that make a density. alike: cosine
        of neighbouring frames from which on they share tokens ("qwen").
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    variant: Variant = "ov"
    ratio: float = 0.1
    context: float = 0.4
    beta: float = 0.6
    tau: float | None = None
    frames: Callable[[Tensor], Tensor] | None = None
    scenes: int = 8
    period: int = 4
    neighbours: int = 4
    alike: float = 0.95

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_choices(self, variant=Variant)
        check_parts(context=self.context, beta=self.beta)
        if self.tau is not None and not -1.0 <= self.tau <= 1.0:
            raise ValueError(f"tau={self.tau}: use a cosine similarity, -1..1, or None")
        check_cosine("alike", self.alike)
        check_counts(scenes=self.scenes, period=self.period, neighbours=self.neighbours)

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (LOOKED_AT,)

    def __call__(self, v: Visual) -> Assignment:
        seen = signal_of(v, LOOKED_AT, self.name)
        check_finite([seen], "attention rows of the mean query")
        return by_clip(v, self.name, lambda clip, budget: self._reduce(clip, seen[clip.at], budget))

    def _reduce(self, clip: Clip, seen: Tensor, budget: int | None) -> Assignment:
        """seen: [T, P]."""
        t, p = seen.shape
        if budget == t * p:
            return Assignment(torch.arange(budget, device=seen.device), scores=seen.flatten())
        frames = clip.x.mean(1) if self.frames is None else self.frames(clip.x).float()
        similar = likeness(frames[1:], frames[:-1]).tolist()
        tau = (0.84 if self.variant == "qwen" else 0.9) if self.tau is None else self.tau
        found = cut_at(similar, tau, self.scenes)
        share = max(self.ratio, 1 / p) if budget is None else budget / (t * p)
        plan = shared_out(found, similar, p, share, self.context, self.period, self.variant, self.alike)
        if budget is not None:
            plan = filled(plan, p, budget, [b > 0 for b in map(sum, zip(*plan))])
        return self._merge(clip.x, seen, found, plan)

    def _merge(self, x: Tensor, seen: Tensor, found: Sequence[Segment], plan: Plan) -> Assignment:
        p, device = seen.shape[1], seen.device
        counts = to_device(torch.tensor(plan), device)  # [2, T]
        salient = ranks_in_rows(seen) < counts[0, :, None]
        anchors = [i for i, count in enumerate(plan.merged) if count]
        total = sum(map(sum, plan))
        if not anchors:
            return Assignment(places(salient, total), scores=seen.flatten())
        pick = to_device(torch.tensor(anchors), device)
        free, most = ~salient[pick], torch.tensor([min(self.neighbours, p - plan.salient[i]) for i in anchors])
        centre = centres(x[pick], free, counts[1, pick], to_device(most, device), self.neighbours)
        kept = salient.index_put((pick,), salient[pick] | centre)
        idx = places(kept, total)
        row, flat = kept.flatten().cumsum(0) - 1, x.flatten(0, 1)
        own = places(salient, sum(plan.salient))
        src, dst, w = [own], [row[own]], [torch.ones_like(own, dtype=torch.float32)]
        scene = {i: s for s in found for i in range(s[0], s[1] + 1)}
        for number, i in enumerate(anchors):
            a, b = scene[i]
            at = i * p + places(centre[number], plan.merged[i])  # [c]
            joins = ~salient[a : b + 1]
            size = (b - a + 1) * p - sum(plan.salient[a : b + 1])
            if self.variant != "ov":
                joins = joins.index_put((torch.full_like(pick[:1], i - a),), (joins[i - a] & ~centre[number])[None])
                size -= plan.merged[i]
            pool = a * p + places(joins, size)
            middle = flat[at]
            likest = (flat[a * p : (b + 1) * p] @ (middle / norms(middle)[:, None]).T).argmax(1)
            to = likest[pool - a * p]
            q = torch.zeros(len(at), device=device).index_add(0, to, torch.ones_like(to, dtype=torch.float32))
            weight = torch.where(q > 0, (1 / (q + 1)).clamp(min=self.beta), 1.0)
            src, dst = [*src, at, pool], [*dst, row[at], row[at][to]]
            w += [weight, ((1 - weight) / q.clamp(min=1))[to]]
        return Assignment(idx, None, torch.cat(src), torch.cat(dst), torch.cat(w), seen.flatten())
