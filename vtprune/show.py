"""Pictures of what a method keeps: kept visual tokens in full colour, dropped ones dimmed, each at its true place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import vtprune
from vtprune.evals.accuracy import mark, prepare, words_of
from vtprune.places import Box
from vtprune.types import Method, Span
from vtprune.units import arange_of

if TYPE_CHECKING:
    from vtprune.evals.video import Video
    from vtprune.frame import Last

_DIM = 0.78  # how far a dropped cell fades towards white
_HALF = 0.45  # and a merged one
_MARK = (214, 39, 40)
_MERGED = (31, 119, 180)
_GOOD = (0, 128, 60)
_INK = (40, 40, 40)
_GAP = 10
_TITLE = 22


@dataclass(frozen=True)
class Panel:
    """One drawing of the whole image: `rows` x `cols` cells of which `kept` (row-major) stay; `tiles` crops apart.

    merged: cells that are gone but live on in a kept one; () if there are none. xs, ys: the edges of columns [cols + 1]
    and rows [rows + 1] as shares of the image's width and height, beyond 0..1 in padding; () for the whole image.
    """

    title: str
    rows: int
    cols: int
    kept: list[bool]
    tiles: tuple[int, int] = (1, 1)
    merged: Sequence[bool] = ()
    xs: Sequence[float] = ()
    ys: Sequence[float] = ()

    def edges(self) -> tuple[Sequence[float], Sequence[float]]:
        """(xs, ys), those of the whole image where none are given."""
        even = [[i / n for i in range(n + 1)] for n in (self.cols, self.rows)]
        return self.xs or even[0], self.ys or even[1]


@dataclass(frozen=True)
class Kept:
    """What stayed of one unit's n tokens: idx [K] int64 among them, and the rasters they form.

    into: [n] int64, the kept token that took in most of each token (itself if it was kept), -1 for one that is lost;
    None where nothing is known of merging.
    """

    n: int
    idx: torch.Tensor
    grid: tuple[int, int, int] | None
    spans: tuple[Span, ...]
    into: torch.Tensor | None = None


def record(model: Any, inputs: Any, method: Method, keep: float | int) -> list[Kept]:
    """Run one forward pass with `method`; what stayed of every unit after all stages. The model stays as it was."""
    if "prefill" not in method.phases:
        raise ValueError(
            f"{method.name} chooses at every decode step and drops nothing of the prompt, so there is nothing to draw; "
            "Handle.last.recalled says what the last step saw"
        )
    with vtprune.patch(model, method, keep=keep) as handle, torch.inference_mode():
        model(**inputs)
        return kept_units(handle.last)


def kept_units(last: Last | None) -> list[Kept]:
    """What stayed of every image and video after all stages, in the order of the prompt."""
    if last is None or not last.images:
        raise ValueError("the prompt holds no image the model could see, so nothing was pruned")
    alive = torch.zeros(last.src.shape, dtype=torch.bool)
    for row, index in enumerate(last.index.cpu()):
        alive[row, index if last.valid is None else index[last.valid[row].cpu()]] = True
    into = _into(last)
    found = []
    for unit in last.images:
        at = arange_of(unit.ranges, torch.device("cpu"))
        place = torch.full((alive.shape[1],), -1)
        place[at] = torch.arange(unit.n)
        goal = into[unit.row, at]
        goal = torch.where((goal >= 0) & alive[unit.row, goal], place[goal], -1)
        found.append(Kept(unit.n, alive[unit.row, at].nonzero().flatten(), unit.grid, unit.spans, goal))
    return found


def _into(last: Last) -> torch.Tensor:
    """[B, L] int64: the position of the token that took in most of each one, stage after stage; -1 for a lost one."""
    into = torch.arange(last.src.shape[1]).repeat(len(last.src), 1)
    for u in last.units:
        if u.seen is None:
            continue
        seen, a = u.seen.cpu(), u.assignment
        step = torch.full((into.shape[1],), -1)
        if a.src is not None and a.dst is not None and a.w is not None:
            rising = a.w.cpu().argsort(stable=True)  # the heaviest share of a token is written last
            step[seen[a.src.cpu()[rising]]] = u.positions.cpu()[a.dst.cpu()[rising]]
        step[u.positions.cpu()] = u.positions.cpu()
        here = torch.isin(into[u.row], seen)
        into[u.row] = torch.where(here, step[into[u.row]], into[u.row])
    return into


def joined(units: Sequence[Kept]) -> Kept:
    """The units of one image as one: where text stands between its crops, each crop is a unit."""
    if len(units) == 1:
        return units[0]
    starts = list(accumulate((unit.n for unit in units), initial=0))
    spans = tuple(
        dataclasses.replace(s, start=s.start + start) for unit, start in zip(units, starts) for s in rasters(unit)
    )
    idx = torch.cat([unit.idx + start for unit, start in zip(units, starts)])
    into = torch.cat(
        [
            torch.full((unit.n,), -1) if unit.into is None else torch.where(unit.into >= 0, unit.into + start, -1)
            for unit, start in zip(units, starts)
        ]
    )
    return Kept(starts[-1], idx, None, spans, into)


def panels(unit: Kept, aspect: float, places: Sequence[Box] | None = None) -> list[Panel]:
    """Where the tokens of one image lie on it. aspect: width / height of the image.

    places: what each raster saw of the image, as `vtprune.places.boxes` measures it. Rasters of one size side by side
    (crops) make one panel; those that see the same again (a thumbnail, an overview) make another. Without places
    every raster is drawn on the whole image, and equal crops (the thumbnail comes last) on the likeliest tile grid.
    """
    spans = rasters(unit)
    if places is not None:
        if len(places) != len(spans):
            raise ValueError(f"{len(places)} places for {len(spans)} rasters of tokens: give one for each")
        return [_placed(group, unit) for group in _beside(spans, places)]
    same = len({(s.grid, s.newline) for s in spans}) == 1
    if len(spans) > 2 and same and not spans[0].newline and spans[0].grid[0] == 1:
        rows, cols = tile_grid(len(spans) - 1, aspect)
        return [_tiled(spans[:-1], unit, rows, cols), _raster(spans[-1], unit, "thumbnail")]
    return [_raster(s, unit, "") for s in spans]


def _beside(spans: Sequence[Span], places: Sequence[Box]) -> list[list[tuple[Span, Box]]]:
    """Neighbours in order: crops of one grid that fill a rectangle without overlap; any other raster stands alone."""
    groups: list[list[tuple[Span, Box]]] = []
    for span, box in zip(spans, places):
        near = groups[-1] if groups else []
        if near and not span.newline and all(s.grid == span.grid and not _overlap(b, box) for s, b in near):
            near.append((span, box))
        else:
            groups.append([(span, box)])
    full = [len(group) % _columns([b for _, b in group]) == 0 for group in groups]
    return [part for group, whole in zip(groups, full) for part in ([group] if whole else [[one] for one in group])]


def _columns(places: Sequence[Box]) -> int:
    """How many crops stand in the first line."""
    _, top, _, bottom = places[0]
    return next((i for i, b in enumerate(places) if abs(b[1] - top) > (bottom - top) / 2), len(places))


def _overlap(a: Box, b: Box) -> bool:
    """More than a tenth of the smaller one, in both directions: measured edges are not exact."""
    shared = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    return all(shared[i] > 0.1 * min(a[i + 2] - a[i], b[i + 2] - b[i]) for i in (0, 1))


def _placed(group: Sequence[tuple[Span, Box]], unit: Kept) -> Panel:
    """One panel of crops in reading order, its edges where they saw the image."""
    spans, places = [s for s, _ in group], [b for _, b in group]
    cols = _columns(places)
    rows = len(places) // cols
    panel = _tiled(spans, unit, rows, cols) if len(spans) > 1 else _raster(spans[0], unit, "")
    _, h, w = spans[0].grid
    xs = [_mixed(b[0], b[2], i / w) for b in places[:cols] for i in range(w)] + [places[cols - 1][2]]
    ys = [_mixed(b[1], b[3], i / h) for b in places[::cols] for i in range(h)] + [places[-1][3]]
    return dataclasses.replace(panel, xs=xs, ys=ys)


def _mixed(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def _flags(unit: Kept) -> torch.Tensor:
    """[n] bool: kept."""
    kept = torch.zeros(unit.n, dtype=torch.bool)
    kept[unit.idx] = True
    return kept


def rasters(unit: Kept) -> tuple[Span, ...]:
    """The rasters that the tokens of an image form; ValueError if none is known."""
    if unit.grid is not None:
        return (Span(0, unit.grid),)
    if unit.spans:
        return unit.spans
    raise ValueError(f"the {unit.n} visual tokens of this image form no known grid, so they cannot be drawn on it")


def film(units: Sequence[Kept]) -> list[Panel]:
    """A panel for every time step of a video's tokens, in order; `units` are its parts (all of it, or frames)."""
    found: list[Panel] = []
    for unit in units:
        kept, merged = _flags(unit), _gone(unit)
        for span in rasters(unit):
            _, h, w = span.grid
            for stays, goes in zip(_cells(span, kept).flatten(1), _cells(span, merged).flatten(1)):
                found.append(Panel("", h, w, stays.tolist(), merged=goes.tolist()))
    return found


