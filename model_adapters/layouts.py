"""Where the rasters lie inside the visual tokens of an image or a video, family by family."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch

from vtprune.types import Span


def spans_of(
    base: Any, model_type: str, modality: str, call: dict[str, Any], sizes: Sequence[int]
) -> list[tuple[Span, ...]]:
    """Spans of every entry of a feature call; an empty tuple where the raster is unknown.

    call: bound arguments of the feature call; sizes: tokens per entry.
    """
    grid = call.get(f"{modality}_grid_thw")
    if grid is not None and len(grid) == len(sizes):
        return [_grid(base, thw, n) for thw, n in zip(_ints(grid), sizes)]
    if modality == "video":
        pixels = call.get("pixel_values_videos", call.get("pixel_values"))  # the name in 5.17 is that of images
        frames = pixels.shape[1] if torch.is_tensor(pixels) and pixels.dim() == 5 else 0
        each = _frame_tokens(base, model_type)
        return [_frames(n, frames or (n // each if each else 0)) for n in sizes]
    image_sizes = call.get("image_sizes")
    if hasattr(base, "pack_image_features") and image_sizes is not None:
        return [_mosaic(base, n, s, call) for n, s in zip(sizes, _sizes(image_sizes))]
    if model_type == "mistral3" and image_sizes is not None:
        return [_checked((1, h, w), n) for (h, w), n in zip(_merged(base, image_sizes), sizes)]
    if model_type in ("smolvlm", "idefics3"):
        config = base.config
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return [tuple(Span(i, (1, side, side)) for i in range(0, n, side * side)) for n in sizes]
    return [_square(n) for n in sizes]


def is_told(base: Any, model_type: str, modality: str, call: dict[str, Any]) -> bool:
    """Whether rasters can be told from the number of tokens and what `call` says of the grids, without any pixels."""
    if hasattr(base.config.vision_config, "spatial_merge_size") or call.get(f"{modality}_grid_thw") is not None:
        return call.get(f"{modality}_grid_thw") is not None
    if modality == "video":
        return _frame_tokens(base, model_type) > 0
    if hasattr(base, "pack_image_features") or model_type == "mistral3":
        return call.get("image_sizes") is not None
    return True


def sizes_told(base: Any, model_type: str, modality: str, call: dict[str, Any]) -> list[int] | None:
    """Tokens of every image or video of the call as its grids tell them; None where it says nothing of them."""
    grid, image_sizes = call.get(f"{modality}_grid_thw"), call.get("image_sizes")
    merge = getattr(base.config.vision_config, "spatial_merge_size", None)
    if grid is not None and merge:
        return [t * h * w // merge**2 for t, h, w in _ints(grid)]
    if modality == "video" or image_sizes is None:
        return None
    if hasattr(base, "pack_image_features"):
        return [len(_packed(base, size, call.get("vision_aspect_ratio"))) for size in _sizes(image_sizes)]
    if model_type == "mistral3":
        return [h * w for h, w in _merged(base, image_sizes)]
    return None


def _ints(grid: Any) -> list[list[int]]:
    return torch.as_tensor(grid).tolist()


def _sizes(image_sizes: Any) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in torch.as_tensor(image_sizes).tolist()]


def _merged(base: Any, image_sizes: Any) -> list[tuple[int, int]]:
    """Pixtral: rows and columns of merged patches."""
    cell = base.config.vision_config.patch_size * base.config.spatial_merge_size
    return [(h // cell, w // cell) for h, w in _sizes(image_sizes)]


def _frame_tokens(base: Any, model_type: str) -> int:
    """Tokens of a frame where the family fixes them; 0 where it does not."""
    vision = base.config.vision_config
    if model_type == "llava_onevision":  # the two halves of a side round up
        return (-(-(vision.image_size // vision.patch_size) // 2)) ** 2
    if model_type == "llava_next_video":
        return (vision.image_size // vision.patch_size // base.config.spatial_pool_stride) ** 2
    return 0


def _checked(grid: tuple[int, int, int], n: int) -> tuple[Span, ...]:
    return (Span(0, grid),) if grid[0] * grid[1] * grid[2] == n else ()


def _square(n: int) -> tuple[Span, ...]:
    side = isqrt(n)
    return (Span(0, (1, side, side)),) if side * side == n else ()


def _grid(base: Any, thw: Sequence[int], n: int) -> tuple[Span, ...]:
    """Patch grids (t, h, w) of the Qwen kind; the tower merges m x m patches into a token."""
    t, h, w = (int(v) for v in thw)
    merge = getattr(base.config.vision_config, "spatial_merge_size", None) or (isqrt(t * h * w // n) if n else 1)
    return _checked((t, h // merge, w // merge), n)


def _frames(n: int, frames: int) -> tuple[Span, ...]:
    """Equal square frames; a class token before each frame or one newline at the very end may stand beside them."""
    if not frames:
        return ()
    each, rest = divmod(n, frames)
    side = isqrt(each)
    if side * side == each and rest <= 1:
        return (Span(0, (frames, side, side)),)
    side = isqrt(each - 1) if each else 0
    if side and side * side == each - 1 and rest == 0:
        return tuple(Span(i * each + 1, (1, side, side)) for i in range(frames))
    return ()


def _mosaic(base: Any, n: int, size: tuple[int, int], call: dict[str, Any]) -> tuple[Span, ...]:
    """Any-resolution images: the overview, then a mosaic whose rows end with a newline token.

    The model's own packing tells what falls where: it packs the number of each crop, and -1 for newlines.
    """
    vision = base.config.vision_config
    side = vision.image_size // vision.patch_size
    if n == side * side + 1:  # overview and one newline
        return (Span(0, (1, side, side)),)
    packed, start = _packed(base, size, call.get("vision_aspect_ratio")), side * side
    marks = (packed == -1).nonzero().flatten().tolist()
    if packed.shape[0] != n or not marks:
        return _square(n)
    width, overview = marks[0] - start, Span(0, (1, side, side))
    if not width:  # the unpadding of a very tall image may leave the newlines alone: they stand in no raster
        return (overview,)
    mosaic = packed[start:].view(-1, width + 1)[:, :width]
    return (overview, Span(start, (1, len(mosaic), width), newline=True, tiles=_tiles(mosaic)))


def _packed(base: Any, size: tuple[int, int], aspect_ratio: str | None) -> torch.Tensor:
    """[n] float32: which crop each token of an image is of, as the model's own code packs it; -1 for newlines."""
    side = base.config.vision_config.image_size // base.config.vision_config.patch_size
    crops = torch.arange(_tile_count(base, size) + 1, dtype=torch.float32)
    packing = {
        "vision_feature_select_strategy": "default",
        "image_newline": -torch.ones(1),
        # A limit above which mosaics shrink.
        "vision_aspect_ratio": aspect_ratio or getattr(base.config, "vision_aspect_ratio", None),
    }
    known = inspect.signature(base.pack_image_features).parameters
    flat, _ = base.pack_image_features(
        [crops[:, None, None].expand(-1, side * side, 1)],
        torch.tensor([size]),
        **{name: value for name, value in packing.items() if name in known},
    )
    return flat[0][:, 0]


def _tiles(mosaic: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[()]:
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
