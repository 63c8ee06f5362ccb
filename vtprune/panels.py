"""Where the tokens that a method keeps stand: as cells of an image's panels, or of a video's time steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

import vtprune
from vtprune.places import Box
from vtprune.recipe import Recipe
from vtprune.types import Method, Span
from vtprune.units import arange_of

if TYPE_CHECKING:
    from vtprune.core.result import Last


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


def record(model: Any, inputs: Any, method: Method | Recipe, keep: float | int | None) -> list[Kept]:
    """Run one forward pass with `method`; what stayed of every unit after all stages. The model stays as it was."""
    rules = [stage.method for stage in method.stages] if isinstance(method, Recipe) else [method]
    late = next((rule for rule in rules if "prefill" not in rule.phases), None)
    if late is not None:
        raise ValueError(
            f"{late.name} chooses at every decode step and drops nothing of the prompt, so there is nothing to draw; "
            "Handle.last.recalled says what the last step saw"
        )
    with vtprune.patch(model, method, keep=keep) as handle, torch.inference_mode():
        model(**inputs)
        return kept_units(handle.last)


def kept_units(last: Last | None) -> list[Kept]:
    """What stayed of every image and video after all stages, in the order of the prompt."""
    if last is None or not last.images:
        raise ValueError("the prompt holds no image the model could see, so nothing was pruned")
    into = _into(last)
    found = []
    for unit, kept in zip(last.images, last.kept()):
        at = arange_of(unit.ranges, torch.device("cpu"))
        place = torch.full((into.shape[1],), -1)
        place[at[kept]] = kept
        goal = into[unit.row, at]
        goal = torch.where(goal >= 0, place[goal], -1)
        found.append(Kept(unit.n, kept, unit.grid, unit.spans, goal))
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
        kept, merged = kept_of(unit), merged_of(unit)
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
    lives = unit.into >= 0  # kept, or merged into a kept one
    own, goal = step[lives], step[unit.into[lives]]
    first, last = torch.minimum(own, goal), torch.maximum(own, goal)
    crossed = {t for a, b in zip(first.tolist(), last.tolist()) for t in range(a + 1, b + 1)}
    return [t for t in range(1, len(steps)) if t not in crossed] if crossed else []


def _cells(span: Span, kept: torch.Tensor) -> torch.Tensor:
    """[t, h, w] kept flags of a span, without its newline tokens."""
    t, h, w = span.grid
    flags = kept[span.start : span.start + len(span)]
    return flags.view(t, h, w + span.newline)[..., :w]


def kept_of(unit: Kept) -> torch.Tensor:
    """[n] bool: the tokens that were kept."""
    kept = torch.zeros(unit.n, dtype=torch.bool)
    kept[unit.idx] = True
    return kept


def merged_of(unit: Kept) -> torch.Tensor:
    """[n] bool: the tokens that were merged into a kept one."""
    kept = kept_of(unit)
    return torch.zeros_like(kept) if unit.into is None else (unit.into >= 0) & ~kept


def _raster(span: Span, unit: Kept, title: str) -> Panel:
    # A still image seen as several frames (Qwen repeats it) shows a cell as kept if any frame keeps it.
    _, h, w = span.grid
    kept, merged = (_cells(span, flags).any(0).flatten().tolist() for flags in (kept_of(unit), merged_of(unit)))
    return Panel(title or f"{h} x {w}", h, w, kept, merged=merged)


def _tiled(spans: Sequence[Span], unit: Kept, rows: int, cols: int) -> Panel:
    _, h, w = spans[0].grid

    def whole(flags: torch.Tensor) -> list[bool]:
        crops = torch.stack([_cells(s, flags).any(0) for s in spans]).view(rows, cols, h, w)
        return crops.transpose(1, 2).flatten().tolist()

    kept, merged = whole(kept_of(unit)), whole(merged_of(unit))
    return Panel(f"{rows} x {cols} crops", rows * h, cols * w, kept, (rows, cols), merged)


def tile_grid(count: int, aspect: float) -> tuple[int, int]:
    """(rows, cols) with rows * cols == count whose shape is closest to the image's; ties go to fewer rows."""
    pairs = [(r, count // r) for r in range(1, count + 1) if count % r == 0]
    return min(pairs, key=lambda p: abs(math.log(p[1] / p[0] / aspect)))
