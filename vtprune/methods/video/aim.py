"""AIM: tokens of a frame are merged in pairs, round by round, before the LLM, and leave layer by layer inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.method import Method, Newlines, Positions, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import signal_of
from ..clips import Clip, by_clip, flow
from ..in_llm.aim_inllm import AIMInLLM

Metric = Literal["features", "keys"]
KEYS = Signal("keys", None)


@register("aim", paper="https://arxiv.org/abs/2412.03248", seam="pre_llm")
@dataclass(frozen=True)
class AIM(Method):
    """Bipartite merging in every frame: at most half of its tokens a round, the most alike first.

    A round compares the even tokens with the odd ones; of the even ones the q with the likest partner join it, and the
    partner becomes the plain mean of itself and all that joined. What was merged before counts as one token. The next
    round sees [even tokens left, the most alike first; odd tokens]. A merged token stands at the place of its partner.
    Frames share the budget evenly. Positions are renumbered where ids have one axis.

    By name both parts run: this, and the schedule of `aim_inllm` on what it leaves, which ends without visual tokens.

    rounds: without keep, how often floor(P / 2), floor(P / 4), ... tokens are merged; 2 leaves a quarter. Or how many
        are merged in each round, as the official code for images has it: (288, 36) leaves 252 of 576.
    metric: what is compared, "features", or "keys" of the layer that feeds the projector, merged alongside (the
        official code for images; there before the projector, here behind it). inner: the part inside the LLM.
    """

    video: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "keep"
    positions: ClassVar[Positions] = "compact"
    rounds: int | tuple[int, ...] = 2
    metric: Metric = "features"
    inner: bool = True

    def __post_init__(self) -> None:
        every = self.rounds if isinstance(self.rounds, tuple) and self.rounds else (self.rounds,)
        if any(isinstance(q, bool) or not isinstance(q, int) or q < 1 for q in every):
            raise ValueError(f"rounds={self.rounds!r}: use an int >= 1, or a tuple of them")
        if self.metric not in get_args(Metric):
            raise ValueError(f"metric={self.metric!r}: choose 'features' or 'keys'")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (KEYS,) if self.metric == "keys" else ()

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        if not self.inner or (isinstance(keep, float) and keep == 1.0):  # nothing may change then
            return [first]
        if keep is not None:
            left = keep
        elif isinstance(self.rounds, int):
            left = 0.5**self.rounds
        else:
            raise ValueError(f"rounds={self.rounds}: counts say no share for the part inside the LLM; use inner=False")
        later = AIMInLLM().stages(None, depth)
        # A count is one of each unit, as in the first part.
        return [
            first,
            *(replace(s, keep=_of(s.keep, left), per="image" if isinstance(left, int) else s.per) for s in later),
        ]

    def __call__(self, v: Visual) -> Assignment:
        if self.metric == "features":
            return by_clip(v, self.name, lambda clip, budget: self._reduce(clip, clip.x, budget))
        keys = signal_of(v, KEYS, self.name)
        check_finite([keys], "keys")
        return by_clip(v, self.name, lambda clip, budget: self._reduce(clip, keys[clip.at], budget))

    def _reduce(self, clip: Clip, metric: Tensor, budget: int | None) -> Assignment:
        """metric: [T, P, C] float32."""
        t, p = clip.at.shape
        if budget is None:
            official = self._official(p)
            counts = [p - sum(official)] * t
        else:
            official, counts = None, [(i + 1) * budget // t - i * budget // t for i in range(t)]
        same = len(set(counts)) == 1
        parts = []
        for count, frames in groupby(sorted(range(t), key=lambda i: counts[i]), key=lambda i: counts[i]):
            chosen = list(frames)
            x = metric if same else torch.stack([metric[i] for i in chosen])
            parts += list(zip(chosen, *merged(x, halvings(p, count) if official is None else official)))
        _, kept, member, weight = (list(part) for part in zip(*sorted(parts, key=lambda part: part[0])))
        to = torch.stack(member) + p * torch.arange(t, device=metric.device)[:, None]
        used = torch.stack([torch.full_like(mask, bool(count)) for mask, count in zip(kept, counts)])
        sizes = sum(counts), p * sum(count > 0 for count in counts)
        return flow(torch.stack(kept), used, to, torch.stack(weight), None, *sizes)

    def _official(self, p: int) -> list[int]:
        """Tokens of p merged in each round, at most half of what is there."""
        asked = self.rounds if isinstance(self.rounds, tuple) else [p >> (i + 1) for i in range(self.rounds)]
        done: list[int] = []
        for q in asked:
            done.append(min(q, (p - sum(done)) // 2))
        return done


def halvings(n: int, count: int) -> list[int]:
    """Tokens to merge in each round, half of them while more than `count` of n are left; none where none may stay."""
    done: list[int] = []
    while count and (m := n - sum(done)) > count:
        done.append(min(m // 2, m - count))
    return done if count else [n]


def merged(x: Tensor, rounds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Merge [F, n, C], so many in each round: which stand for the others [F, n] bool, who stands for each of the n
    [F, n] int64, and its weight [F, n] float32. Merging all n leaves none."""
    f, n, _ = x.shape
    stands = torch.arange(n, device=x.device).expand(f, n)  # the place of each of the tokens that are left
    row, weight = stands, torch.ones(f, n, device=x.device)
    kept = torch.zeros(f, n, dtype=torch.bool, device=x.device)
    if sum(rounds) == n:
        return kept, stands, weight
    for q in filter(None, rounds):
        step, share, x, stands = _round(x, stands, q)
        weight = weight * share.gather(1, row)
        row = step.gather(1, row)
    return kept.scatter(1, stands, True), stands.gather(1, row), weight


def _round(x: Tensor, stands: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One round on x [F, m, C]: the new row and the share in it of each token [F, m], new rows, their places."""
    unit = normalize(x, dim=-1)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)  # [F, ceil(m / 2)]
    order = best.sort(dim=1, descending=True, stable=True).indices
    joins, stay = order[:, :q], order[:, q:]
    left, odd = stay.shape[1], x.shape[1] // 2
    target = partner.gather(1, joins)
    count = torch.ones(len(x), odd, device=x.device).scatter_add(1, target, torch.ones_like(joins, dtype=x.dtype))
    pick = lambda source, at: source.gather(1, at[..., None].expand(-1, -1, source.shape[2]))  # noqa: E731
    summed = x[:, 1::2].scatter_add(1, target[..., None].expand(-1, -1, x.shape[2]), pick(x[:, ::2], joins))
    new = torch.cat([pick(x[:, ::2], stay), summed / count[..., None]], dim=1)
    step, share = torch.empty_like(stands), torch.ones_like(stands, dtype=torch.float32)
    even = (left + partner).scatter(1, stay, torch.arange(left, device=x.device).expand_as(stay))
    step[:, ::2], step[:, 1::2] = even, left + torch.arange(odd, device=x.device)
    share[:, ::2] = (1 / count).gather(1, partner).scatter(1, stay, 1.0)
    share[:, 1::2] = 1 / count
    return step, share, new, torch.cat([stands[:, ::2].gather(1, stay), stands[:, 1::2]], dim=1)


def _of(share: float | int | None, left: float | int) -> float | int | None:
    """A share of what the first part leaves; None where all leave."""
    if share is None:
        return None
    return max(1, round(share * left)) if isinstance(left, int) else share * left