def segments(unit: Kept) -> list[int]:
    """Time steps at which a new segment begins: no token was merged across. [] if none was merged over time."""
    if unit.into is None:
        return []
    steps = [
        (span.start + i * (len(span) // span.grid[0]), span) for span in rasters(unit) for i in range(span.grid[0])
    ]
    step = torch.searchsorted(torch.tensor([start for start, _ in steps]), torch.arange(unit.n), right=True) - 1
    gone = unit.into >= 0
    first, last = torch.minimum(step[gone], step[unit.into[gone]]), torch.maximum(step[gone], step[unit.into[gone]])
    crossed = {t for a, b in zip(first.tolist(), last.tolist()) for t in range(a + 1, b + 1)}
    return [t for t in range(1, len(steps)) if t not in crossed] if crossed else []


def contact_sheet(video: Video, units: Sequence[Kept], title: str, side: int = 168, columns: int = 8) -> Image.Image:
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
    step = height + _TITLE + _GAP
    size = (max(_GAP + columns * (width + _GAP), math.ceil(font.getlength(text)) + 2 * _GAP), _TITLE + lines * step)
    sheet = Image.new("RGB", (size[0], size[1] + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP // 2), text, fill=_INK, font=font)
    for i, picture in enumerate(drawn):
        x, y = _GAP + i % columns * (width + _GAP), _TITLE + _GAP // 2 + i // columns * step
        pen.text((x, y), f"{times[i]:.2f} s", fill=_INK, font=font)
        sheet.paste(picture, (x, y + _TITLE))
        if i in starts:
            middle = x - _GAP // 2 - 1
            pen.line((middle, y, middle, y + _TITLE + height), fill=_MERGED, width=4)
    return sheet


def _cells(span: Span, kept: torch.Tensor) -> torch.Tensor:
    """[t, h, w] kept flags of a span, without its newline tokens."""
    t, h, w = span.grid
    flags = kept[span.start : span.start + len(span)]
    return flags.view(t, h, w + span.newline)[..., :w]


def _gone(unit: Kept) -> torch.Tensor:
    """[n] bool: merged into a kept token."""
    kept = _flags(unit)
    return torch.zeros_like(kept) if unit.into is None else (unit.into >= 0) & ~kept


def _raster(span: Span, unit: Kept, title: str) -> Panel:
    # A still image seen as several frames (Qwen repeats it) shows a cell as kept if any frame keeps it.
    _, h, w = span.grid
    kept, merged = (_cells(span, flags).any(0).flatten().tolist() for flags in (_flags(unit), _gone(unit)))
    return Panel(title or f"{h} x {w}", h, w, kept, merged=merged)


def _tiled(spans: Sequence[Span], unit: Kept, rows: int, cols: int) -> Panel:
    _, h, w = spans[0].grid

    def whole(flags: torch.Tensor) -> list[bool]:
        crops = torch.stack([_cells(s, flags).any(0) for s in spans]).view(rows, cols, h, w)
        return crops.transpose(1, 2).flatten().tolist()

    kept, merged = whole(_flags(unit)), whole(_gone(unit))
    return Panel(f"{rows} x {cols} crops", rows * h, cols * w, kept, (rows, cols), merged)


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
                pen.line((right, y, right, below), fill=_INK)
            if r + 1 < h and cells[r][c] != cells[r + 1][c]:
                pen.line((x, below, right, below), fill=_INK)
    kept = len(set(slots.tolist()) - {-1})
    return _strip([(bright, ""), (out, "")], f"{title}: {slots.numel()} patches, {kept} tokens")


def tile_grid(count: int, aspect: float) -> tuple[int, int]:
    """(rows, cols) with rows * cols == count whose shape is closest to the image's; ties go to fewer rows."""
    pairs = [(r, count // r) for r in range(1, count + 1) if count % r == 0]
    return min(pairs, key=lambda p: abs(math.log(p[1] / p[0] / aspect)))


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
                pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_MARK)
    left, top, right, bottom = _cell(size, (xs[0], xs[-1]), (ys[0], ys[-1]), 0, 0)
    for x in xs[panel.cols // panel.tiles[1] : -1 : panel.cols // panel.tiles[1]]:
        pen.line((size[0] * x, top, size[0] * x, bottom), fill=_INK, width=2)
    for y in ys[panel.rows // panel.tiles[0] : -1 : panel.rows // panel.tiles[0]]:
        pen.line((left, size[1] * y, right, size[1] * y), fill=_INK, width=2)
    if (left, top, right, bottom) != (0, 0, *size):
        pen.rectangle((left, top, right - 1, bottom - 1), outline=_INK)
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
    merged = int(_gone(unit).sum())
    more = f", {merged} merged into them" if merged else ""
    inside = [edges[0] > 0.01 or edges[-1] < 0.99 for part in parts for edges in part.edges()]
    more += "; the model saw what is inside the line" if any(inside) else ""
    return _strip(drawn, f"{title}: {len(unit.idx)} of {unit.n} visual tokens{more}")


def _strip(drawn: Sequence[tuple[Image.Image, str]], title: str) -> Image.Image:
    width = sum(d.width for d, _ in drawn) + _GAP * (len(drawn) + 1)
    labelled = any(label for _, label in drawn)
    top = _TITLE + _GAP + (_TITLE if labelled else 0)
    font = ImageFont.load_default(15)
    width = max(width, math.ceil(font.getlength(title)) + 2 * _GAP)
    sheet = Image.new("RGB", (width, top + max(d.height for d, _ in drawn) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP // 2), title, fill=_INK, font=font)
    x = _GAP
    for picture, label in drawn:
        pen.text((x, _TITLE + _GAP // 2), label, fill=_INK, font=font)
        sheet.paste(picture, (x, top))
        x += picture.width + _GAP
    return sheet


def gallery(
    model: Any, processor: Any, questions: Sequence[Any], methods: Sequence[str], keep: float | int, side: int = 176
) -> Image.Image:
    """A sheet: a row for each of four questions, a column a method, and the model's answer under every picture."""
    asked = _spread(questions, 4)
    font = ImageFont.load_default(14)
    row_height = side + 2 * _TITLE + _GAP
    size = (_GAP + (len(methods) + 1) * (side + _GAP), _TITLE + _GAP + len(asked) * row_height)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    columns: list[str | None] = [None, *methods]
    for c, name in enumerate(columns):
        pen.text((_GAP + c * (side + _GAP), _GAP // 2), name or "all tokens", fill=_INK, font=font)
    for r, question in enumerate(asked):
        y = _TITLE + _GAP + r * row_height
        pen.text((_GAP, y), f"{words_of(question.prompt)}  ({question.answer})", fill=_INK, font=font)
        for c, name in enumerate(columns):
            x = _GAP + c * (side + _GAP)
            picture, said = _answered(model, processor, question, name, keep, side)
            sheet.paste(picture.resize((side, side)), (x, y + _TITLE))
            good = mark(said, True, question.answer)[0]
            pen.text((x, y + _TITLE + side + 2), said, fill=_GOOD if good else _MARK, font=font)
    return sheet


def film_gallery(
    model: Any, processor: Any, questions: Sequence[Any], methods: Sequence[str], keep: float | int
) -> Image.Image:
    """One clip, asked one question: a contact sheet for each method with the model's answer in its title."""
    question = questions[0]
    inputs = prepare(model, processor, [question.prompt], [question.seen])
    sheets = []
    for name in methods:
        with vtprune.patch(model, name, keep=keep) as handle:
            said = _said(model, processor, inputs)
            units = kept_units(handle.last)
        sheets.append(contact_sheet(question.seen, units, f"{name} says {said}", side=96))
    head = f"{words_of(question.prompt)}  ({question.answer}; all tokens: {_said(model, processor, inputs)})"
    size = (max(s.width for s in sheets), _TITLE + _GAP + sum(s.height for s in sheets))
    out = Image.new("RGB", size, "white")
    ImageDraw.Draw(out).text((_GAP, _GAP // 2), head, fill=_INK, font=ImageFont.load_default(15))
    y = _TITLE + _GAP
    for sheet in sheets:
        out.paste(sheet, (0, y))
        y += sheet.height
    return out


def _said(model: Any, processor: Any, inputs: Any) -> str:
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _answered(
    model: Any, processor: Any, question: Any, name: str | None, keep: float | int, side: int
) -> tuple[Image.Image, str]:
    """The picture of what a method (None: dense) leaves, and what the model then answers."""
    inputs = prepare(model, processor, [question.prompt], [question.seen])
    picture = question.image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    if name is None:
        return picture, _said(model, processor, inputs)
    with vtprune.patch(model, name, keep=keep) as handle:
        said = _said(model, processor, inputs)
    unit = kept_units(handle.last)[0]
    return draw(question.image, panels(unit, question.image.width / question.image.height)[0], side), said


def _spread(questions: Sequence[Any], count: int) -> list[Any]:
    """One question each of `count` evenly spaced kinds, on different images where there are enough."""
    kinds = list(dict.fromkeys(q.capability for q in questions))
    count = min(count, len(kinds))
    chosen: list[Any] = []
    for i in range(count):
        kind = [q for q in questions if q.capability == kinds[i * len(kinds) // count]]
        new = [q for q in kind if q.image_id not in {c.image_id for c in chosen}]
        chosen.append((new or kind)[0])
    return chosen
