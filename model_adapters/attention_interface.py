"""Which modules call the attention interface of transformers, by which one attention function stands for another."""

from __future__ import annotations

from typing import Any

from torch import nn


def interface_of(module: nn.Module) -> dict[str, Any] | None:
    """Globals of the modelling file whose code sends `module` through the attention interface, or None."""
    if getattr(module, "config", None) is None:
        return None
    for cls in type(module).__mro__:
        forward: Any = cls.__dict__.get("forward")
        while hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
        code = getattr(forward, "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return forward.__globals__
    return None
