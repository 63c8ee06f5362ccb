"""What a prefill leaves behind: `UnitResult` of one unit at one stage, and `Last` of the whole call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..kernels.clock import Clock
from ..kernels.dispatch import Backend
from .method import Where
from .units import Unit, arange_of, emptied, kept_by_crop
from .visual import Assignment, Span


@dataclass(frozen=True)
class UnitResult:
    """What one stage did to one unit (an image, a crop, a frame or a sample), also where it kept all of it and the
    method was not asked.

    With per="sample" a row is one unit, also where the method saw its clips one by one.
    """

    row: int
    """Row of the batch."""
    image: int
    """Number of the image or video in the batch."""
    part: int | None
    """Number of the crop or frame in it; None for the whole."""
    modality: str
    """"image" or "video"."""
    method: str
    """Name of the method."""
    where: Where
    """Place of the stage: "llm", a decoder layer, or ("vit", k)."""
    n: int
    """Tokens that the stage found."""
    positions: Tensor
    """[K] int64: kept positions in the row as fed."""
    idx: Tensor
    """[K] int64: the same, counted inside the n tokens that the stage found."""
    order: Tensor | None
    """[K] int64: idx in the order they were picked; None if the method has none."""
    scores: Tensor | None
    """[n] float32: the method's score of each token; None if it gives none."""
    spans: tuple[Span, ...]
    """Rasters inside the unit; empty once something of it was cut."""
    grid: tuple[int, int, int] | None
    """(t, h, w) if its n tokens are one raster."""
    assignment: Assignment
    """The method's answer, with what was merged into what."""
    seen: Tensor | None = None
    """[n] int64: where the n tokens stand in the row as fed; None inside the vision tower."""

    @property
    def kept_by_crop(self) -> list[int]:
        """Kept tokens in each crop of the unit, newlines not counted; waits for the device."""
        return kept_by_crop(self.spans, self.n, self.idx)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain ints, floats, strings and lists, as `json.dumps` takes them; waits for the device.

        "merged": {"src", "dst", "w"}, the sparse weights of `Assignment`, or None where kept tokens are copies.
        """
        found = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "assignment"}
        a = self.assignment
        return found | {"merged": {"src": plain(a.src), "dst": plain(a.dst), "w": plain(a.w)} if a.merges else None}


@dataclass(frozen=True)
class TowerStep:
    """What a stage did at one block of the vision tower, as tensors of the whole batch; results are made when asked."""

    where: Where
    results: Callable[[], list[UnitResult]]


@dataclass(frozen=True)
class Last:
    """What the last prefill kept. Of packed rows every sample is a row of its own here, left-padded to the longest.

    `to_dict` is the same for JSON, `draw` paints the kept tokens on a picture.
    """

    index: Tensor
    """[B, n] int64: what is left of each row after all stages, as positions in the row as fed."""
    valid: Tensor | None
    """[B, n] bool: which of `index` are no padding; None: all."""
    src: Tensor
    """[B, L] int64: the slot of `index` that answers for each position fed."""
    units: list[UnitResult]
    """One a unit and stage of which the method was asked; where a stage leaves all units whole, these. With stages
    inside the tower it starts with what all of them together left of each image."""
    lengths: list[int]
    """Tokens that each decoder layer ran on."""
    said: list[str]
    """Fallbacks that were used; read `notes`."""
    policies: list[str]
    """How each stage dealt out its budget, in words."""
    kernels: dict[str, Backend]
    """Which implementation of each kernel ran: "reference" or "triton"."""
    clocks: list[Clock] = field(default_factory=list, repr=False)
    """What `seconds` sums up."""
    tower_steps: list[TowerStep] = field(default_factory=list, repr=False)
    """What each stage inside the vision tower did; read `tower_units`."""
    tower_lengths: dict[str, list[int]] = field(default_factory=dict)
    """By modality, the rows that each block of the tower ran on, of its longest crop (of all images where the tower
    packs them); empty without stages there."""
    recalled: dict[int, list[Tensor]] = field(default_factory=dict)
    """Of stages that act at decode, by layer: for each row [K] the positions as fed of the visual tokens that the last
    decode step saw there; empty before the first step that chose."""
    heads: dict[int, list[Tensor]] = field(default_factory=dict)
    """Of stages that choose among heads, by layer: for each row [K] int64 the query heads that speak behind it."""
    images: list[Unit] = field(default_factory=list, repr=False)
    """Every image and video of the rows as fed, cut or not: where its tokens stand, and their rasters."""
    together: list[int] = field(default_factory=list, repr=False)
    """Of each of `images` the clip or sample that it shared a budget in; empty where none did."""

    @cached_property
    def tower_units(self) -> list[UnitResult]:
        """What each stage inside the vision tower did to each crop (or packed image).

        `row` is the row of the tower's batch, `image` the crop's number, `positions` are its tokens.
        """
        return [result for step in self.tower_steps for result in step.results()]

    @cached_property
    def notes(self) -> list[str]:
        """Fallbacks that were used, and how many frames or crops a budget left empty; on a GPU this waits for it."""
        return [*self.said, *(emptied(self.images, self.together, self.index, self.valid))]

    @classmethod
    def untouched(cls, embeds: Tensor, depth: int, note: str) -> Last:
        """Of a call of embeddings [B, L, D] in which nothing was visual, as far as could be told."""
        batch, length = embeds.shape[:2]
        index = torch.arange(length, device=embeds.device).expand(batch, -1)
        return cls(index, None, index, [], [length] * depth, [note], [], {})

    @property
    def seconds(self) -> float:
        """Time spent in methods and in reading their signals; on a GPU this waits for them."""
        return sum(clock.seconds() for clock in self.clocks)

    def kept(self) -> list[Tensor]:
        """[K] int64 for each of `images`, on the host: its tokens that are left after all stages, counted in it."""
        alive = torch.zeros(self.src.shape, dtype=torch.bool)
        for row, (line, real) in enumerate(zip(self.index.cpu(), self._real())):
            alive[row, line[real]] = True
        at = (arange_of(unit.ranges, torch.device("cpu")) for unit in self.images)
        return [alive[unit.row, positions].nonzero().flatten() for unit, positions in zip(self.images, at)]

    def _real(self) -> Tensor:
        """[B, n] bool on the host."""
        return torch.ones_like(self.index, dtype=torch.bool).cpu() if self.valid is None else self.valid.cpu()

    def to_dict(self) -> dict[str, Any]:
        """All that is known as plain ints, floats, strings and lists, as `json.dumps` takes them; waits for the device.

        The fields by their names (`units`, `tower_units` as of `UnitResult.to_dict`), but: "index" holds a row's
        positions without padding, so there is no "valid"; "notes" and "seconds" stand for `said` and `clocks`;
        "images" is [{"row", "modality", "n", "ranges", "grids", "kept"}], kept as `kept` says; the layers of
        "recalled" and "heads" are texts, as in all JSON. A score that is no number (inf, nan) is None.
        """
        names = ("src", "lengths", "policies", "kernels", "tower_lengths", "recalled", "heads", "together")
        images = [
            {"row": u.row, "modality": u.modality, "n": u.n, "ranges": plain(u.ranges),
             "grids": [list(s.grid) for s in u.spans], "kept": idx.tolist()}
            for u, idx in zip(self.images, self.kept())
        ]  # fmt: skip
        return {
            "index": [line[real].tolist() for line, real in zip(self.index.cpu(), self._real())],
            **{name: plain(getattr(self, name)) for name in names},
            "units": [unit.to_dict() for unit in self.units],
            "tower_units": [unit.to_dict() for unit in self.tower_units],
            "images": images,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def draw(self, image: Any, which: int | slice | None = None, processor: Any = None) -> Any:
        """A PIL image: the picture with kept tokens in full colour, merged ones half faded and dropped ones faded.

        image: the PIL picture that was asked about, or for a video the clip, a `vtprune.evals.video.Video`.
        which: its number among `images`, needed where there are several; a slice where text stands between the crops
        of one picture, each of which counts. processor: the model's, which is shown test pictures to find where each
        token looked; without one, tokens are drawn as if they had seen the whole picture.

        Raises ValueError where there is no such image, or its tokens form no grid that is known.
        """
        from ..show import draw_kept

        return draw_kept(self, image, which, processor)

    def _repr_html_(self) -> str:
        from ..summary import html

        return html(self)


def plain(value: Any) -> Any:
    """Tensors and tuples as lists, spans as mappings, keys as texts, what is no number as None."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Span):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, slice):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def joined_by_row(results: list[UnitResult]) -> list[UnitResult]:
    """One result a row: the clips of a sample side by side, in the order in which they stand there."""
    rows: dict[int, list[UnitResult]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return [parts[0] if len(parts) == 1 else _side_by_side(parts) for parts in rows.values()]


def _side_by_side(parts: list[UnitResult]) -> UnitResult:
    """Results of units that follow each other in a row, as one of all their tokens."""
    starts = list(accumulate((p.n for p in parts), initial=0))
    kept = list(accumulate((len(p.idx) for p in parts), initial=0))
    answers = [p.assignment for p in parts]
    spans = [replace(s, start=s.start + n) for p, n in zip(parts, starts) for s in p.spans]
    merged: dict[str, Tensor] = {}
    if any(a.merges for a in answers):
        weights = [_weights(a) for a in answers]
        merged = {
            "src": torch.cat([src + n for (src, _, _), n in zip(weights, starts)]),
            "dst": torch.cat([dst + k for (_, dst, _), k in zip(weights, kept)]),
            "w": torch.cat([w for _, _, w in weights]),
        }
    scores = [p.scores for p in parts]
    orders = [p.order for p in parts]
    answer = Assignment(
        torch.cat([p.idx + n for p, n in zip(parts, starts)]),
        None if any(o is None for o in orders) else torch.cat([o + n for o, n in zip(orders, starts)]),  # type: ignore
        **merged,
        scores=None if any(x is None for x in scores) else torch.cat(scores),  # type: ignore[arg-type]
    )
    return replace(
        parts[0],
        n=starts[-1],
        positions=torch.cat([p.positions for p in parts]),
        idx=answer.idx,
        order=answer.order,
        scores=answer.scores,
        spans=tuple(spans) if all(p.spans for p in parts) else (),
        grid=None,
        assignment=answer,
        seen=torch.cat([p.seen for p in parts if p.seen is not None]),
    )


def _weights(answer: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """(src, dst, w) of an answer, also of one that merges nothing."""
    if answer.src is not None and answer.dst is not None and answer.w is not None:
        return answer.src, answer.dst, answer.w
    return answer.idx, torch.arange(len(answer.idx), device=answer.idx.device), torch.ones_like(answer.idx).float()
