"""Held-out questions about drawn scenes or clips, a wanted number of each kind, with balanced answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from vtprune.evals.toys.asks import Ask, Balance

Drawn = TypeVar("Drawn")
_MOST = 50_000


def quotas(shares: Mapping[str, int], total: int) -> dict[str, int]:
    """Split `total` over templates by share; what rounding leaves goes to the first ones."""
    whole = sum(shares.values())
    quota = {name: total * share // whole for name, share in shares.items()}
    for name in list(shares)[: total - sum(quota.values())]:
        quota[name] += 1
    return quota


def draw(
    make: Callable[[random.Random], Drawn],
    rng: random.Random,
    askers: Mapping[str, Callable[[Drawn, random.Random], Iterator[Ask]]],
    shares: Mapping[str, Mapping[str, int]],
    count: int,
    slack: Mapping[str, int],
) -> Iterator[tuple[int, Drawn, Ask]]:
    """(number of the drawing, drawing, question): `count` of each capability, at most one per drawing and capability.

    askers: what may be asked, by capability; shares: of its templates; slack: of its balance, 1 unless given.
    """
    left = {c: quotas(shares[c], count) for c in askers}
    balances = {c: Balance(slack.get(c, 1)) for c in askers}
    for number in range(_MOST):
        open_ones = [c for c in askers if any(left[c].values())]
        if not open_ones:
            return
        drawn = make(rng)
        for capability in open_ones:
            candidates = list(askers[capability](drawn, rng))
            rng.shuffle(candidates)
            for ask in candidates:
                if left[capability][ask.template] and balances[capability].admit(ask):
                    left[capability][ask.template] -= 1
                    yield number, drawn, ask
                    break
    raise RuntimeError(f"{_MOST} drawings did not fill {count} balanced questions of {open_ones}")
