"""Which part of a picture each visual token saw: measured, by showing the processor pictures that tell where they are.

A processor crops, pads, resizes and cuts into tiles, each in its own way. Nothing of that is written here again: a
black, a white and a shaded picture of the same size go through the same processor, and the pixels that come out tell
which place of the picture they came from, and where there is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .types import Span

# Left, top, right and bottom as shares of the picture's width and height; padding lies outside 0..1.
Box = tuple[float, float, float, float]
Look = Callable[[Image.Image], Mapping[str, Any]]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_NEAR = 0.003  # an edge this close to the picture's own is that edge


@dataclass(frozen=True)
class View:
    """One square of pixels that the vision tower gets: what it shows, and which share of it is no padding."""

    box: Box
    filled: float


def boxes(look: Look, size: tuple[int, int], spans: Sequence[Span]) -> list[Box]:
    """What every raster of an image's tokens saw of it, in the order of `spans`.

    look: makes the model's inputs of a picture, as for the prompt that is drawn. size: (width, height) in pixels.
    Raises ValueError where the processor's output cannot be matched with the rasters.
    """
    seen, inputs = views(look, size)
    if len(spans) == len(seen):
        return [view.box for view in seen]
    if len(spans) == 2 and spans[1].newline and len(seen) > 2 and "image_sizes" in inputs:
        return [seen[0].box, _mosaic(seen[1:], spans[0].grid[1], inputs["image_sizes"][0])]
    raise ValueError(
        f"the processor cut this picture into {len(seen)} views and the model made {len(spans)} rasters of tokens: how "
        "they belong together is not known for this family, so its tokens cannot be drawn on it"
    )


def views(look: Look, size: tuple[int, int]) -> tuple[list[View], Mapping[str, Any]]:
    """The views that a processor makes of a picture of (width, height) pixels, and its output for such a picture."""
    inputs = look(_shaded(size))
    if "image_grid_thw" in inputs:  # patches of the whole picture, which was squeezed to a multiple of them
        return [View(WHOLE, 1.0)], inputs
    shaded = _pixels(inputs)
    black, white = (_pixels(look(Image.new("RGB", size, colour))) for colour in ("black", "white"))
    span = white - black  # the same everywhere but in padding, where nothing of the picture shows
    real = span.abs() > 0.5 * span.abs().max()
    share = (shaded - black) / torch.where(real, span, torch.ones_like(span))
    return [_view(share[i], real[i].all(0), size) for i in range(len(share))], inputs


def _pixels(inputs: Mapping[str, Any]) -> Tensor:
    """[views, 3, height, width] float64."""
    names = [name for name in inputs if name.startswith("pixel_values") and "video" not in name]
    pixels = inputs[names[0]] if names else None
    if not torch.is_tensor(pixels) or pixels.dim() not in (4, 5) or pixels.shape[-3] != 3:
        shape = tuple(pixels.shape) if torch.is_tensor(pixels) else type(pixels).__name__
        raise ValueError(
            f"the processor's pixels ({shape}) are no square views, so tokens cannot be drawn on a picture"
        )
    return pixels.flatten(0, -4).double()


def _shaded(size: tuple[int, int]) -> Image.Image:
    """Red grows from left to right and green from top to bottom; noise keeps what eight bits would round away."""
    width, height = size
    noise = np.random.default_rng(0).random((2, 256, width), dtype=np.float32)
    right, down = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (width, height))
    picture = np.zeros((height, width, 3), np.uint8)
    for y in range(0, height, 256):
        band = picture[y : y + 256]
        band[..., 0] = 255 * right + noise[0, : len(band)]
        band[..., 1] = 255 * down[y : y + 256, None] + noise[1, : len(band)]
    return Image.fromarray(picture)


def _view(share: Tensor, real: Tensor, size: tuple[int, int]) -> View:
    """share [3, h, w]: how far right and down in the picture each pixel comes from; real [h, w]: no padding."""
    h, w = real.shape
    across, down = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (w, h))
    left, right = _line(share[0], (across / w).expand(h, w), real, size[0])
    top, bottom = _line(share[1], (down / h)[:, None].expand(h, w), real, size[1])
    return View((left, top, right, bottom), float(real.double().mean()))


def _line(value: Tensor, at: Tensor, real: Tensor, pixels: int) -> tuple[float, float]:
    """Both ends of the straight line through value over `at` in 0..1; resizing bends the picture's rim: not that."""
    inner = real & (value > 2 / pixels) & (value < 1 - 2 / pixels)
    x, y = (t[inner if inner.sum() > real.sum() / 4 else real] for t in (at, value))
    spread = (x - x.mean()).square().mean() if len(x) else torch.zeros(())
    slope = float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0
    if slope <= 0:  # a picture one pixel wide, or nothing but padding
        return 0.0, 1.0
    start = float(y.mean() - slope * x.mean())
    return _snapped(start), _snapped(start + slope)


def _snapped(edge: float) -> float:
    return float(round(edge)) if abs(edge - round(edge)) < _NEAR and round(edge) in (0, 1) else edge


def _mosaic(tiles: Sequence[View], side: int, size: Any) -> Box:
    """What the mosaic of an any-resolution image saw: its tiles put together, without the padding that is cut off.

    side: tokens on a side of a tile. size: (height, width) of the picture in pixels.
    """
    from .model_adapters.family import unpadding

    first = tiles[0].box
    below = (i for i, tile in enumerate(tiles) if tile.box[1] - first[1] > (first[3] - first[1]) / 2)
    cols = next(below, len(tiles))
    rows = len(tiles) // cols
    best = max(range(len(tiles)), key=lambda i: tiles[i].filled)
    left, top, right, bottom = tiles[best].box
    (r, c), width, height = divmod(best, cols), right - left, bottom - top
    left, top = left - c * width, top - r * height
    across = left + (torch.arange(cols * side, dtype=torch.float64) + 0.5) * width / side
    down = top + (torch.arange(rows * side, dtype=torch.float64) + 0.5) * height / side
    places = torch.stack([across.expand(len(down), -1), down[:, None].expand(-1, len(across))])
    kept = unpadding()(places, [int(v) for v in size])
    x, y = width / side / 2, height / side / 2
    return (
        float(kept[0, 0, 0]) - x, float(kept[1, 0, 0]) - y, float(kept[0, 0, -1]) + x, float(kept[1, -1, 0]) + y,
    )  # fmt: skip
