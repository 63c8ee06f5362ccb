"""Pruning methods, one file each; they know tensors and no models."""

from __future__ import annotations

import sys
from types import ModuleType

from torch import Tensor

from .. import registry
from ..types import Assignment, Method, Visual


class _CallablePackage(ModuleType):
    """Importing a subpackage binds it over `vtprune.methods`, the function; so the package answers the call as well."""

    def __call__(self) -> list[type[Method]]:
        return registry.methods()


sys.modules[__name__].__class__ = _CallablePackage


def budget_of(v: Visual, name: str) -> int:
    """The number of tokens to keep; ValueError if nobody gave one or the unit has fewer tokens."""
    if v.budget is None:
        raise ValueError(f"{name} does not choose its own budget: pass keep=..., a share in (0, 1] or a count >= 1")
    if not 1 <= v.budget <= v.n:
        raise ValueError(f"budget={v.budget}: {name} can keep 1..{v.n} tokens of this unit")
    return v.budget


def select(order: Tensor, scores: Tensor | None = None) -> Assignment:
    """Keep the tokens of `order` [K], picked in that order, as they are."""
    return Assignment(idx=order.sort().values, order=order, scores=scores)
