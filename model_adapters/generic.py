"""The old place of `Adapter` and of units and features; kept so that older imports go on working."""

from __future__ import annotations

from typing import Any

from vtprune.core.units import Unit, runs_of

from .base import Adapter
from .entries import MODALITIES, Features
from .family import families, model_types

__all__ = ["MODALITIES", "Adapter", "Features", "Unit", "runs_of"]


def __getattr__(name: str) -> Any:
    """TESTED and SAME_SHAPE, the model types of those statuses; REFUSED, those that are refused, with the reason."""
    if name in ("TESTED", "SAME_SHAPE"):
        return model_types("tested" if name == "TESTED" else "same shape")
    if name == "REFUSED":
        return {known.model_type: known.note for known in families() if known.status == "refused"}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
