"""The old place of `vit_blocks`, `vit_signals` and `vit_pooling`; kept so that older imports go on working."""

from .vit_blocks import BLOCKS, PREFIX, REFUSED, ROPE, WORKING, Given, Parts, Vit, vit_of
from .vit_pooling import Sizes, cut_masks, masked_mean, real_tokens, weigh_rows, weighted_pooling
from .vit_signals import WHOLE_BATCH, Attention, Part, watch

__all__ = [
    "BLOCKS",
    "PREFIX",
    "REFUSED",
    "ROPE",
    "WHOLE_BATCH",
    "WORKING",
    "Attention",
    "Given",
    "Part",
    "Parts",
    "Sizes",
    "Vit",
    "cut_masks",
    "masked_mean",
    "real_tokens",
    "vit_of",
    "watch",
    "weigh_rows",
    "weighted_pooling",
]
