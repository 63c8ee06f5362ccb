"""Gemma 3: images of one size, pooled to a square; the base model builds the masks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .family import Family, family
from .tower_layout import Layout, TowerCall, pool

_PER_LAYER = "its per-layer inputs would have to be cut too"


def _side(base: Any) -> int:
    return base.multi_modal_projector.kernel_size


def _pooled(f: TowerCall, x: Tensor) -> Tensor:
    return pool(x, _side(f.base)).flatten(0, 1)


@family
class Gemma(Family):
    tested = ("gemma3",)
    refused: ClassVar = {"gemma3n": _PER_LAYER, "gemma4": _PER_LAYER}
    note = "the prompt is read in both directions inside images"
    masks_in_base = True
    token_types = ("mm_token_type_ids", "token_type_ids")
    image_layout = Layout(_pooled, _side)
