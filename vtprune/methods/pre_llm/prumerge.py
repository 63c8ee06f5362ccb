"""PruMerge: tokens with outstanding CLS attention, and some spaced evenly, each take in what resembles them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.method import Method, Newlines, Per, Positions, Rounding
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import (
    Fallback,
    budget_of,
    check_choices,
    check_counts,
    check_fallback,
    cls_attention,
    select,
    signal_of,
)
from ..shared.counting import ranks, share_of
from ..shared.nearest import likest
from ..shared.raster import evenly

Variant = Literal["plus", "base"]
Order = Literal["positional", "official"]
CLS, KEYS = Signal("cls_full", -1), Signal("keys", -1)
RECEIVED = Signal("received", -1, without_cls=True)


class _Plan(NamedTuple):
    """All tokens of a unit, those first that stay."""

    order: Tensor  # [N] int64: the centres, then the others by score
    centres: Tensor  # [] int64: how many


@register("prumerge", paper="https://arxiv.org/abs/2403.15388", seam="pre_llm")
@dataclass(frozen=True)
class PruMerge(Method):
    """Centres y_i = x_i + sum of a_j * x_j over the tokens j whose keys are most like key i, and one token of the rest.

    1. a [N] is the CLS token's softmax row in the tower's last layer, of one head as wide as the tower.
    2. "base": centres are the best tokens by a. "plus" (PruMerge+) adds tokens that are spaced evenly over the image.
    3. Each centre adds up the `nearest` other tokens (kept or not) of highest cosine of keys, weighted with a. The
       weights are not normalised, and what is added are the features from before.
    4. One more token, at the place of the best one that is no centre, is the sum of a_j * x_j over all that are none.

    Without keep, the best are as many as lie above Q3 + 1.5 (Q3 - Q1) of a, at least one, and "plus" adds every s-th
    token but the very last, s = int(int(1 / r) / 3) for a share r of outliers; the host reads the counts once a batch.
    With keep, a share is cut off as officially, and the budget holds the token of the rest too (officially it comes
    on top): n - 1 centres, of which "plus" takes the better half by a and spaces the others evenly over what is left.

    Tokens are merged behind the projector, officially before it. The official code fails where s is 0 or a unit has
    fewer than 33 tokens; here s is at least 1, and a centre takes in what there is. Every crop stands alone.

    The official code renumbers position ids, positions="compact".

    variant: "plus" is what the official code runs by default.
    nearest: tokens that each centre takes in.
    order: "positional", or "official": the kept places are filled with the centres, best first, then those spaced
        evenly, then the token of the rest; meant for positions="compact".
    fallback: as for `cls_attention`; a tower without a CLS token is not in the paper.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"  # they have neither scores nor keys
    rounding: ClassVar[Rounding] = "down"
    official_positions: ClassVar[Positions] = "compact"

    variant: Variant = "plus"
    nearest: int = 32
    order: Order = "positional"
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_choices(self, variant=Variant, order=Order)
        check_counts(nearest=self.nearest)
        check_fallback(self.fallback)

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (CLS, KEYS) if self.fallback == "error" else (CLS, KEYS, RECEIVED)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        scores = [self._scores(v) for v in units]
        keys = [signal_of(v, KEYS, self.name) for v in units]
        check_finite([*scores, *keys], "attention rows and keys")
        plans = [self._plan(v, a) for v, a in zip(units, scores)]
        own = [plan.centres for v, plan in zip(units, plans) if v.budget is None]
        read = iter(torch.stack(own).tolist() if own else [])
        answers = []
        for v, a, key, plan in zip(units, scores, keys, plans):
            count = next(read) if v.budget is None else max(1, v.budget - 1)
            total = count + 1 if v.budget is None else v.budget
            answers.append(self._merge(plan.order, min(count, v.n), min(total, v.n), a, normalize(key, dim=1)))
        return answers

    def _scores(self, v: Visual) -> Tensor:
        return v.signals[CLS].float() if CLS in v.signals else cls_attention(v, -1, self.fallback, self.name)

    def _plan(self, v: Visual, a: Tensor) -> _Plan:
        rank, place = ranks(a), torch.arange(v.n, device=a.device)
        best: Tensor | int
        if v.budget is None:
            quartiles = [torch.quantile(a.double(), q) for q in (0.25, 0.75)]
            above = (a > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])).sum().clamp(min=1)
            best = share_of(v.n, above, v.n, cut=True).clamp(min=1)
            step = ((v.n / above.double()).floor() / 3).floor().long().clamp(min=1)
            spaced = (place % step == 0) & (place < v.n - 1)
        else:
            centres = max(1, budget_of(v, self.name) - 1)
            best = (centres + 1) // 2 if self.variant == "plus" else centres
            others = (rank < best).to(torch.int8).sort(stable=True).indices[: v.n - best]
            some = others[evenly(centres - best, v.n - best, a.device)]
            spaced = torch.zeros_like(rank, dtype=torch.bool).index_fill(0, some, True)
        if self.variant == "base":
            spaced = torch.zeros_like(spaced)
        centre = (rank < best) | spaced
        turn = torch.where(rank < best, rank, torch.where(spaced, v.n + place, 2 * v.n + rank))
        return _Plan(turn.argsort(), centre.sum())

    def _merge(self, ranked: Tensor, count: int, total: int, a: Tensor, keys: Tensor) -> Assignment:
        """Keep `total` of the tokens ranked [N]: the first `count` as centres, and the token of the rest."""
        order, n = ranked[:total], len(ranked)
        if total == n:
            return select(order, a)
        idx = order.sort().values
        turn = torch.arange(total, device=order.device)
        row = turn if self.order == "official" else torch.searchsorted(idx, order)
        centres, few = order[:count], min(self.nearest, n - 1)
        taken = likest(keys, centres, few)
        rest = ranked[count:] if total > count else ranked[:0]
        src = torch.cat([centres, taken.flatten(), rest])
        dst = torch.cat([row[:count], row[:count].repeat_interleave(few), row[count:].expand(len(rest))])
        w = torch.cat([torch.ones_like(a[:count]), a[taken.flatten()], a[rest]])
        return Assignment(idx, order, src, dst, w, a)
