"""Scenes of a video: where they begin, and how tokens are shared out over their frames."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from ...core.method import spread
from .segments import Segment

Variant = Literal["ov", "lv", "qwen"]


class Plan(NamedTuple):
    """Tokens of every frame: those that are looked at most, and merged ones."""

    salient: list[int]
    merged: list[int]


def cut_at(similar: Sequence[float], tau: float, scenes: int = 8) -> list[Segment]:
    """Scenes of T frames by the similarities of neighbours: the scenes - 1 lowest, and all below tau, end one."""
    lowest = sorted(range(len(similar)), key=lambda i: (similar[i], i))[: scenes - 1]
    ends = sorted({*lowest, *(i for i, s in enumerate(similar) if s < tau), len(similar)})
    return list(zip([0, *(e + 1 for e in ends[:-1])], ends))


def refined(labels: Sequence[int]) -> list[Segment]:
    """The longest runs of every label, of two frames at least; the others join the longer neighbour, the left of two.

    >>> refined([0, 0, 0, 1, 0, 2, 2])
    [(0, 4), (5, 6)]
    """
    runs, start = [], 0
    for label, group in groupby(labels):
        stop = start + len(list(group))
        runs.append((label, start, stop))
        start = stop
    longest = {label: max(b - a for other, a, b in runs if other == label) for label in labels}
    stay = [(a, b) for label, a, b in runs if b - a == longest[label] > 1] or [(0, len(labels))]
    # What stands between two of them goes to the longer one.
    edges = [c if b - a >= d - c else b for (a, b), (c, d) in pairwise(stay)]
    return list(zip([0, *edges], [*(e - 1 for e in edges), len(labels) - 1]))


def shared_out(
    found: Sequence[Segment],
    similar: Sequence[float],
    p: int,
    ratio: float,
    context: float,
    period: int,
    variant: Variant,
    alike: float,
) -> Plan:
    """FastVID's shares of p tokens a frame, cut off as officially; what cannot be placed (there an error) is left out.

    context: the share of merged tokens. period: every which frame of a scene merges. variant: whose rules; similar:
    [T - 1] of neighbouring frames, those above `alike` share the tokens of the last of them, for "qwen".
    """
    n, last = int(p * ratio), found[-1][1]
    plan = Plan([0] * (last + 1), [0] * (last + 1))
    for a, b in found:
        length = b - a + 1
        if variant == "qwen":  # the frames that get tokens
            takers = [i for i in range(a, b + 1) if i == b or similar[i] < alike]
        else:
            takers = list(range(a, b + 1))
        anchors = takers[::-1][::period][::-1]
        if variant == "ov":
            merged = [int(n * context) * length // len(anchors)] * len(anchors)
            salient = [n - int(n * context)] * length
        else:
            share = int(n * length * context)
            share = min(max(share, 1), n * length) if variant == "qwen" else share
            merged = _even(share, len(anchors))[::-1]
            salient = _even(n * length - share, len(takers))
        for i, count in zip(anchors, merged):
            plan.merged[i] = min(count, p // 2) if variant == "qwen" else count
        for i, count in zip(takers, salient):
            plan.salient[i] = min(count, p - plan.merged[i]) if variant == "qwen" else count
            plan.merged[i] = min(plan.merged[i], p - plan.salient[i])
    return plan


def filled(plan: Plan, p: int, budget: int, takers: Sequence[bool]) -> Plan:
    """More salient tokens until there are `budget`: in frames that have some, then in the others."""
    salient = list(plan.salient)
    for first in (True, False):
        room = [(p - s - m) * (taker == first) for s, m, taker in zip(salient, plan.merged, takers)]
        rest = min(sum(room), budget - sum(salient) - sum(plan.merged))
        salient = [s + more for s, more in zip(salient, spread(rest, room))]
    return Plan(salient, plan.merged)


def _even(total: int, parts: int) -> list[int]:
    """Shares that differ by one at most, the larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]
