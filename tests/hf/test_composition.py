"""Stages compose: any method before the LLM with any inside it, and two before it one after the other."""

from __future__ import annotations

import families
import pytest
import reference
import torch

import vtprune
from vtprune import Stage

BEFORE = [m.name for m in vtprune.methods() if m.seam == "pre_llm"]
# Those that act at decode are composed in test_decode_stages.py.
INSIDE = [m.name for m in vtprune.methods() if m.seam == "in_llm" and "decode" not in m.phases]
ROWS = (1, 2)


def run(family: str, stages: list[Stage]) -> list[str]:
    """Four greedy steps of a ragged batch against the hand-cut sequence of each row; names of the methods that ran."""
    model = families.model(family)
    stages, log = reference.spy(stages)
    batch = families.inputs(family, rows=ROWS)
    with vtprune.patch(model, stages):
        tokens, ours = reference.greedy(model, batch, 4)
    units = [families.inputs(family, rows=ROWS, only=row).units[0] for row in range(len(ROWS))]
    for row in range(len(ROWS)):
        cuts = _in_turn(log, units, row)
        compact = reference.renumbers(log)
        theirs = reference.expected(model, family, ROWS, row, cuts, tokens[row], compact=compact)
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=2e-5)
    return [call.stage.method.name for call in log]


def _in_turn(log: list[reference.Call], units: list[list[list[int]]], row: int) -> dict:
    """The cuts of a row; the second of two cuts at one place is about what the first left, so they become one."""
    cuts = reference.cuts_of_row(log, range(len(ROWS)), units)[row]
    for where, found in cuts.items():
        joined: list[reference.Cut] = []
        for cut in found:
            at = next((i for i, c in enumerate(joined) if torch.isin(cut.positions, c.positions).all()), None)
            if at is None:
                joined.append(cut)
            else:
                joined[at] = reference.Cut(joined[at].positions, _after(joined[at].answer, cut.answer))
        cuts[where] = joined
    return cuts


def _after(first: vtprune.Assignment, second: vtprune.Assignment) -> vtprune.Assignment:
    """x'' = B (A x) as one dense product."""

    class Both(vtprune.Assignment):
        def apply(self, x: torch.Tensor) -> torch.Tensor:
            return second.apply(first.apply(x))

    return Both(first.idx[second.idx])


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_before_and_inside(family: str, before: str, inside: str) -> None:
    stages = [
        Stage("llm", vtprune.create(before), keep=0.6, per="image", newlines="compete"),
        Stage(2, vtprune.create(inside), keep=0.2, per="image"),
    ]
    assert run(family, stages) == [vtprune.create(before).resolved.name, inside]


@pytest.mark.parametrize("second", ["divprune", "todre"])
@pytest.mark.parametrize("first", [name for name in BEFORE if name not in ("random", "uniform")])
def test_importance_first_diversity_second(first: str, second: str) -> None:
    """Two rules before the LLM: the second chooses among what the first left (and merged)."""
    stages = [
        Stage("llm", vtprune.create(first), keep=0.6, per="image", newlines="compete"),
        Stage("llm", vtprune.create(second), keep=0.2, per="image"),
    ]
    assert run("llava", stages) == [vtprune.create(first).resolved.name, second]
