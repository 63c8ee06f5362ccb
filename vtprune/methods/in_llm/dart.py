"""DART: keep the visual tokens that are least like a few pivots, so that duplicates of the pivots go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import normalize

from ...core.method import Method, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, check_choices, check_counts, check_parts, select, signal_of

PivotOrder = Literal["rank", "cpython_set"]
SIZE, STATES = Signal("key_size", -1), Signal("final_states", -1)
TEXT_SIZE, TEXT_STATES = Signal("text_key_size", -1), Signal("text_final_states", -1)


@register("dart", paper="https://arxiv.org/abs/2502.11494", seam="in_llm")
@dataclass(frozen=True)
class DART(Method):
    """Pivots by the size of their keys; each in turn keeps the visual tokens that are least like it.

    1. The pivots are the `pivots` visual tokens and the `text_pivots` tokens of the text behind the image whose keys in
       the layer before have the largest L1 norm, heads concatenated.
    2. Each pivot in turn takes, of the visual tokens that are left, those whose states have the lowest cosine with its
       own. The states are those that leave the layer before, through the norm that stands behind the last layer.
    3. The visual pivots and what was taken stay.

    With keep exactly that many tokens stay: the first pivots take one token more where it does not come out even, and a
    budget below `pivots` keeps the pivots of the largest keys. Without keep each pivot takes as many as officially,
    floor(min(asked, n - pivots) / number of pivots), where asked is `count`, or without it (1 - reduction) * n; so
    `count=128` with eight pivots keeps 4 + 8 * 16 = 132 tokens. Shares are rounded to a count, half to even.

    pivot_order: who takes first. "rank": visual pivots, then those of the text, each by falling key size.
        "cpython_set": as officially, the order in which CPython walks a set of their places in the prompt, which is
        arbitrary. It waits for the device.
    image_start: where the image begins in the prompt, for that order; 35 in the prompt of LLaVA-1.5. The text is
        counted on from the end of the image.
    layer: "K" of the paper; the first decoder layer that runs on the pruned sequence, >= 1.
    """

    reads_text: ClassVar[bool] = True
    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4
    count: int | None = 128
    reduction: float = 0.778
    pivot_order: PivotOrder = "rank"
    image_start: int = 35

    def __post_init__(self) -> None:
        check_choices(self, pivot_order=PivotOrder)
        check_counts(layer=self.layer, pivots=self.pivots)
        check_parts(reduction=self.reduction)
        if self.count is not None:
            check_counts(count=self.count)
        for name in ("text_pivots", "image_start"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: use an int >= 0")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return SIZE, STATES, TEXT_SIZE, TEXT_STATES

    def default_where(self) -> Where:
        return self.layer

    def __call__(self, v: Visual) -> Assignment:
        size, states, text_size, text_states = (signal_of(v, need, self.name) for need in self.needs)
        check_finite([size, states, text_size, text_states], "signals of keys and states")
        unit, text_unit = normalize(states, dim=1), normalize(text_states, dim=1)
        kept = best_first(size)[: self.pivots if v.budget is None else min(self.pivots, budget_of(v, self.name))]
        text = best_first(text_size)[: self.text_pivots]
        pivots, number = torch.cat([unit[kept], text_unit[text]]), len(kept) + len(text)
        if self.pivot_order == "cpython_set":
            places = torch.cat([self.image_start + kept, self.image_start + v.n + text]).tolist()
            pivots = pivots[[places.index(place) for place in _walked(places)]]
        more = (self._official(v.n, number) if v.budget is None else v.budget) - len(kept)
        like = (pivots @ unit.T).index_fill(1, kept, torch.inf)  # [P, n]; what is taken is like everything
        order, taken = [kept], torch.zeros_like(size, dtype=torch.bool)
        for i in range(number):
            takes = more // number + (i < more % number)
            order.append(like[i].masked_fill(taken, torch.inf).argsort(stable=True)[:takes])
            taken = taken.index_fill(0, order[-1], True)
        return select(torch.cat(order), scores=size)

    def _official(self, n: int, number: int) -> int:
        """Tokens that stay of n, for so many pivots."""
        asked = n * round(1 - self.reduction, 6) if self.count is None else self.count
        kept = min(self.pivots, n)
        return kept + number * int(max(0, min(asked, n - kept)) // number)


def _walked(places: list[int]) -> list[int]:
    """The order in which CPython walks the set of these ints, put in one by one."""
    found: set[int] = set()
    for place in places:
        found.add(place)
    return list(found)
