"""Which patches of a vision tower become which visual token, and where its blocks are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.types import UnsupportedCall, UnsupportedModel

from .towers import Layout, Modality, TowerCall, attention_modules, has_cls

# Side of the square of patches that one visual token is made of, in towers whose batch rows are crops; elsewhere 1.
POOLED: dict[tuple[str, Modality], Callable[[Any], int]] = {
    ("llava_next_video", "video"): lambda base: base.config.spatial_pool_stride,
    ("llava_onevision", "video"): lambda base: 2,
    ("internvl", "image"): lambda base: round(1 / base.config.downsample_ratio),
    ("smolvlm", "image"): lambda base: base.connector.scale_factor,
    ("idefics3", "image"): lambda base: base.connector.scale_factor,
    ("gemma3", "image"): lambda base: base.multi_modal_projector.kernel_size,
}


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
        return _packed(f, length)
    family, prefix = f.base.config.model_type, int(has_cls(f.tower))
    side, n = POOLED.get((family, modality), lambda base: 1)(f.base), length - prefix
    width = isqrt(n)
    if side == 1:
        return TowerTokens(torch.arange(n)[:, None] + prefix, prefix, ((_square(n), n),))
    if width * width != n or width % side:
        raise UnsupportedCall(
            f"{family} pools {modality} patches {side} x {side}, and its tower's {n} patches do not divide into whole "
            "squares, so a stage inside the tower cannot drop whole tokens: use a stage before the LLM"
        )
    return TowerTokens(_squares(1, width, width, side) + prefix, prefix, ((_square(n // side**2), n // side**2),))


def _square(n: int) -> tuple[int, int, int] | None:
    return (1, isqrt(n), isqrt(n)) if isqrt(n) ** 2 == n else None


def _squares(t: int, h: int, w: int, side: int) -> Tensor:
    """[t * h/side * w/side, side^2]: raster positions of every side x side square of t frames of h x w patches."""
    ids = torch.arange(t * h * w).view(t, h // side, side, w // side, side)
    return ids.transpose(2, 3).reshape(-1, side * side)


def _packed(f: TowerCall, length: int) -> TowerTokens:
    grid = f.call.get(f.grid)
    if grid is None:  # Pixtral: images of any size, each a raster
        side, patch = getattr(f.base.config, "spatial_merge_size", 1), f.tower.patch_size
        shapes = [(1, int(h) // patch, int(w) // patch) for h, w in f.call["image_sizes"]]
        starts = torch.tensor([0, *[t * h * w for t, h, w in shapes]]).cumsum(0).tolist()
        groups = torch.cat([_squares(*shape, side) + start for shape, start in zip(shapes, starts)])
    else:
        side = f.tower.spatial_merge_size
        shapes = [(int(t), int(h), int(w)) for t, h, w in grid.tolist()]
        groups = torch.arange(length).view(-1, side * side)
        if hasattr(f.tower, "window_size"):
            groups = groups[torch.argsort(_window_index(f.tower, grid))]
    if groups.numel() != length:
        raise UnsupportedCall(
            f"{f.base.config.model_type}: {groups.numel()} patches by the image grids against {length} in the tower; "
            f"sides that {side} does not divide cannot be pruned in the tower, use a stage before the LLM"
        )
    sizes = [(t, h // side, w // side) for t, h, w in shapes]
    return TowerTokens(groups, 0, tuple((size, size[0] * size[1] * size[2]) for size in sizes))


def _window_index(tower: Any, grid: Tensor) -> Tensor:
    """Qwen2.5-VL: the merged token at each place of the window order."""
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )
    return index.cpu()


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
