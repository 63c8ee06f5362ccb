"""Which patches of a vision tower become which visual token, and where its blocks are."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn

from vtprune.core.errors import UnsupportedCall, UnsupportedModel

from .tower_layout import Layout, Modality, TowerCall, square_grid, squares
from .towers import attention_modules, has_cls


@dataclass(frozen=True)
class TowerTokens:
    """The patches of one row of a tower's batch, by the visual token that they become.

    groups: [M, g] int64, positions in the tower's sequence of the g patches of each of M tokens, in raster order.
    prefix: tokens before the patches (CLS). grids: (t, h, w) in tokens, or None, of every image side by side in the
    row; towers that do not pack have one.
    """

    groups: Tensor
    prefix: int
    grids: tuple[tuple[tuple[int, int, int] | None, int], ...]


def tokens_of(f: TowerCall, layout: Layout, modality: Modality, length: int) -> TowerTokens:
    """The tokens of a tower call whose sequence is `length` long.

    Raises UnsupportedCall if patches of the tower do not fall into whole tokens.
    """
    if layout.packed:
        return _packed(f, layout, length)
    family, prefix = f.base.config.model_type, int(has_cls(f.tower))
    side, n = layout.side(f.base), length - prefix
    width = isqrt(n)
    if side == 1:
        return TowerTokens(torch.arange(n)[:, None] + prefix, prefix, ((square_grid(n), n),))
    if width * width != n or width % side:
        raise UnsupportedCall(
            f"{family} pools {modality} patches {side} x {side}, and its tower's {n} patches do not divide into whole "
            "squares, so a stage inside the tower cannot drop whole tokens: use a stage before the LLM"
        )
    return TowerTokens(squares(1, width, width, side) + prefix, prefix, ((square_grid(n // side**2), n // side**2),))


def _packed(f: TowerCall, layout: Layout, length: int) -> TowerTokens:
    assert layout.packed is not None
    found = layout.packed(f, length)
    if found.groups.numel() != length:
        raise UnsupportedCall(
            f"{f.base.config.model_type}: {found.groups.numel()} patches by the image grids against {length} in the "
            f"tower; sides that {found.side} does not divide cannot be pruned in the tower, use a stage before the LLM"
        )
    return TowerTokens(found.groups, 0, tuple((grid, grid[0] * grid[1] * grid[2]) for grid in found.grids))


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a tower; UnsupportedModel if none hold its attention modules one by one."""
    attention = attention_modules(tower)
    for found in tower.modules():
        if isinstance(found, nn.ModuleList) and len(found) == len(attention) > 0:
            held = [set(block.modules()) for block in found]
            if all(a in parts for a, parts in zip(attention, held)):
                return found
    raise UnsupportedModel(
        f"{type(tower).__name__} has no list of blocks with one readable attention module each, so tokens cannot be "
        "dropped between them; use a stage before the LLM ('llm')"
    )
