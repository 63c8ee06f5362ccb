"""Pictures of what a method keeps: kept visual tokens in full colour, dropped ones dimmed, each at its true place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vtprune.panels import (
    Kept,
    Panel,
    film,
    joined,
    kept_units,
    merged_of,
    panels,
    rasters,
    record,
    segments,
    tile_grid,
)
from vtprune.places import Box, boxes

if TYPE_CHECKING:
    from vtprune.core.result import Last
    from vtprune.hf.vit_last import VitLast

__all__ = [
    "Kept", "Panel", "contact_sheet", "draw", "draw_groups", "draw_kept", "draw_slots", "film", "joined",
    "kept_units", "overlay", "panels", "rasters", "record", "segments", "tile_grid",
]  # fmt: skip

_DIM = 0.78  # how far a dropped cell fades towards white
_HALF = 0.45  # and a merged one
MARK = (214, 39, 40)
_MERGED = (31, 119, 180)
INK = (40, 40, 40)
GAP = 10
TITLE = 22


class Film(Protocol):
    """A clip, such as `vtprune.evals.video.Video`."""

    @property
    def frames(self) -> NDArray[np.uint8]:
        """uint8 [T, height, width, 3]."""

    @property
    def times(self) -> NDArray[np.float64]:
        """float64 [T]: seconds at which each frame comes on screen."""


def draw_kept(last: Last, image: Any, which: int | slice | None, processor: Any) -> Image.Image:
    """`Last.draw`."""
    units = kept_units(last)
    if which is None and len(units) > 1:
        raise ValueError(
            f"the last prompt held {len(units)} images or videos: say which=0 to {len(units) - 1}, or a slice of those "
            "that are crops of one picture, such as which=slice(None)"
        )
    if isinstance(which, int) and not 0 <= which < len(units):
        raise ValueError(f"which={which}: the last prompt held {len(units)} images or videos, counted from 0")
    units = units[which] if isinstance(which, slice) else [units[which or 0]]
    if not units:
        raise ValueError(f"which={which} names none of the images and videos of the last prompt")
    title = ", ".join(dict.fromkeys(unit.method for unit in last.units)) or "nothing pruned"
    if not isinstance(image, Image.Image):
        return contact_sheet(image, units, title)
    unit, places = joined(units), None
    if processor is not None:
        look = getattr(processor, "image_processor", processor)
        places = boxes(lambda picture: look(picture, return_tensors="pt"), image.size, rasters(unit))
    return overlay(image, unit, title, places)


def draw_slots(last: VitLast, image: Image.Image, row: int, grid: tuple[int, int] | None) -> Image.Image:
    """`VitLast.draw`."""
    slots = torch.arange(last.n) if last.slots is None else last.slots[row].cpu()
    patches = slots[last.prefix :]
    side = math.isqrt(len(patches))
    return draw_groups(image, patches, grid or (side, side), "patches")


def contact_sheet(video: Film, units: Sequence[Kept], title: str, side: int = 168, columns: int = 8) -> Image.Image:
    """Every time step of a video's tokens over the frame in its middle: kept bright, merged half faded, lost faded.

    A thick bar before a frame: a new segment, where no token was merged from one side to the other.
    """
    parts = film(units)
    starts = segments(units[0]) if len(units) == 1 else []
    kept, n = (sum(len(u.idx) if left else u.n for u in units) for left in (True, False))
    frames = [video.frames[(2 * i + 1) * len(video.frames) // (2 * len(parts))] for i in range(len(parts))]
    times = [video.times[i * len(video.frames) // len(parts)] for i in range(len(parts))]
    drawn = [draw(Image.fromarray(frame), part, side) for frame, part in zip(frames, parts)]
    width, height = drawn[0].size
    columns = min(columns, len(drawn))
    lines = -(-len(drawn) // columns)
    merged = sum(sum(part.merged) for part in parts)
    more = f", {merged} merged into them" if merged else ""
    more += f"; {len(starts) + 1} segments" if starts else ""
    text, font = f"{title}: {kept} of {n} visual tokens{more}", ImageFont.load_default(15)
    step = height + TITLE + GAP
    size = (max(GAP + columns * (width + GAP), math.ceil(font.getlength(text)) + 2 * GAP), TITLE + lines * step)
    sheet = Image.new("RGB", (size[0], size[1] + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), text, fill=INK, font=font)
    for i, picture in enumerate(drawn):
        x, y = GAP + i % columns * (width + GAP), TITLE + GAP // 2 + i // columns * step
        pen.text((x, y), f"{times[i]:.2f} s", fill=INK, font=font)
        sheet.paste(picture, (x, y + TITLE))
        if i in starts:
            middle = x - GAP // 2 - 1
            pen.line((middle, y, middle, y + TITLE + height), fill=_MERGED, width=4)
    return sheet


def draw_groups(image: Image.Image, slots: torch.Tensor, grid: tuple[int, int], title: str) -> Image.Image:
    """Which patches of a vision transformer became one token: each group in its mean colour, a line around it.

    slots: [h * w] int64, the token that holds each patch of the grid (h, w), -1 for a dropped one, which is dimmed.
    """
    h, w = grid
    if slots.numel() != h * w:
        raise ValueError(f"{slots.numel()} patches do not fill a grid of {h} x {w}")
    side = 24
    bright = image.convert("RGB").resize((w * side, h * side), Image.Resampling.BICUBIC)
    means = np.asarray(image.convert("RGB").resize((w, h), Image.Resampling.BOX), dtype=np.float32)
    small = torch.from_numpy(means).view(h * w, 3)
    out = Image.blend(bright, Image.new("RGB", bright.size, "white"), _DIM)
    pen = ImageDraw.Draw(out)
    for slot in slots.unique().tolist():
        members = (slots == slot).nonzero()[:, 0].tolist()
        colour = tuple(int(v) for v in small[members].mean(0).round().tolist())
        for at in members if slot >= 0 else ():
            pen.rectangle(_box(out.size, h, w, *divmod(at, w)), fill=colour)
    cells = slots.view(h, w).tolist()
    for r in range(h):
        for c in range(w):
            x, y, right, below = _box(out.size, h, w, r, c)
            if c + 1 < w and cells[r][c] != cells[r][c + 1]:
                pen.line((right, y, right, below), fill=INK)
            if r + 1 < h and cells[r][c] != cells[r + 1][c]:
                pen.line((x, below, right, below), fill=INK)
    kept = len(set(slots.tolist()) - {-1})
    return _strip([(bright, ""), (out, "")], f"{title}: {slots.numel()} patches, {kept} tokens")


def draw(image: Image.Image, panel: Panel, side: int = 336) -> Image.Image:
    """Paint one panel; `side` is the length of the longer edge in pixels, raised until a cell has 8 pixels.

    A line goes around the part that the model saw, where it did not see the whole image.
    """
    xs, ys = panel.edges()
    finest = min(min(b - a for a, b in pairwise(edges)) for edges in (xs, ys))
    side = max(side, min(math.ceil(8 / max(finest, 1e-6)), 8 * max(panel.rows, panel.cols)))
    scale = side / max(image.size)
    size = (max(panel.cols, round(image.width * scale)), max(panel.rows, round(image.height * scale)))
    bright = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    white = Image.new("RGB", size, "white")
    out = Image.blend(bright, white, _DIM)
    pen = ImageDraw.Draw(out)
    half = Image.blend(bright, white, _HALF) if any(panel.merged) else bright
    states = zip(panel.kept, panel.merged or [False] * len(panel.kept))
    for i, (kept, merged) in enumerate(states):
        box = _cell(size, xs, ys, *divmod(i, panel.cols))
        if (kept or merged) and box[0] < box[2] and box[1] < box[3]:
            out.paste((bright if kept else half).crop(box), box)
            if kept:
                pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=MARK)
    left, top, right, bottom = _cell(size, (xs[0], xs[-1]), (ys[0], ys[-1]), 0, 0)
    for x in xs[panel.cols // panel.tiles[1] : -1 : panel.cols // panel.tiles[1]]:
        pen.line((size[0] * x, top, size[0] * x, bottom), fill=INK, width=2)
    for y in ys[panel.rows // panel.tiles[0] : -1 : panel.rows // panel.tiles[0]]:
        pen.line((left, size[1] * y, right, size[1] * y), fill=INK, width=2)
    if (left, top, right, bottom) != (0, 0, *size):
        pen.rectangle((left, top, right - 1, bottom - 1), outline=INK)
    return out


def _cell(size: tuple[int, int], xs: Sequence[float], ys: Sequence[float], r: int, c: int) -> tuple[int, int, int, int]:
    """The pixels of a cell inside a drawing of `size`; empty if it lies outside, as padding does."""
    x, y = ([min(max(math.floor(n * e + 1e-6), 0), n) for e in (a, b)] for n, a, b in (
        (size[0], xs[c], xs[c + 1]), (size[1], ys[r], ys[r + 1])
    ))  # fmt: skip
    return (x[0], y[0], x[1], y[1])


def _box(size: tuple[int, int], rows: int, cols: int, r: int, c: int) -> tuple[int, int, int, int]:
    width, height = size
    return (width * c // cols, height * r // rows, width * (c + 1) // cols, height * (r + 1) // rows)


def overlay(image: Image.Image, unit: Kept, title: str, places: Sequence[Box] | None = None) -> Image.Image:
    """The picture of one image: its panels side by side under a title that counts the tokens.

    places: as for `panels`.
    """
    parts = panels(unit, image.width / image.height, places)
    drawn = [(draw(image, p), p.title if len(parts) > 1 else "") for p in parts]
    merged = int(merged_of(unit).sum())
    more = f", {merged} merged into them" if merged else ""
    inside = [edges[0] > 0.01 or edges[-1] < 0.99 for part in parts for edges in part.edges()]
    more += "; the model saw what is inside the line" if any(inside) else ""
    return _strip(drawn, f"{title}: {len(unit.idx)} of {unit.n} visual tokens{more}")


def _strip(drawn: Sequence[tuple[Image.Image, str]], title: str) -> Image.Image:
    width = sum(d.width for d, _ in drawn) + GAP * (len(drawn) + 1)
    labelled = any(label for _, label in drawn)
    top = TITLE + GAP + (TITLE if labelled else 0)
    font = ImageFont.load_default(15)
    width = max(width, math.ceil(font.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (width, top + max(d.height for d, _ in drawn) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP // 2), title, fill=INK, font=font)
    x = GAP
    for picture, label in drawn:
        pen.text((x, TITLE + GAP // 2), label, fill=INK, font=font)
        sheet.paste(picture, (x, top))
        x += picture.width + GAP
    return sheet
