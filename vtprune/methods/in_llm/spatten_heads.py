"""SpAtten's heads: one that said little so far falls silent in all later layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.method import Method, Of, trust
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import part
from .. import best_first, budget_of, signal_of

SAID = Signal("head_output", -1)


@trust
@part
@dataclass(frozen=True)
class SpAttenHeads(Method):
    """Cascade head pruning: the heads whose |output|, summed over channels, tokens and layers so far, is largest."""

    reads_text: ClassVar[bool] = True
    name: ClassVar[str] = "spatten_heads"
    paper: ClassVar[str] = "https://arxiv.org/abs/2012.09852"
    seam: ClassVar[str] = "in_llm"
    of: ClassVar[Of] = "heads"

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (SAID,)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        return best_of(self, units, SAID)


def best_of(method: Method, units: Sequence[Visual], signal: Signal) -> list[Assignment]:
    """The budget's most important tokens or heads of each unit by one signal; half of them where there is no budget."""
    scores = [signal_of(v, signal, method.name) for v in units]
    check_finite(scores, f"{signal.kind} scores")
    counts = [max(1, v.n // 2) if v.budget is None else budget_of(v, method.name) for v in units]
    return [Assignment(most_important(s, count), scores=s) for s, count in zip(scores, counts)]


def most_important(scores: Tensor, count: int, first: int = 0, last: int = 0) -> Tensor:
    """Slots [.., first + count + last] int64 of scores [.., S], ascending: the `count` best of those between the first
    and the last, which stay in any case; the lower slot among equals.

    With the logits of the last query [.., H, S] it is the rule of SpAtten-LLM (mit-han-lab/spatten-llm), which cuts
    the cache of each layer and head for itself between the turns of a chat. Its caches hold keys without rotary
    embedding, so `patch` does not offer it.
    Raises ValueError if there are fewer than `count` slots between them.
    """
    slots = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    end = scores.shape[-1] - last
    if min(count, first, last) < 0 or count > end - first:
        raise ValueError(f"count={count}, first={first}, last={last}: there are {scores.shape[-1]} slots")
    best = best_first(scores[..., first:end])[..., :count].sort().values + first
    return torch.cat([slots[..., :first], best, slots[..., end:]], dim=-1)
