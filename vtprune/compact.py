"""The old import path of `vtprune.core.compaction` and `vtprune.core.masks`."""

from .core.compaction import Compaction
from .core.masks import (
    allowed,
    causal_mask,
    hidden_like,
    hide,
    in_window,
    mask_for,
    mask_of,
    reach_back,
    tensor_mask,
    visible,
)

__all__ = [
    "Compaction",
    "allowed",
    "causal_mask",
    "hidden_like",
    "hide",
    "in_window",
    "mask_for",
    "mask_of",
    "reach_back",
    "tensor_mask",
    "visible",
]
