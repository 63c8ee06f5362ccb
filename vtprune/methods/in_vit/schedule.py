"""Where along the depth tokens go, and how many at each block."""

from __future__ import annotations

from collections.abc import Sequence


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


def check_places(at: Sequence[float]) -> None:
    """Raise ValueError unless these are shares of the depth."""
    if not at or not all(0 <= share <= 1 for share in at):
        raise ValueError(f"at={at}: shares of the depth, each from 0 to 1, at least one")


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
