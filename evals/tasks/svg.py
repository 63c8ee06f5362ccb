"""One chart as SVG: curves with intervals, a mark for dense, and the name of each curve beside its first point.

Colours come from the page (classes c0, c1, ... and `control`), so that the same drawing fits a light and a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

Scale = Callable[[float], float]
TOP, BOTTOM, RIGHT, TICKS = 26, 44, 16, 40  # margins in pixels
LETTER, LINE = 6.6, 14  # of the labels: the width of a letter, the distance of two lines


@dataclass(frozen=True)
class Point:
    """A place on the chart: x, y and its interval (y as a share of dense), and what is told about it."""

    x: float
    y: float
    low: float | None
    high: float | None
    tip: str


@dataclass(frozen=True)
class Curve:
    """Points that belong together; colour None: a control."""

    name: str
    colour: int | None
    dash: str
    mark: int
    points: list[Point]

    @property
    def style(self) -> str:
        return "control" if self.colour is None else f"c{self.colour}"


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: its title with the unit, and whether it is logarithmic."""

    title: str
    log: bool


def drawing(curves: Sequence[Curve], dense: Point | None, axis: Axis, width: int, height: int, title: str) -> str:
    """The chart as SVG text of `width` x `height` pixels."""
    points = [p for curve in curves for p in curve.points] + ([dense] if dense else [])
    names = max(len(curve.name) for curve in curves)
    labels = min(names, width // 30) * LETTER + 20
    x = _across(points, axis, TICKS + labels, width - RIGHT)
    y, steps = _upwards(points, height)
    parts = [_grid(y, steps, width, height), _ticks(points, x, axis, width, height)]
    dodges = [(i - (len(curves) - 1) / 2) * 3.0 if axis.log else 0.0 for i in range(len(curves))]
    parts += [_curve(curve, x, y, dodge) for curve, dodge in zip(curves, dodges)]
    if dense is not None:
        parts.append(_mark(x(dense.x), y(dense.y), 3, "dense", dense.tip))
        parts.append(
            f'<text class="name" x="{x(dense.x):.1f}" y="{y(dense.y) - 10:.1f}" text-anchor="end">dense</text>'
        )
    parts.append(_names(curves, x, y, dodges, labels, height))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="group" '
        f"aria-label={quoteattr(title)}>{''.join(parts)}</svg>"
    )


def _across(points: Sequence[Point], axis: Axis, left: float, right: float) -> Scale:
    """Pixels of x; the outermost points stand a little inside."""
    shape: Scale = math.log if axis.log else float
    low, high = (shape(f(p.x for p in points)) for f in (min, max))
    span = (high - low) or 1.0
    pad = 14
    return lambda value: left + pad + (shape(value) - low) / span * (right - left - 2 * pad)


def _upwards(points: Sequence[Point], height: int) -> tuple[Scale, list[float]]:
    """Pixels of y, and the shares at which a line is drawn."""
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    steps = nice(min([*ends, 1.0]), max([*ends, 1.0]), 6)
    low, high = steps[0], steps[-1]
    return lambda v: TOP + (high - v) / (high - low) * (height - TOP - BOTTOM), steps


