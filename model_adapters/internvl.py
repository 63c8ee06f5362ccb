"""InternVL: tiles of one size, side by side in the prompt, whose patches are shuffled into tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .entries import Unit, join_runs
from .family import Family, family
from .tower_layout import Layout, TowerCall, patches, pool


def _side(base: Any) -> int:
    return round(1 / base.config.downsample_ratio)


def _shuffled(f: TowerCall, x: Tensor) -> Tensor:
    return pool(patches(f, x), _side(f.base)).flatten(0, 1)


@family
class InternVL(Family):
    tested = ("internvl",)
    note = "the tiles of an image are one unit, and a video is written as images"
    image_layout = Layout(_shuffled, _side)

    def units(self, modality: str, units: list[Unit]) -> list[Unit]:
        return join_runs(units) if modality == "image" else units
