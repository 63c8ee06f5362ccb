"""`TokenGroup`: what is left of an image while it shrinks, and how a stage sees it: by image, crop, frame or sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .method import Newlines, Per, Stage
from .signal import Signal
from .visual import Span


@dataclass
class Unit:
    """An image or a video of one row: where its n tokens stand, and what is known about them.

    row: batch row. ranges: [(start, length)] in the row, in the unit's own order. spans: rasters inside the unit.
    signals: tensors of first dimension n. before: the frame before its first (`Visual.before`).
    """

    row: int
    modality: str
    ranges: list[tuple[int, int]]
    spans: tuple[Span, ...] = ()
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    before: Tensor | None = None

    @property
    def n(self) -> int:
        return sum(length for _, length in self.ranges)

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(t, h, w) if the unit is one raster without separators."""
        whole = len(self.spans) == 1 and not self.spans[0].newline and len(self.spans[0]) == self.n
        return self.spans[0].grid if whole else None


@dataclass(frozen=True)
class Part:
    """A piece of an image or a video: tokens [n] (int64, counted in the image, on the host) and their rasters.

    start: its first token if it is one run without gaps, else None.
    """

    tokens: Tensor
    start: int | None
    spans: tuple[Span, ...] = ()
    separator: bool = False

    @classmethod
    def of(cls, tokens: Tensor, spans: tuple[Span, ...] = (), separator: bool = False) -> Part:
        """With `start` read from the tokens."""
        first, last = int(tokens[0]), int(tokens[-1])
        return cls(tokens, first if last - first == len(tokens) - 1 else None, spans, separator)


@dataclass
class TokenGroup:
    """An image, or a part of one, while it shrinks.

    image: its number in the batch. part: number of the crop or frame, None for the whole. total: its tokens unpruned.
    positions: [left] where its tokens stand in the row as fed. origin: [left] the same counted in the image's tokens.
    run: (start, length) in the row while nothing was cut and nothing stands between; else None.
    spans: its rasters, empty once something was cut. separator: newlines and the like, which stand in no raster.
    """

    unit: Unit
    image: int
    total: int
    positions: Tensor
    origin: Tensor
    spans: tuple[Span, ...] = ()
    run: tuple[int, int] | None = None
    part: int | None = None
    separator: bool = False

    @property
    def left(self) -> int:
        """Tokens left."""
        return self.positions.shape[0]

    @property
    def whole(self) -> bool:
        """True until something is cut."""
        return self.left == self.total

    @property
    def row(self) -> int:
        """The row of the batch it stands in."""
        return self.unit.row

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """(t, h, w) if the tokens are one raster without separators."""
        one = self.spans[0] if len(self.spans) == 1 else None
        if one is None or one.newline or math.prod(one.grid) != self.positions.shape[0]:
            return None
        return one.grid

    def keep(self, idx: Tensor) -> None:
        """Cut down to the tokens idx [K], ascending."""
        if idx.shape[0] < self.left:
            self.spans, self.run = (), None
        self.positions, self.origin = self.positions.index_select(0, idx), self.origin.index_select(0, idx)


def begin(unit: Unit, image: int, device: torch.device) -> TokenGroup:
    """A unit before anything was cut. Indices are made on the device: nothing is copied there."""
    positions = arange_of(unit.ranges, device)
    run = unit.ranges[0] if len(unit.ranges) == 1 else None
    return TokenGroup(unit, image, unit.n, positions, torch.arange(unit.n, device=device), unit.spans, run)


def begin_rows(
    units: Sequence[Unit], words: Tensor, device: torch.device
) -> tuple[list[TokenGroup], list[list[tuple[int, int]]], list[Tensor]]:
    """All units of a batch before anything was cut; the runs of words of each row, and the positions in them.

    words: [B, L] bool on the host.
    """
    runs = runs_of_rows(words)
    return [begin(u, i, device) for i, u in enumerate(units)], runs, [arange_of(row, device) for row in runs]


def runs_of(hit: Tensor) -> list[tuple[int, int]]:
    """(start, length) of every run of True in a host vector."""
    return runs_of_rows(hit[None])[0]


def runs_of_rows(hit: Tensor) -> list[list[tuple[int, int]]]:
    """The same of every row of hit [B, L], at once."""
    edges = torch.diff(torch.nn.functional.pad(hit.to(torch.int8), (1, 1))).nonzero().tolist()
    runs: list[list[tuple[int, int]]] = [[] for _ in range(hit.shape[0])]
    for (row, start), (_, stop) in zip(edges[::2], edges[1::2]):
        runs[row].append((start, stop - start))
    return runs


