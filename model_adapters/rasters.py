"""Where the rasters lie inside the visual tokens of an image or a video: the parts that families share."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch

from vtprune.core.visual import Span


def ints(grid: Any) -> list[list[int]]:
    """The rows of a grid argument as integers of the host."""
    return torch.as_tensor(grid).tolist()


def image_sizes_of(call: dict[str, Any]) -> list[tuple[int, int]] | None:
    """(height, width) in pixels of every image, if the call says them."""
    sizes = call.get("image_sizes")
    return None if sizes is None else [(int(h), int(w)) for h, w in ints(sizes)]


def checked(grid: tuple[int, int, int], n: int) -> tuple[Span, ...]:
    """One raster of that grid; none if it does not have n tokens."""
    return (Span(0, grid),) if grid[0] * grid[1] * grid[2] == n else ()


def square(n: int) -> tuple[Span, ...]:
    """One square raster; none if n is no square."""
    side = isqrt(n)
    return (Span(0, (1, side, side)),) if side * side == n else ()


def merged_grid(base: Any, thw: Sequence[int], n: int) -> tuple[Span, ...]:
    """A grid (t, h, w) of patches of which the tower merges m x m into a token."""
    t, h, w = (int(v) for v in thw)
    merge = getattr(base.config.vision_config, "spatial_merge_size", None) or (isqrt(t * h * w // n) if n else 1)
    return checked((t, h // merge, w // merge), n)


def square_frames(n: int, frames: int) -> tuple[Span, ...]:
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
