"""PaliGemma: square images of one size; the base model builds the masks."""

from __future__ import annotations

from .family import Family, family
from .tower_layout import Layout, every_token


@family
class PaliGemma(Family):
    tested = ("paligemma",)
    note = "the prompt is read in both directions"
    masks_in_base = True
    image_layout = Layout(every_token)
