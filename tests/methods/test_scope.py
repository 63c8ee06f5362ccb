"""SCOPE against sums over all tokens in float64, its options both ways, and towers that show less."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Signal, UnsupportedModel, Visual

CLS, HIDDEN = Signal("cls", None), Signal("hidden", None, optional=True)


def unit(n: int, k: int, seed: int = 0, levels: int = 0) -> Visual:
    """Random tokens, states and attention; with few levels, attention full of ties, some of it 0."""
    g = torch.Generator().manual_seed(seed)
    x, z, a = torch.randn(n, 5, generator=g), torch.randn(n, 7, generator=g), torch.rand(n, generator=g)
    a = (a * levels).floor() / levels if levels else a
    return Visual(x, k, signals={CLS: a, HIDDEN: z})


def oracle(z: Tensor, a: Tensor, k: int, alpha: float, combine: str) -> list[int]:
    return oracles.facility(oracles.facility_matrix(z), k, (a.double() ** alpha).tolist(), combine)


@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (29, 9), (40, 20)])
def test_it_equals_the_oracle(n: int, k: int, alpha: float, combine: str) -> None:
    for seed, features in enumerate(("hidden", "projected")):
        v = unit(n, k, seed)
        answer = vtprune.create("scope", alpha=alpha, combine=combine, features=features, heads=3)(v)
        compared = v.signals[HIDDEN] if features == "hidden" else v.x
        expected = oracle(compared, v.signals[CLS] * 3, k, alpha, combine)
        assert answer.order is not None
        assert answer.order.tolist() == expected
        assert answer.idx.tolist() == sorted(expected)


def test_heads_make_a_difference_where_attention_is_added() -> None:
    v = unit(40, 12)

    def order(**options: Any) -> list[int]:
        found = vtprune.create("scope", **options)(v).order
        assert found is not None
        return found.tolist()

    assert order(heads=16) == order()
    assert order(combine="add", heads=16) != order(combine="add")
    assert order(alpha=0.0) == oracles.facility(oracles.facility_matrix(v.signals[HIDDEN]), 12, slack=3e-7)


def test_ties_and_attention_of_zero_keep_the_budget() -> None:
    for seed in range(3):
        for k in (1, 10, 29, 30):
            answer = vtprune.create("scope")(unit(30, k, seed, levels=3))
            assert len(set(answer.idx.tolist())) == k
    v = unit(30, 9)
    same = Visual(torch.ones(30, 5), 9, signals={CLS: torch.ones(30), HIDDEN: torch.ones(30, 7)})
    assert vtprune.create("scope")(same).idx.tolist() == list(range(9))
    half = Visual(v.x, 9, signals={CLS: v.signals[CLS], HIDDEN: v.signals[HIDDEN].bfloat16()})
    full = Visual(v.x, 9, signals={CLS: v.signals[CLS], HIDDEN: v.signals[HIDDEN].bfloat16().float()})
    assert torch.equal(vtprune.create("scope")(half).idx, vtprune.create("scope")(full).idx)


def test_what_the_tower_does_not_show_is_replaced_or_refused() -> None:
    v = unit(20, 6)
    plain = Visual(v.x, 6, signals={CLS: v.signals[CLS]})
    assert torch.equal(vtprune.create("scope")(plain).idx, vtprune.create("scope", features="projected")(plain).idx)
    assert "projected tokens are compared" in plain.state["note"]
    with pytest.raises(UnsupportedModel, match=r"scope needs hidden.*features_fallback='features'"):
        vtprune.create("scope", features_fallback="error")(plain)
    with pytest.raises(UnsupportedModel, match=r"CLS token.*fallback='received'"):
        vtprune.create("scope", fallback="error")(Visual(v.x, 6))
    received = Visual(v.x, 6, signals={Signal("received", None, without_cls=True): v.signals[CLS]})
    assert torch.equal(vtprune.create("scope")(received).idx, vtprune.create("scope")(plain).idx)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0: use a finite number >= 0"),
        ({"combine": "multi"}, "combine='multi': choose 'multiply' or 'add'"),
        ({"heads": 0}, "heads=0"),
        ({"features": "keys"}, "features='keys': choose 'hidden' or 'projected'"),
        ({"features_fallback": "none"}, "features_fallback='none'"),
        ({"memory": "much"}, "memory='much'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create("scope", **options)
