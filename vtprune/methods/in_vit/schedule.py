"""Where along the depth tokens go, for methods that drop at a few blocks only."""

from __future__ import annotations

from collections.abc import Sequence


def stepwise(n: int, goal: int, depth: int, at: Sequence[float]) -> list[int]:
    """Patches left behind each of `depth` blocks, n at first: the same share goes at each place, `goal` stay.

    at: shares of the depth; 0.25 of 12 is the block with index 3.
    """
    places = sorted(min(depth - 1, round(share * depth)) for share in at)
    left = []
    for k in range(depth):
        passed = sum(place <= k for place in places)
        left.append(goal if passed == len(places) else max(goal, round(n * (goal / n) ** (passed / len(places)))))
    return left


def check_places(at: Sequence[float]) -> None:
    """Raise ValueError unless these are shares of the depth."""
    if not at or not all(0 <= share <= 1 for share in at):
        raise ValueError(f"at={at}: shares of the depth, each from 0 to 1, at least one")
