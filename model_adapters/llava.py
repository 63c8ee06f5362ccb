"""LLaVA-1.5 and its kin: square images of one size; with a Pixtral tower, images of any size."""

from __future__ import annotations

from typing import Any

from .family import Family, family
from .tower_layout import BY_IMAGE_SIZE, Layout, Modality, every_patch, tower_of


@family
class Llava(Family):
    tested = ("llava",)
    same_shape = ("vipllava",)
    note = "an image is one square raster"
    image_layout = Layout(every_patch)

    def layout(self, base: Any, modality: Modality) -> Layout | None:
        pixtral = modality == "image" and tower_of(base, modality).config.model_type == "pixtral"
        return BY_IMAGE_SIZE if pixtral else super().layout(base, modality)
