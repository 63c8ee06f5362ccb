"""Pruning methods, one file each; they know tensors and no models."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Literal, get_args

from torch import Tensor

from .. import registry
from ..kernels import best_first as best_first
from ..types import Assignment, Method, Signal, UnsupportedModel, Visual

Fallback = Literal["received", "error"]


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


def signal_of(v: Visual, wanted: Signal, name: str) -> Tensor:
    """A signal of the unit in float32; ValueError if the seam did not provide it."""
    if wanted not in v.signals:
        given = ", ".join(map(str, v.signals)) or "none"
        raise ValueError(f"{name} needs the signal {wanted}, but the unit carries {given}: add it to Visual.signals")
    return v.signals[wanted].float()


def cls_needs(layer: int | float | None, fallback: Fallback) -> tuple[Signal, ...]:
    """What `cls_attention` reads: the fallback costs nothing on towers with a CLS token."""
    cls = Signal("cls", layer)
    return (cls,) if fallback == "error" else (cls, Signal("received", layer, without_cls=True))


def cls_attention(v: Visual, layer: int | float | None, fallback: Fallback, name: str) -> Tensor:
    """[N] float32: the CLS row of a tower layer, or what stands in for it on towers without a CLS token.

    fallback: "received" takes the mean attention that every token receives, noted in `Visual.state["note"]`;
        "error" raises UnsupportedModel.
    """
    cls = Signal("cls", layer)
    if cls in v.signals:
        return v.signals[cls].float()
    if fallback == "error":
        raise UnsupportedModel(
            f"{name} needs the attention of a CLS token, and this tower has none: pass fallback='received' to rank by "
            "the attention every token receives"
        )
    received = Signal("received", layer, without_cls=True)
    if received not in v.signals:
        given = ", ".join(map(str, v.signals)) or "none"
        raise ValueError(
            f"{name} needs the signal {cls}, or on a tower without a CLS token {received}, but the unit carries "
            f"{given}: add one of them to Visual.signals"
        )
    v.state["note"] = f"{name}: the tower has no CLS token, the attention every token receives is used instead"
    return v.signals[received].float()


def check_cosine(name: str, value: float) -> None:
    """Raise ValueError unless the option is a cosine similarity."""
    if not -1.0 <= value <= 1.0:
        raise ValueError(f"{name}={value}: use a cosine similarity, -1..1")


def check_counts(**options: int) -> None:
    """Raise ValueError unless each option is an int >= 1."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: use an int >= 1")


def check_fallback(fallback: str) -> None:
    """Raise ValueError unless it is a fallback that `cls_attention` knows."""
    if fallback not in ("received", "error"):
        raise ValueError(f"fallback={fallback!r}: choose 'received' or 'error'")
