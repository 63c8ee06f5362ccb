"""Where along the depth tokens go, and how many at each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.reduction import Reducer
from ...core.visual import Visual
from .. import budget_of


@dataclass(frozen=True)
class AtPlaces(Reducer):
    """A method that drops tokens at a few places along the depth, the same share of what is left at each.

    at: the places, as shares of the depth. In a VLM's tower the depth ends with the block that feeds the projector, or
        with the last block of the stage; there the budget is reached in any case.
    """

    at: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        if not self.at or not all(0 <= share <= 1 for share in self.at):
            raise ValueError(f"at={self.at}: shares of the depth, each from 0 to 1, at least one")

    def counts(self, n: int, depth: int, keep: float | int | None) -> list[int]:
        return stepwise(n, self.goal(n, keep), depth, self.at)

    def due(self, v: Visual) -> int:
        goal, (k, last) = budget_of(v, self.name), v.block or (0, 0)
        ahead = [place for place in places(self.at, last + 1) if place >= k]
        if k == last or not ahead:
            return goal
        share: float = (goal / v.n) ** (ahead.count(k) / len(ahead))
        return max(goal, round(v.n * share))


def stepwise(n: int, goal: int, depth: int, at: Sequence[float]) -> list[int]:
    """Patches left behind each of `depth` blocks, n at first: the same share goes at each place, `goal` stay.

    at: shares of the depth; 0.25 of 12 is the block with index 3.
    """
    stops = places(at, depth)
    left = []
    for k in range(depth):
        passed = sum(stop <= k for stop in stops)
        left.append(goal if passed == len(stops) else max(goal, round(n * (goal / n) ** (passed / len(stops)))))
    return left


def places(at: Sequence[float], depth: int) -> list[int]:
    """The blocks behind which tokens go, ascending; two shares may mean one block. at: shares of the depth."""
    return sorted(min(depth - 1, round(share * depth)) for share in at)


def per_block(r: int | Sequence[float], depth: int) -> list[int]:
    """Tokens to merge in each of `depth` blocks: r, or (r, f) from r (1 - f) to r (1 + f), or a list padded with 0.

    Counts are truncated as in the official code, so schedules of the same r do not all remove the same total.
    """
    if isinstance(r, bool) or (isinstance(r, int) and r < 0):
        raise ValueError(f"r={r}: tokens to merge in a block, an int of 0 or more")
    if isinstance(r, int):
        return [r] * depth
    if len(r) == 2 and isinstance(r[1], float):
        if not -1 <= r[1] <= 1:
            raise ValueError(f"r={r}: the second number is a slope from -1.0 to 1.0")
        low = int(r[0] * (1 - r[1]))
        step = (2 * r[0] - low - low) / max(1, depth - 1)
        return [int(low + step * k) for k in range(depth)]
    if not all(isinstance(x, int) and x >= 0 for x in r):
        raise ValueError(f"r={r}: ints of 0 or more, one a block, or (r, slope) with a float from -1.0 to 1.0")
    return [int(x) for x in (*r, *[0] * depth)][:depth]
