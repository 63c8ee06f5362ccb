"""How the tokens of a vision tower become the visual tokens that the LLM sees: the parts that families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.core.errors import UnsupportedModel

Modality = Literal["image", "video"]
Call = dict[str, Any]


@dataclass(frozen=True)
class TowerCall:
    """One call of `get_image_features` or `get_video_features`, and what its tower showed.

    base: the VLM's base model. call: the call's bound arguments. grid: name of its grid argument.
    sizes: tokens of every entry of `pooler_output`, as the LLM sees them.
    """

    base: Any
    tower: Any
    call: Call
    grid: str
    sizes: Sequence[int]

    def option(self, name: str) -> Any:
        """An argument of the call; where the call leaves it open, the model's default."""
        value = self.call.get(name)
        return getattr(self.base.config, name) if value is None else value


# Maps [T, N, C] (T tiles of N tower tokens; packed towers: T = 1 and all patches in a row) to [n, C] in the
# order of the LLM's visual tokens, all entries one after the other.
Pack = Callable[[TowerCall, Tensor], Tensor]


@dataclass(frozen=True)
class PackedPatches:
    """Images side by side in one row of patches.

    groups: [M, side^2] int64, positions of the patches of each of M tokens, in raster order. grids: (t, h, w) of every
    image in tokens. side: a token is made of side x side patches.
    """

    groups: Tensor
    grids: list[tuple[int, int, int]]
    side: int


def one(base: Any) -> int:
    """A token is made of one patch."""
    return 1


def itself(tower: Any) -> Any:
    """What the tower puts out is its last hidden state."""
    return tower


@dataclass(frozen=True)
class Layout:
    """How one family lays out the visual tokens of one modality. Its functions must be importable by name.

    pack: carries what the tower's tokens hold over to the visual tokens.
    side: of the base model, the side of the square of patches that one token is made of, where batch rows are crops.
    packed: of a tower that runs many images as one row of patches, the patches of a call of so many patches; None of a
        tower whose batch rows are crops.
    newline: every entry ends with a newline, which transformers 5.17 appends only after the features call.
    states: of the tower, the module whose output is the last hidden state, patch by patch.
    """

    pack: Pack
    side: Callable[[Any], int] = one
    packed: Callable[[TowerCall, int], PackedPatches] | None = None
    newline: bool = False
    states: Callable[[Any], Any] = itself


def patches(f: TowerCall, x: Tensor) -> Tensor:
    """[T, N, C] without the CLS token, if the LLM does not see it."""
    return x[:, 1:] if f.option("vision_feature_select_strategy") == "default" else x


def pool(x: Tensor, kernel: int) -> Tensor:
    """[T, N, C] square tiles -> [T, N / kernel^2, C]: mean over blocks of kernel x kernel patches."""
    side = round(x.shape[1] ** 0.5)
    return F.avg_pool2d(x.mT.unflatten(2, (side, side)), kernel).flatten(2).mT


def every_patch(f: TowerCall, x: Tensor) -> Tensor:
    """Every patch is a token."""
    return patches(f, x).flatten(0, 1)


def every_token(f: TowerCall, x: Tensor) -> Tensor:
    """Every token of the tower is a token of the LLM, the CLS token too."""
    return x.flatten(0, 1)


def consecutive(f: TowerCall, x: Tensor) -> Tensor:
    """Consecutive patches form one token; the tower puts them in that order before its first block."""
    return x[0].unflatten(0, (-1, f.tower.spatial_merge_size**2)).mean(1)


def consecutive_patches(f: TowerCall, length: int) -> PackedPatches:
    """The patches of images whose grids the call gives, those of a token one after the other."""
    side = f.tower.spatial_merge_size
    grids = [(int(t), int(h) // side, int(w) // side) for t, h, w in f.call[f.grid].tolist()]
    return PackedPatches(torch.arange(length).view(-1, side * side), grids, side)


def by_image_size(f: TowerCall, x: Tensor) -> Tensor:
    """Images of any size in one row, each a raster of its own."""
    merge = getattr(f.base.config, "spatial_merge_size", 1)
    grids = [(h // f.tower.patch_size, w // f.tower.patch_size) for h, w in _sizes(f)]
    images = x[0].split([h * w for h, w in grids])
    rasters = (image.T.unflatten(1, grid) for image, grid in zip(images, grids))
    return torch.cat([F.avg_pool2d(raster, merge).flatten(1).T for raster in rasters])


def by_image_size_patches(f: TowerCall, length: int) -> PackedPatches:
    """The patches of images of any size, each a raster."""
    side, patch = getattr(f.base.config, "spatial_merge_size", 1), f.tower.patch_size
    shapes = [(h // patch, w // patch) for h, w in _sizes(f)]
    starts = torch.tensor([0, *[h * w for h, w in shapes]]).cumsum(0).tolist()
    groups = torch.cat([squares(1, h, w, side) + start for (h, w), start in zip(shapes, starts)])
    return PackedPatches(groups, [(1, h // side, w // side) for h, w in shapes], side)


def _sizes(f: TowerCall) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in f.call["image_sizes"]]


def squares(t: int, h: int, w: int, side: int) -> Tensor:
    """[t * h/side * w/side, side^2]: raster positions of every side x side square of t frames of h x w patches."""
    ids = torch.arange(t * h * w).view(t, h // side, side, w // side, side)
    return ids.transpose(2, 3).reshape(-1, side * side)


def square_grid(n: int) -> tuple[int, int, int] | None:
    """(1, s, s) if n is the square of s."""
    return (1, isqrt(n), isqrt(n)) if isqrt(n) ** 2 == n else None


BY_IMAGE_SIZE = Layout(by_image_size, packed=by_image_size_patches)
CONSECUTIVE = Layout(consecutive, packed=consecutive_patches)


def tower_of(base: Any, modality: Modality) -> Any:
    """The vision tower that sees this modality."""
    own = getattr(base, f"{modality}_tower", None)  # some models have one tower each
    tower = base.get_encoder(modality=modality) if own is None else own
    if tower is base:
        raise UnsupportedModel(f"{type(base).__name__} has no vision tower that transformers can name")
    return tower


def sizes_of(output: Any) -> list[int]:
    """Visual tokens of every entry of a features call's output."""
    # An entry is [n, D]; transformers 5.17 gives a video of LLaVA-NeXT-Video as [frames, n, D].
    return [math.prod(entry.shape[:-1]) for entry in output.pooler_output]


def per_entry(f: TowerCall, layout: Layout, modality: Modality, x: Tensor) -> list[Tensor]:
    """What the tower's tokens carry, x [T, N, C], for the visual tokens of every entry, [n, C] each; newlines: 0."""
    rows, sizes = layout.pack(f, x), list(f.sizes)
    if layout.newline and rows.shape[0] == sum(sizes) + len(sizes):
        sizes = [size + 1 for size in sizes]
    if rows.shape[0] != sum(sizes):
        raise UnsupportedModel(
            f"{f.base.config.model_type}: {rows.shape[0]} mapped tokens against {sum(sizes)} visual tokens "
            f"({modality}); this version of transformers lays them out differently, please report it with the model's "
            "config"
        )
    return list(rows.split(sizes))
