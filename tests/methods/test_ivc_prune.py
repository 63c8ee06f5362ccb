"""IVC-Prune against a plain restatement of its selection on whole sequences."""

from __future__ import annotations

import math
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Stage, Visual
from vtprune.methods.in_llm.ivc_prune import COS, LOGSUM, ROWS, SIN, VALUES

START, BEHIND = 3, 8  # text before and behind the image


def sequence(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Values [G, S, d], and rotary tables [S, d]."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.arange(START + n + BEHIND)[:, None] * (10000.0 ** -(torch.arange(4) / 4)).repeat(2)
    return torch.randn(2, START + n + BEHIND, 4, generator=g), angle.cos(), angle.sin()


def unit(values: Tensor, cos: Tensor, sin: Tensor, n: int, budget: int | None) -> Visual:
    image, logits = slice(START, START + n), values @ values.mT / 2
    signals = {
        ROWS: logits.softmax(-1).mean(0)[START + n :, image].T,
        VALUES: values[:, image].transpose(0, 1).flatten(1),
        LOGSUM: logits.logsumexp(-1)[:, image].T,
        COS: cos[image].mean(-1),
        SIN: sin[image].mean(-1),
    }
    return Visual(torch.zeros(n, 1), budget, signals=signals)


def weights(values: Tensor) -> list[list[float]]:
    """w [S][S], of the whole sequence."""
    heads = []
    for head in values.double().tolist():
        rows = [[math.exp(sum(a * b for a, b in zip(x, y)) / len(x) ** 0.5) for y in head] for x in head]
        heads.append([[e / sum(row) for e in row] for row in rows])
    return [[sum(h[i][j] for h in heads) / len(heads) for j in range(len(heads[0]))] for i in range(len(heads[0]))]


def top(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-round(scores[i], 7), i))[:count]


def by_hand(values: Tensor, cos: Tensor, sin: Tensor, n: int, budget: int | None, skip: int = 2) -> list[int]:
    w, s = weights(values), len(cos)
    question = list(range(START + n + skip, s))

    def mean_of(rows: list[int]) -> list[float]:
        return [sum(w[i][START + j] for i in rows) / len(rows) for j in range(n)]

    seeds = top(mean_of(question), max(1, round(0.01 * n)))
    looked = mean_of([START + i for i in seeds] + question)
    means = [[sum(row) / len(row) for row in table.double().tolist()[START : START + n]] for table in (cos, sin)]
    each = round(0.05 * n) if budget is None else min(budget // 2, round(budget * 0.05 / 0.25))
    kept = {i for mean in means for i in top(mean, each)}
    if budget is None:
        return sorted(kept | set(top(looked, max(1, round(0.2 * n)))))
    rest = [i for i in top(looked, n) if i not in kept]
    return sorted([*kept, *rest[: budget - len(kept)]])


@pytest.mark.parametrize("n", [1, 2, 7, 30, 63])
def test_official_shares(n: int) -> None:
    values, cos, sin = sequence(n, n)
    answer = vtprune.create("ivc_prune")(unit(values, cos, sin, n, None))
    assert answer.idx.tolist() == by_hand(values, cos, sin, n, None)


@pytest.mark.parametrize(("n", "budget"), [(1, 1), (7, 2), (30, 9), (30, 29), (63, 20), (63, 63)])
def test_exact_budgets(n: int, budget: int) -> None:
    values, cos, sin = sequence(n, n)
    answer = vtprune.create("ivc_prune")(unit(values, cos, sin, n, budget))
    assert answer.idx.tolist() == by_hand(values, cos, sin, n, budget)
    assert len(answer.idx) == budget


def test_what_is_skipped_behind_the_image() -> None:
    """A line break is not the question; a text that is no longer than what is skipped counts whole."""
    values, cos, sin = sequence(30)
    for skip in (0, 2, 7):
        answer = vtprune.create("ivc_prune", skip=skip)(unit(values, cos, sin, 30, None))
        assert answer.idx.tolist() == by_hand(values, cos, sin, 30, None, skip)
    whole = vtprune.create("ivc_prune", skip=BEHIND)(unit(values, cos, sin, 30, None))
    assert whole.idx.tolist() == by_hand(values, cos, sin, 30, None, 0)


def test_anchors_can_be_left_out() -> None:
    """And half of a budget at most are anchors."""
    values, cos, sin = sequence(40)
    v = unit(values, cos, sin, 40, 8)
    plain = vtprune.create("ivc_prune", anchors=0.0)(v)
    assert plain.scores is not None
    assert plain.idx.tolist() == sorted(top(plain.scores.tolist(), 8))
    many = vtprune.create("ivc_prune", anchors=1.0, foreground=0.01)(v).idx.tolist()
    means = [table[START : START + 40].double().mean(-1).tolist() for table in (cos, sin)]
    assert {i for mean in means for i in top(mean, 4)} <= set(many)


def test_where_it_acts() -> None:
    assert [(s.where, s.keep) for s in vtprune.create("ivc_prune").stages(None, 32)] == [(16, None)]
    assert [(s.where, s.keep) for s in vtprune.create("ivc_prune", layer=2).stages(0.5, 28)] == [(2, 0.5)]
    with pytest.raises(vtprune.UnsupportedModel, match="linear_attention"):
        vtprune.patch(families.model("qwen3_5"), Stage(1, vtprune.create("ivc_prune"), keep=0.5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"foreground": 0.0}, ValueError, "foreground=0.0"),
        ({"seeds": 1.5}, ValueError, "seeds=1.5"),
        ({"skip": -1}, ValueError, "skip=-1"),
        ({"layer": 0}, ValueError, "layer=0"),
        ({"layer": "8"}, TypeError, "layer='8'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtprune.create("ivc_prune", **options)
