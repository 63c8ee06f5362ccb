"""Entries of a feature call (an image, a tile or a video each), and the units of the prompt that they become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vtprune.core.signal import Signal
from vtprune.core.units import Unit
from vtprune.core.visual import Span

MODALITIES: tuple[Literal["image", "video"], ...] = ("image", "video")


@dataclass
class Features:
    """One observed `get_{image,video}_features` call: sizes, spans and signals of every entry it returned.

    tower: what stages inside the tower did (`vtprune.hf.tower_run.TowerRun`), if there were any. kernels, clocks: which
    kernels ran meanwhile, and how long the signals took. elsewhere: the call brought the features, or has them merged
    into its embeddings, so there are no signals, and what is known of them is what the call says.
    """

    sizes: list[int]
    spans: list[tuple[Span, ...]]
    signals: list[dict[Signal, Tensor]]
    tower: Any = None
    kernels: dict[str, Any] = field(default_factory=dict)
    clocks: list[Any] = field(default_factory=list)
    elsewhere: bool = False


def of_this_call(features: Features, total: int, rows: int) -> Features | None:
    """Those of so many tokens that stand in this call: grids may be those of earlier turns too, or of other rows."""
    if sum(features.sizes) and total % sum(features.sizes) == 0 and rows % (total // sum(features.sizes)) == 0:
        return features
    for first in range(1, len(features.sizes)):
        if sum(features.sizes[first:]) == total:
            return Features(features.sizes[first:], features.spans[first:], features.signals[first:], elsewhere=True)
    return None


def with_newline(features: Features) -> Features:
    """Every entry with one separator token behind it; signals have a row for it already."""
    return Features([n + 1 for n in features.sizes], features.spans, features.signals)


def by_tile(features: Features) -> Features:
    """An entry for each raster where entries are nothing but rasters side by side."""
    sizes: list[int] = []
    spans: list[tuple[Span, ...]] = []
    signals: list[dict[Signal, Tensor]] = []
    for n, parts, own in zip(features.sizes, features.spans, features.signals):
        whole = sum(len(span) for span in parts) == n
        for span in parts if whole else ():
            sizes.append(len(span))
            spans.append((Span(0, span.grid, span.newline, span.tiles),))
            signals.append({k: v[span.start : span.start + len(span)] for k, v in own.items()})
        if not whole:
            sizes, spans, signals = [*sizes, n], [*spans, parts], [*signals, own]
    return Features(sizes, spans, signals, elsewhere=features.elsewhere)


def split_runs(units: list[Unit]) -> list[Unit]:
    """One unit per run: where text stands between tiles, each tile is pruned by itself."""
    out: list[Unit] = []
    for u in units:
        start = 0
        for run in u.ranges:
            signals = {k: v[start : start + run[1]] for k, v in u.signals.items()}
            spans = tuple(Span(0, s.grid) for s in u.spans if s.start == start and len(s) == run[1])
            out.append(Unit(u.row, u.modality, [run], spans, signals))
            start += run[1]
    return out


def join_runs(units: list[Unit]) -> list[Unit]:
    """One unit per run: tiles that stand side by side are one image."""
    out: list[Unit] = []
    for u in units:
        last = out[-1] if out else None
        if last is None or last.row != u.row or sum(last.ranges[-1]) != u.ranges[0][0]:
            out.append(u)
            continue
        spans = tuple(Span(s.start + last.n, s.grid, s.newline) for s in u.spans)
        signals = {k: torch.cat([v, u.signals[k]]) for k, v in last.signals.items()}
        joined = (last.ranges[0][0], last.n + u.n)
        out[-1] = Unit(u.row, u.modality, [joined], last.spans + spans, signals)
    return out
