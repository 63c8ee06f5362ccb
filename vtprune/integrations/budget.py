"""The budget that one request names, `keep_ratio` or `keep_tokens`, in place of that of the recipe in force.

Two names and no number of two meanings: JSON writes 1.0 and 1 alike, and one would be all tokens, the other one token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..recipe import Recipe

NAMES = ("keep_ratio", "keep_tokens")
WAYS = "use keep_ratio, a number in (0, 1], or keep_tokens, an integer >= 1"


def keep_of(given: Mapping[str, Any]) -> float | int | None:
    """The budget among the options of a request as `Stage` takes it; None where the request names none.

    keep_ratio is a share of the visual tokens of a unit, keep_tokens their number (more than there are keeps all).
    Raises TypeError and ValueError for both at once and for a value that is no budget.
    """
    named = [name for name in NAMES if given.get(name) is not None]
    if not named:
        return None
    if len(named) > 1:
        raise ValueError(f"keep_ratio={given['keep_ratio']!r} and keep_tokens={given['keep_tokens']!r}: name one")
    name, value = named[0], given[named[0]]
    kinds = (int, float) if name == "keep_ratio" else (int,)
    if type(value) not in kinds:
        raise TypeError(f"{name}={value!r:.80} is a {type(value).__name__}: {WAYS}")
    if name == "keep_tokens" and value >= 1:
        return int(value)
    if name == "keep_ratio" and math.isfinite(value) and 0 < value <= 1:
        return float(value)
    raise ValueError(f"{name}={value!r:.80} is outside the valid range: {WAYS}")


def with_budget(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe with the budget that the options of a request name. Raises as `keep_of` and `with_keep`."""
    return with_keep(recipe, keep_of(given))


def with_keep(recipe: Recipe, keep: float | int | None) -> Recipe:
    """The recipe with another budget; the recipe itself for None.

    Raises ValueError for a recipe of several stages, whose budgets one number does not tell.
    """
    if keep is None:
        return recipe
    if len(recipe.stages) > 1:
        raise ValueError(
            f"the recipe in force has {len(recipe.stages)} stages, each with a budget of its own, and a request names "
            "one: leave keep_ratio and keep_tokens out, or serve a recipe of one stage"
        )
    (stage,) = recipe.stages
    named: dict[str, Any] = {"keep" if stage.keep_total is None else "keep_total": keep}
    return Recipe((dataclasses.replace(stage, **named),))
