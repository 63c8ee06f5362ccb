"""Idefics3 and SmolVLM: tiles of one size with text between them, so that each tile is a unit."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtprune.core.visual import Span

from .entries import Features, Unit, by_tile, split_runs
from .family import Family, family
from .tower_layout import Layout, TowerCall, pool


def _side(base: Any) -> int:
    return base.connector.scale_factor


def _shuffled(f: TowerCall, x: Tensor) -> Tensor:
    return pool(x, _side(f.base)).flatten(0, 1)


@family
class Idefics(Family):
    tested = ("idefics3", "smolvlm")
    note = "each tile is a unit, because text stands between tiles"
    image_layout = Layout(_shuffled, _side)

    def image_spans(self, base: Any, n: int) -> tuple[Span, ...]:
        config = base.config
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return tuple(Span(i, (1, side, side)) for i in range(0, n, side * side))

    def entries(self, modality: str, features: Features, total: int) -> Features:
        return by_tile(features)  # an entry is all that a row of pixels holds, which may be several samples

    def units(self, modality: str, units: list[Unit]) -> list[Unit]:
        return split_runs(units)
