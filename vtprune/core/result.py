"""What a prefill leaves behind: `UnitResult` of one unit at one stage, and `Last` of the whole call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.clock import Clock
from ..kernels.dispatch import Backend
from .method import Where
from .units import Unit, emptied, kept_by_crop
from .visual import Assignment, Span


@dataclass(frozen=True)
class UnitResult:
    """What one stage did to one unit, also where it kept all of it and the method was not asked.

    positions: [K] int64, kept positions in the row as fed. idx: [K] the same counted inside the unit's n tokens as
    the stage found them. order: [K] pick order, or None. scores: [n] or None. spans, grid: rasters of the unit.
    image: number of the image in the batch; part: number of the crop or frame in it, None for the whole.
    seen: [n] int64, where the tokens that the stage found stand in the row as fed; None inside the vision tower.
    With per="sample" a row is one unit, also where the method saw its clips one by one.
    """

    row: int
    image: int
    part: int | None
    modality: str
    method: str
    where: Where
    n: int
    positions: Tensor
    idx: Tensor
    order: Tensor | None
    scores: Tensor | None
    spans: tuple[Span, ...]
    grid: tuple[int, int, int] | None
    assignment: Assignment
    seen: Tensor | None = None

    @property
    def kept_by_crop(self) -> list[int]:
        """Kept tokens in each crop of the unit, newlines not counted; waits for the device."""
        return kept_by_crop(self.spans, self.n, self.idx)


@dataclass(frozen=True)
class TowerStep:
    """What a stage did at one block of the vision tower, as tensors of the whole batch; results are made when asked."""

    where: Where
    results: Callable[[], list[UnitResult]]


@dataclass(frozen=True)
class Last:
    """What the last prefill kept. Of packed rows every sample is a row of its own here, left-padded to the longest.

    index: [B, n] int64 positions in the rows as fed, after all stages. valid: [B, n] bool or None (no padding).
    src: [B, L] int64, the slot that answers for each position fed. units: one `UnitResult` per unit and stage of which
    the method was asked; where a stage leaves all units whole, these.
    lengths: tokens each decoder layer ran on. said: fallbacks that were used, see `notes`. policies: how each stage
    dealt out its budget. kernels: which implementation of each kernel ran, "reference" or "triton".
    tower_steps, tower_lengths: if stages stand inside the vision tower, what each did there (see `tower_units`); and by
        modality the rows each block ran on, of its longest crop (of all images where the tower packs them). `units`
        then starts with what all of them together left of each image.
    heads: of stages that choose among heads, by layer: for each row [K] int64 the query heads that speak behind it.
    recalled: of stages that act at decode, by layer: for each row the positions as fed [K] of the visual tokens that
        the last decode step saw there; empty before the first step that chose.
    images, together: every image and video of the rows as fed, cut or not: where its tokens stand, and their rasters;
        and which of them shared a budget.
    """

    index: Tensor
    valid: Tensor | None
    src: Tensor
    units: list[UnitResult]
    lengths: list[int]
    said: list[str]
    policies: list[str]
    kernels: dict[str, Backend]
    clocks: list[Clock] = field(default_factory=list, repr=False)
    tower_steps: list[TowerStep] = field(default_factory=list, repr=False)
    tower_lengths: dict[str, list[int]] = field(default_factory=dict)
    recalled: dict[int, list[Tensor]] = field(default_factory=dict)
    heads: dict[int, list[Tensor]] = field(default_factory=dict)
    images: list[Unit] = field(default_factory=list, repr=False)
    together: list[int] = field(default_factory=list, repr=False)

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