def nice(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers in even steps, from below `low` to above `high`."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * f for f in (1, 2, 2.5, 5, 10, 20) if span / (power * f) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _grid(y: Scale, steps: Sequence[float], width: int, height: int) -> str:
    lines = [f'<text class="axis" x="{TICKS - 36}" y="13">relative accuracy, % of dense</text>']
    for step in steps:
        kind = "grid full" if abs(step - 1) < 1e-9 else "grid"
        lines.append(f'<line class="{kind}" x1="{TICKS}" x2="{width - RIGHT}" y1="{y(step):.1f}" y2="{y(step):.1f}"/>')
        text = f"{100 * step:g}"
        lines.append(_text("tick", TICKS - 6, y(step) + 4, "end", text))
    return "".join(lines)


def _ticks(points: Sequence[Point], x: Scale, axis: Axis, width: int, height: int) -> str:
    low, high = (f(p.x for p in points) for f in (min, max))
    values = sorted({p.x for p in points}) if axis.log else [v for v in nice(low, high, 5) if low <= v <= high]
    base, last, parts = height - BOTTOM, -math.inf, []
    for value in reversed(values):  # the largest, dense, always gets its tick
        at, text = x(value), f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        if abs(at - last) < LETTER * len(text) + 10:
            continue
        last = at
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(_text("tick", at, base + 17, "middle", text))
    return "".join(parts) + _text("axis", width - RIGHT, height - 6, "end", axis.title)


def _curve(curve: Curve, x: Scale, y: Scale, dodge: float) -> str:
    places = [(x(p.x) + dodge, y(p.y)) for p in curve.points]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
    parts = [f'<polyline class="line" points="{line}"{dash}/>']
    for p, (at, _) in zip(curve.points, places):
        if p.low is not None and p.high is not None:
            parts.append(f'<line class="bar" x1="{at:.1f}" x2="{at:.1f}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>')
    parts += [_mark(a, b, curve.mark, "", p.tip) for p, (a, b) in zip(curve.points, places)]
    return f'<g class="{curve.style}" data-method={quoteattr(curve.name)}>{"".join(parts)}</g>'


def _mark(a: float, b: float, mark: int, style: str, tip: str) -> str:
    """A mark inside a larger circle that can be hit and focused; its tip is read aloud and shown."""
    shape = {
        0: f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4"/>',
        1: f'<rect x="{a - 4:.1f}" y="{b - 4:.1f}" width="8" height="8"/>',
        2: f'<path d="M{a:.1f} {b - 5:.1f}l5 9h-10z"/>',
        3: f'<path d="M{a:.1f} {b - 6:.1f}l6 6l-6 6l-6 -6z"/>',
    }[mark % 4]
    hit = f'<circle class="hit" cx="{a:.1f}" cy="{b:.1f}" r="12"/>'
    told = f"aria-label={quoteattr(tip)}><title>{escape(tip)}</title>"
    return f'<g class="mark {style}" tabindex="0" role="img" {told}{hit}{shape}</g>'


def _names(curves: Sequence[Curve], x: Scale, y: Scale, dodges: Sequence[float], width: float, height: int) -> str:
    """The name of every curve left of its first point, moved up or down until no two overlap, with a line to it."""
    order = sorted(range(len(curves)), key=lambda i: y(curves[i].points[0].y))
    wanted = [y(curves[i].points[0].y) for i in order]
    room, begin, parts = int((width - 16) / LETTER), TICKS + width - 12, []
    for i, at in zip(order, spread(wanted, LINE, TOP + 6, height - BOTTOM - 4)):
        curve, first = curves[i], curves[i].points[0]
        name = curve.name if len(curve.name) <= room else curve.name[: room - 1] + "…"
        line = f"M{begin:.1f} {at:.1f}L{x(first.x) + dodges[i] - 6:.1f} {y(first.y):.1f}"
        back = f'x="{TICKS - 1}" y="{at - 7:.1f}" width="{width - 12:.1f}" height="{LINE}"'
        parts.append(f'<g class="{curve.style}"><path class="lead" d="{line}"/><rect class="back" {back}/>')
        parts.append(_text("name", begin - 3, at + 4, "end", name) + "</g>")
    return "".join(parts)


def _text(style: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places near the `wanted` rising ones, `apart` from one another, between `low` and `high` if they fit.

    Labels that would overlap stand in a row around the middle of where they want to be.
    """
    rows: list[tuple[float, int]] = []  # (middle, labels)
    for want in wanted:
        middle, count = want, 1
        while rows and rows[-1][0] + rows[-1][1] * apart / 2 > middle - count * apart / 2:
            before, more = rows.pop()
            middle, count = (before * more + middle * count) / (more + count), more + count
        rows.append((middle, count))
    places = [middle + (i - (count - 1) / 2) * apart for middle, count in rows for i in range(count)]
    for i, place in enumerate(places):
        places[i] = max(place, low if i == 0 else places[i - 1] + apart)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], high if i == len(places) - 1 else places[i + 1] - apart)
    return places
