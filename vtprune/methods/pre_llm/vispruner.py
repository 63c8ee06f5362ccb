"""VisPruner: half of the tokens by CLS attention, the other half by dropping what has a double."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.method import Method, Newlines, Per, Positions
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import (
    Fallback,
    best_first,
    budget_of,
    check_counts,
    check_fallback,
    check_parts,
    cls_attention,
    cls_needs,
    select,
    signal_of,
)
from ..shared.thinning import thinned

HIDDEN = Signal("hidden", None)


@register("vispruner", paper="https://arxiv.org/abs/2412.01818", seam="pre_llm")
@dataclass(frozen=True)
class VisPruner(Method):
    """Important tokens by CLS attention; of the others, the most alike leave in rounds until the budget is met.

    1. Of a budget of n tokens, int(important * n) are those that CLS attends to most in the layer before the projector.
    2. The others stand in a row, the most attended first. In each round the tokens at even places are compared with
       those at odd places (cosine of the features before the projector). Of the even ones, up to `step` with the
       highest likeness to any odd one leave. The even ones that are left, the most alike first, and behind them the odd
       ones are the row of the next round.

    The rule is chaotic: even tokens are put in a new order each round, so that one near-tie changes all later pairs. A
    change of one part in a million in the features often changes a third of the choice. All comparisons are made in
    float64, so that the same features give the same tokens on every device and in every batch. The official code
    compares in the model's dtype, and fails where a row has an odd number of tokens.

    The first version of the paper, FasterVLM, is the attention part alone: `cls_topk` with layer=None keeps its tokens,
    as important=1.0 does. As in the official code each crop has its own budget and newlines are dropped. All pairs of
    tokens are compared, and there is a round for every `step` tokens that leave.

    The official code renumbers position ids, positions="compact".

    important: share of important tokens, cut off to a count. The authors use 0.5, and 0.75 on MME.
    step: tokens that leave in a round, at most.
    fallback: as for `cls_attention`; "received" is the official rule for SigLIP.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"
    official_positions: ClassVar[Positions] = "compact"

    important: float = 0.5
    step: int = 8
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_parts(important=self.important)
        check_counts(step=self.step)
        check_fallback(self.fallback)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (*cls_needs(None, self.fallback), HIDDEN)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        scores = [cls_attention(v, None, self.fallback, self.name) for v in units]
        features = [signal_of(v, HIDDEN, self.name) for v in units]
        check_finite([*scores, *features], "attention rows and features")
        return [self._prune(*unit) for unit in zip(budgets, scores, features)]

    def _prune(self, n: int, scores: Tensor, features: Tensor) -> Assignment:
        ranked, count = best_first(scores), int(self.important * n)
        left = n - count
        row = ranked[count:] if left else ranked[:0]
        while len(row) > left:
            unit = normalize(features.detach()[row].double(), dim=1)
            row = row[thinned(unit, left, self.step)]
        return select(torch.cat([ranked[:count], row]), scores)
