"""Pruning methods, one file each; they know tensors and no models."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, get_args

from torch import Tensor

from .. import registry
from ..core.method import Method
from ..core.reading import Fallback as Fallback
from ..core.reading import budget_of as budget_of
from ..core.reading import cls_attention as cls_attention
from ..core.reading import cls_needs as cls_needs
from ..core.reading import signal_of as signal_of
from ..core.visual import Assignment
from ..kernels import best_first as best_first


class _CallablePackage(ModuleType):
    """Importing a subpackage binds it over `vtprune.methods`, the function; so the package answers the call as well."""

    def __call__(self) -> list[type[Method]]:
        return registry.methods()


sys.modules[__name__].__class__ = _CallablePackage


def check_choices(method: Method, **options: Any) -> None:
    """Raise ValueError unless each option of the method is a value of the Literal named for it."""
    for name, literal in options.items():
        value, valid = getattr(method, name), get_args(literal)
        if value not in valid:
            raise ValueError(f"{name}={value!r}: choose {' or '.join(map(repr, valid))}")


def select(order: Tensor, scores: Tensor | None = None) -> Assignment:
    """Keep the tokens of `order` [K], picked in that order, as they are."""
    return Assignment(idx=order.sort().values, order=order, scores=scores)


def check_cosine(name: str, value: float) -> None:
    """Raise ValueError unless the option is a cosine similarity."""
    if not -1.0 <= value <= 1.0:
        raise ValueError(f"{name}={value}: use a cosine similarity, -1..1")


def check_counts(**options: int) -> None:
    """Raise ValueError unless each option is an int >= 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: use an int >= 1")


def check_parts(**options: float) -> None:
    """Raise ValueError unless each option is a share in [0, 1]."""
    for name, value in options.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value}: use a share in [0, 1]")


def check_fallback(fallback: str) -> None:
    """Raise ValueError unless it is a fallback that `cls_attention` knows."""
    if fallback not in ("received", "error"):
        raise ValueError(f"fallback={fallback!r}: choose 'received' or 'error'")
