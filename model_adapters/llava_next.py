"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: an overview of the image, then a mosaic of tiles.

The rows of the mosaic end with a newline token. The model's own packing tells what falls where.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.core.visual import Span

from .entries import Features, with_newline
from .family import Family, family
from .rasters import square
from .tower_layout import Call, Layout, TowerCall, patches, pool


def _tiles_of_images(f: TowerCall, x: Tensor) -> list[Tensor]:
    """Any-resolution input: the tiles of every image, the base view first."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes, config = f.call["image_sizes"], f.base.config
    images = f.call.get("batch_num_images")
    # LLaVA-OneVision does not tile the images of a prompt that holds several.
    tiled = [True] * len(sizes) if images is None else [n == 1 for n in images for _ in range(n)]
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if tile else 1
        for size, tile in zip(sizes, tiled)
    ]
    return list(patches(f, x).split(counts))


def _mosaic(f: TowerCall, x: Tensor) -> Tensor:
    strategy = f.option("vision_feature_select_strategy")
    newline = x.new_zeros(x.shape[-1])
    packed, _ = f.base.pack_image_features(
        _tiles_of_images(f, x), f.call["image_sizes"], strategy, image_newline=newline
    )
    return torch.cat(packed)


def _mosaic_onevision(f: TowerCall, x: Tensor) -> Tensor:
    packed, _ = f.base.pack_image_features(
        _tiles_of_images(f, x),
        f.call["image_sizes"],
        image_newline=x.new_zeros(x.shape[-1]),
        vision_aspect_ratio=f.option("vision_aspect_ratio"),
    )
    return torch.cat(packed)


def _frames_onevision(f: TowerCall, x: Tensor) -> Tensor:
    frames = f.base.apply_pooling(patches(f, x))
    videos = frames.reshape(len(f.sizes), -1, x.shape[-1])
    return F.pad(videos, (0, 0, 0, 1)).flatten(0, 1)  # the newline that ends each video


def _stride(base: Any) -> int:
    return base.config.spatial_pool_stride


def _two(base: Any) -> int:
    return 2


def _frames(f: TowerCall, x: Tensor) -> Tensor:
    return pool(patches(f, x), _stride(f.base)).flatten(0, 1)


def _patch_side(base: Any) -> int:
    return base.config.vision_config.image_size // base.config.vision_config.patch_size


@family
class LlavaNext(Family):
    tested = ("llava_next",)
    note = "an image is an overview and a mosaic of tiles with newlines"
    uses_image_sizes = True
    image_layout = Layout(_mosaic)

    @staticmethod
    def unpadded(x: Tensor, size: Sequence[int]) -> Tensor:
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        return unpad_image(x, list(size))

    def sized_spans(self, base: Any, n: int, size: tuple[int, int], call: Call) -> tuple[Span, ...]:
        """The overview, then the mosaic."""
        side = _patch_side(base)
        if n == side * side + 1:  # overview and one newline
            return (Span(0, (1, side, side)),)
        packed, start = _packed(base, size, call), side * side
        marks = (packed == -1).nonzero().flatten().tolist()
        if packed.shape[0] != n or not marks:
            return square(n)
        width, overview = marks[0] - start, Span(0, (1, side, side))
        if not width:  # the unpadding of a very tall image may leave the newlines alone: they stand in no raster
            return (overview,)
        mosaic = packed[start:].view(-1, width + 1)[:, :width]
        return (overview, Span(start, (1, len(mosaic), width), newline=True, tiles=_tiles(mosaic)))

    def sized_tokens(self, base: Any, size: tuple[int, int], call: Call) -> int:
        return len(_packed(base, size, call))


@family
class LlavaNextVideo(LlavaNext):
    tested = ("llava_next_video",)
    note = "images as in LLaVA-NeXT; the frames of a video are pooled"
    video_layout = Layout(_frames, _stride)

    def frame_tokens(self, base: Any) -> int:
        return (_patch_side(base) // _stride(base)) ** 2


@family
class LlavaOneVision(LlavaNext):
    tested = ("llava_onevision",)
    note = "images as in LLaVA-NeXT; the frames of a video are pooled, and one newline ends it"
    image_layout = Layout(_mosaic_onevision)
    video_layout = Layout(_frames_onevision, _two, newline=True)

    def frame_tokens(self, base: Any) -> int:
        return (-(-_patch_side(base) // 2)) ** 2  # the two halves of a side round up

    def entries(self, modality: str, features: Features, total: int) -> Features:
        if modality == "video" and total % sum(features.sizes):
            return with_newline(features)  # older transformers (seen: 5.17) append it after encoding
        return features


def _packed(base: Any, size: tuple[int, int], call: Call) -> Tensor:
    """[n] float32: which crop each token of an image is of, as the model's own code packs it; -1 for newlines."""
    side = _patch_side(base)
    crops = torch.arange(_tile_count(base, size) + 1, dtype=torch.float32)
    packing = {
        "vision_feature_select_strategy": "default",
        "image_newline": -torch.ones(1),
        # A limit above which mosaics shrink.
        "vision_aspect_ratio": call.get("vision_aspect_ratio") or getattr(base.config, "vision_aspect_ratio", None),
    }
    known = inspect.signature(base.pack_image_features).parameters
    flat, _ = base.pack_image_features(
        [crops[:, None, None].expand(-1, side * side, 1)],
        torch.tensor([size]),
        **{name: value for name, value in packing.items() if name in known},
    )
    return flat[0][:, 0]


def _tiles(mosaic: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[()]:
    """Heights and widths of the tiles of a mosaic [h, w] of crop numbers; none if it was resized after stitching."""
    heights = mosaic[:, 0].unique_consecutive(return_counts=True)[1]
    widths = mosaic[0].unique_consecutive(return_counts=True)[1]
    first = mosaic[heights.cumsum(0) - 1][:, widths.cumsum(0) - 1]
    if not torch.equal(first.round(), first) or not torch.equal(
        first.repeat_interleave(heights, 0).repeat_interleave(widths, 1), mosaic
    ):
        return ()
    return tuple(heights.tolist()), tuple(widths.tolist())


def _tile_count(base: Any, size: tuple[int, int]) -> int:
    """Tiles beside the overview: those of the grid that transformers picks for this size."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config = base.config
    rows, cols = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return int(rows * cols)
