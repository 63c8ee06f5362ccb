"""Mistral 3 with its Pixtral tower: images of any size, of which the projector merges squares of patches."""

from __future__ import annotations

from typing import Any

from vtprune.core.visual import Span

from .family import Family, family
from .rasters import checked
from .tower_layout import BY_IMAGE_SIZE, Call


@family
class Mistral3(Family):
    tested = ("mistral3",)
    note = "an image is a raster of its own size"
    uses_image_sizes = True
    image_layout = BY_IMAGE_SIZE

    def sized_spans(self, base: Any, n: int, size: tuple[int, int], call: Call) -> tuple[Span, ...]:
        return checked((1, *_merged(base, size)), n)

    def sized_tokens(self, base: Any, size: tuple[int, int], call: Call) -> int:
        h, w = _merged(base, size)
        return h * w


def _merged(base: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of merged patches."""
    cell = base.config.vision_config.patch_size * base.config.spatial_merge_size
    return size[0] // cell, size[1] // cell
