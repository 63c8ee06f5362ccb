"""The old import path of `vtprune.hf.cache` and `vtprune.hf.past`; pickled caches name `vtprune.cache._rebuild`."""

from .hf.cache import (
    COUNTS_LEFT,
    NAME,
    Pruned,
    _rebuild,
    is_static,
    reference_layer,
    renamed,
    roll_back,
    shrink,
    state,
    stored,
)
from .hf.past import past_mask, past_mask_2d

__all__ = [
    "COUNTS_LEFT",
    "NAME",
    "Pruned",
    "_rebuild",
    "is_static",
    "past_mask",
    "past_mask_2d",
    "reference_layer",
    "renamed",
    "roll_back",
    "shrink",
    "state",
    "stored",
]
