"""The budget of one request: two names, each with one meaning, and errors that say so."""

from __future__ import annotations

from typing import Any

import pytest

import vtprune
from vtprune.integrations.budget import keep_of, with_budget

RECIPE = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25))


@pytest.mark.parametrize(
    ("given", "keep"),
    [
        ({}, None),
        ({"keep_ratio": None}, None),
        ({"keep_ratio": 0.5}, 0.5),
        ({"keep_ratio": 1}, 1.0),
        ({"keep_tokens": 1}, 1),
        ({"keep_tokens": 10**6}, 10**6),
    ],
)
def test_what_a_request_may_name(given: dict[str, Any], keep: float | int | None) -> None:
    found = keep_of(given)
    assert found == keep
    assert type(found) is type(keep)  # 1.0 keeps all, 1 keeps one token


@pytest.mark.parametrize(
    "given",
    [
        {"keep_ratio": 0},
        {"keep_ratio": -0.5},
        {"keep_ratio": 1.5},
        {"keep_ratio": float("nan")},
        {"keep_ratio": float("inf")},
        {"keep_ratio": "0.5"},
        {"keep_ratio": True},
        {"keep_ratio": [0.5]},
        {"keep_tokens": 0},
        {"keep_tokens": -3},
        {"keep_tokens": 8.0},
        {"keep_tokens": float("nan")},
        {"keep_tokens": "8"},
        {"keep_tokens": True},
        {"keep_ratio": 0.5, "keep_tokens": 8},
    ],
)
def test_what_is_no_budget(given: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"keep_ratio|keep_tokens"):
        keep_of(given)


def test_the_budget_replaces_that_of_the_recipe() -> None:
    assert with_budget(RECIPE, {}) is RECIPE
    (stage,) = with_budget(RECIPE, {"keep_tokens": 9}).stages
    assert (stage.keep, stage.keep_total) == (9, None)
    shared = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep_total=0.25))
    (stage,) = with_budget(shared, {"keep_ratio": 0.5}).stages
    assert (stage.keep, stage.keep_total) == (None, 0.5)


def test_one_number_does_not_tell_the_budgets_of_several_stages() -> None:
    two = vtprune.Recipe((*RECIPE.stages, vtprune.Stage(2, vtprune.create("fastv"), keep=0.1)))
    assert with_budget(two, {}) is two
    with pytest.raises(ValueError, match="2 stages"):
        with_budget(two, {"keep_ratio": 0.5})