def arange_of(ranges: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """The positions of (start, length) ranges, one after the other, int64."""
    parts = [torch.arange(start, start + length, device=device) for start, length in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def groups(
    left: list[TokenGroup], stage: Stage, clips: Sequence[int] | None = None
) -> tuple[list[TokenGroup], list[list[TokenGroup]]]:
    """What is left, divided as finely as the stage needs, and the units of the stage: lists of their members.

    clips: for each image of the batch the number of its clip, where a sample is divided into clips.
    """
    left = [part for a in left for part in divide(a, stage)]
    seen = [a for a in left if not (a.separator and (stage.newlines != "compete" or stage.per in ("crop", "frame")))]
    if stage.per == "image":
        keys: list[tuple[int, ...]] = [(a.row, a.image) for a in seen]
    elif stage.per == "sample":
        keys = [(a.row, clips[a.image] if clips else 0) for a in seen]
    else:
        keys = [(a.row, a.image, number) for number, a in enumerate(seen)]
    members: dict[tuple[int, ...], list[TokenGroup]] = {}
    for a, key in zip(seen, keys):
        if a.left:  # a unit of which nothing is left is none
            members.setdefault(key, []).append(a)
    return left, list(members.values())


def divide(a: TokenGroup, stage: Stage) -> list[TokenGroup]:
    """The parts of a whole image that the stage looks at one by one; what was cut before stays as it is."""
    if a.part is not None or a.separator or not a.whole:
        return [a]
    parts = parts_of(a.spans, a.total, stage.per, stage.newlines, a.unit.modality == "video")
    if len(parts) == 1:
        return [a]
    device, out, number = a.positions.device, [], 0
    for i, part in enumerate(parts):
        idx = _on_device(a.spans, a.total, stage.per, stage.newlines, a.unit.modality == "video", device)[i]
        piece = replace(a, total=len(idx), spans=part.spans, run=None, separator=part.separator)
        piece.positions, piece.origin = a.positions.index_select(0, idx), a.origin.index_select(0, idx)
        if a.run and part.start is not None:
            piece.run = (a.run[0] + part.start, len(idx))
        if not part.separator and stage.per in ("crop", "frame"):
            piece.part, number = number, number + 1
        out.append(piece)
    return out


@lru_cache(maxsize=256)
def parts_of(spans: tuple[Span, ...], n: int, per: Per, newlines: Newlines, video: bool) -> tuple[Part, ...]:
    """Divide the n tokens of an image or video.

    per="crop": tiles and overview of an any-resolution image; a tile at the right edge brings its newlines if they
    compete. per="frame": frames of a video (an image is one). Else the image, without separators unless they compete.
    The last part holds the tokens that are in no other: separators. One part only: there is nothing to divide.
    """
    rasters = [raster for span in spans for raster in _rasters(span, per, newlines, video)]
    whole = per in ("image", "sample")
    if not rasters or (whole and newlines == "compete"):
        return (Part(torch.arange(n), 0, spans),)
    if whole:
        starts = accumulate((ids.numel() for ids, _ in rasters), initial=0)
        joined = tuple(replace(span, start=start) for (_, span), start in zip(rasters, starts))
        parts = [Part.of(torch.cat([ids.flatten() for ids, _ in rasters]), joined)]
    else:
        parts = [Part.of(ids.flatten(), (span,)) for ids, span in rasters]
    rest = torch.ones(n, dtype=torch.bool)
    for part in parts:
        rest[part.tokens] = False
    left = rest.nonzero().flatten()
    return (*parts, Part.of(left, separator=True)) if len(left) else tuple(parts)


@lru_cache(maxsize=256)
def _on_device(
    spans: tuple[Span, ...], n: int, per: Per, newlines: Newlines, video: bool, device: torch.device
) -> list[Tensor]:
    """The tokens of the parts; kept, because copying them anew would wait for the device."""
    return [part.tokens.to(device) for part in parts_of(spans, n, per, newlines, video)]


def _rasters(span: Span, per: Per, newlines: Newlines, video: bool) -> Iterator[tuple[Tensor, Span]]:
    """Token numbers [t, h, w] of the pieces of a span, each with a span of its own that starts at 0."""
    t, h, w = span.grid
    ids = (span.start + torch.arange(len(span))).view(t, h, w + span.newline)
    ends = span.newline and newlines == "compete"
    if not ends:
        ids = ids[..., :w]
    if per == "frame" and video:
        for frame in ids.split(1):
            yield frame, Span(0, (1, h, w), ends)
    elif per == "crop" and span.tiles:
        heights, widths = span.tiles
        for band in ids.split(heights, dim=1):
            for number, tile in enumerate(band.split([*widths[:-1], widths[-1] + ends], dim=2)):
                edge = ends and number == len(widths) - 1
                yield tile, Span(0, (t, band.shape[1], widths[number]), edge)
    else:
        yield ids, replace(span, start=0, newline=ends)


def tokens_of(group: Sequence[TokenGroup]) -> tuple[Tensor, Tensor | None]:
    """Positions in the row of all tokens of a unit; for parts of an image also the order that makes them ascend."""
    if len(group) == 1:
        return group[0].positions, None
    positions = torch.cat([a.positions for a in group])
    if not any(a.part is not None or a.separator for a in group):
        return positions, None
    order = positions.argsort()
    return positions.index_select(0, order), order


def joined_spans(group: Sequence[TokenGroup]) -> tuple[Span, ...]:
    """Spans of several whole images side by side; none once one was cut or divided."""
    if not all(a.whole and a.total == a.unit.n for a in group):
        return ()
    spans: list[Span] = []
    start = 0
    for a in group:
        spans += [replace(span, start=span.start + start) for span in a.spans]
        start += a.total
    return tuple(spans)


class UnitLayout(NamedTuple):
    """Where the tokens of a unit stand, and their rasters: `tokens_of`, `TokenGroup.grid` and `joined_spans`."""

    positions: Tensor
    order: Tensor | None
    grid: tuple[int, int, int] | None
    spans: tuple[Span, ...]


def layout_of(group: Sequence[TokenGroup]) -> UnitLayout:
    """The layout of a unit."""
    if len(group) == 1:
        return UnitLayout(group[0].positions, None, group[0].grid, group[0].spans)
    return UnitLayout(*tokens_of(group), None, joined_spans(group))


def kept_by_crop(spans: tuple[Span, ...], n: int, idx: Tensor) -> list[int]:
    """How many of the kept tokens idx [K] of an image of n tokens lie in each of its crops."""
    parts = parts_of(spans, n, "crop", "drop", False)
    return [int(torch.isin(idx.cpu(), part.tokens).sum()) for part in parts if not part.separator]


def emptied(units: Sequence[Unit], together: Sequence[int], index: Tensor, valid: Tensor | None) -> list[str]:
    """A note for each kind of piece (frames of a video or clip, crops of an image) of which some keep no token.

    together: the number of the clip or sample of every unit, where units of one number shared a budget; else empty.
    index, valid: what is left of the rows, as in `Last`. Units of which nothing is left were meant to go. Waits for
    the device.
    """
    index, left = index.cpu(), []
    for row, line in enumerate(index):
        left.append(set((line if valid is None else line[valid[row].cpu()]).tolist()))
    pieces: dict[tuple[str, int, int], list[int]] = {}
    for number, unit in enumerate(units):
        kept, video = left[unit.row], unit.modality == "video"
        at = arange_of(unit.ranges, torch.device("cpu"))
        parts = [at[p.tokens] for p in parts_of(unit.spans, unit.n, "frame" if video else "crop", "drop", video)
                 if not p.separator]  # fmt: skip
        counts = [len(kept.intersection(part.tolist())) for part in parts]
        pieces["frames" if video else "crops", unit.row, number] = counts
        if together:
            pieces.setdefault(("images", unit.row, -1 - together[number]), []).append(sum(counts))
    notes = []
    for kind, share in (("frames", "per='frame'"), ("crops", "per='crop'"), ("images", "per='image'")):
        found = [(row, c) for (k, row, _), c in pieces.items() if k == kind and any(c) and not all(c)]
        if found:
            row, counts = found[0]
            total, empty = sum(len(c) for _, c in found), sum(c.count(0) for _, c in found)
            first = ", ".join(map(str, counts[:16])) + ", ..." * (len(counts) > 16)
            notes.append(
                f"{empty} of {total} {kind} keep no token (in row {row}: {first}): raise the budget, or share it out "
                f"with {share}"
            )
    return notes
