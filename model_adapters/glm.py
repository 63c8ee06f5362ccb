"""GLM-4.1V and GLM-4.6V: images of any size, merged in the tower; the frames of a video are written as images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .family import Family, family
from .tower_layout import CONSECUTIVE


def _before_merging(tower: Any) -> Any:
    return tower.post_layernorm  # the tower's own output is merged already


_MERGED = replace(CONSECUTIVE, states=_before_merging)


@family
class Glm(Family):
    tested = ("glm4v",)
    same_shape = ("glm46v",)
    note = "the frames of a video are written with the token of images"
    video_token = "image"
    image_layout = video_layout = _MERGED
