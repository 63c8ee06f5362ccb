"""What a method reads of a `Visual`: its budget and its signals, or an error that says what is missing."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .errors import UnsupportedModel
from .signal import Signal
from .visual import Visual

Fallback = Literal["received", "error"]


def budget_of(v: Visual, name: str) -> int:
    """The number of tokens to keep; ValueError if nobody gave one or the unit has fewer tokens."""
    if v.budget is None:
        raise ValueError(f"{name} does not choose its own budget: pass keep=..., a share in (0, 1] or a count >= 1")
    if not 1 <= v.budget <= v.x.shape[0]:
        raise ValueError(f"budget={v.budget}: {name} can keep 1..{v.n} tokens of this unit")
    return v.budget


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
    v.state["note"] = no_cls_note(name)
    return v.signals[received].float()


def no_cls_note(name: str) -> str:
    """What is said where `received` stands in for a CLS token."""
    return f"{name}: the tower has no CLS token, the attention every token receives is used instead"
