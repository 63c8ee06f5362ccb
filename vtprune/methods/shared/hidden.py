"""The states that the projector reads, or the projected tokens where those cannot be read."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...core.errors import UnsupportedModel
from ...core.signal import Signal
from ...core.visual import Visual
from .text import note

FeaturesFallback = Literal["features", "error"]


def hidden_need(fallback: FeaturesFallback) -> tuple[Signal, ...]:
    """The signal that `hidden_states` reads."""
    return (Signal("hidden", None, optional=fallback == "features"),)


def hidden_states(v: Visual, fallback: FeaturesFallback, name: str) -> Tensor:
    """[N, C]: the tower's states as the projector reads them; fallback "features" takes v.x [N, D] without any.

    fallback: "features" notes in `Visual.state["note"]` what was taken; "error" raises UnsupportedModel.
    """
    (need,) = hidden_need(fallback)
    if need in v.signals:
        return v.signals[need]
    if fallback == "error":
        raise UnsupportedModel(
            f"{name} needs {need}, and it is not there to be read: pass features_fallback='features', which compares "
            "the projected tokens"
        )
    note(v, f"{name}: the states of the vision tower are not there to be read, so the projected tokens are compared")
    return v.x
