"""Charts of an evaluation: relative accuracy against visual tokens and against time, as SVG for a page and as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.evals.accuracy.plans import CONTROLS
from vtprune.evals.report import Row, share
from vtprune.evals.tasks.cells import DENSE
from vtprune.evals.tasks.svg import Axis, Curve, Point, drawing
from vtprune.evals.tasks.wording import bounded, milliseconds

# One colour for each method, on white and on black, dark and bright enough to be told apart there. The controls are
# grey. A ninth method begins again with another mark.
LIGHT = ("#0b6bcb", "#c2570c", "#15803d", "#9333ea", "#be185d", "#0f766e", "#7c4a21", "#6b7a00")
DARK = ("#5aa9ff", "#ff9d5c", "#4ecf80", "#c08bff", "#ff7ab8", "#3fd0c4", "#d0a27a", "#c3cf4a")
GREY = "#767676"
DASHES = {"random": "5 3", "uniform": "1.5 3"}
TOKENS, TTFT = "tokens", "ttft"
TITLES = {TOKENS: "visual tokens in the LLM, mean (log scale)", TTFT: "time to first token, ms"}


@dataclass(frozen=True)
class Style:
    """How a method is drawn everywhere: the place of its colour (None: grey), its dashes and its mark."""

    colour: int | None
    dash: str = ""
    mark: int = 0


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    """The style of every method but dense, in the order of the rows."""
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != DENSE.label]
    own = [name for name in names if name not in CONTROLS]
    of = {name: Style(i % len(LIGHT), "", i // len(LIGHT)) for i, name in enumerate(own)}
    return {name: of[name] if name in of else Style(None, DASHES[name]) for name in names}


def curves(rows: Sequence[Row], times: Sequence[Row], task: str, axis: str) -> list[Curve]:
    """A curve for every method with its budgets on it, `random` and `uniform` first; `axis`: TOKENS or TTFT."""
    looks = styles(rows)
    found: dict[str, list[Point]] = {name: [] for name in looks}
    for row, time in zip(rows, times):
        x = _place(row, time, axis)
        if row["task"] == task and row["relative"] is not None and x is not None and row["method"] in found:
            tip = f"{_title(row)}: {bounded(row)} of dense; {_cost(row, time)}"
            found[row["method"]].append(Point(x, row["relative"], row["low"], row["high"], tip))
    return [
        Curve(name, looks[name].colour, looks[name].dash, looks[name].mark, sorted(points, key=lambda p: p.x))
        for name, points in sorted(found.items(), key=lambda item: item[0] not in CONTROLS)
        if points
    ]


def dense_point(rows: Sequence[Row], times: Sequence[Row], task: str, axis: str) -> Point | None:
    """Where the unpruned model stands."""
    for row, time in zip(rows, times):
        x = _place(row, time, axis)
        if row["task"] == task and row["method"] == DENSE.label and row["relative"] is not None and x is not None:
            return Point(x, row["relative"], None, None, f"dense: {_cost(row, time)}")
    return None


def pareto_svg(rows: Sequence[Row], times: Sequence[Row], task: str, axis: str, width: int, height: int) -> str | None:
    """The chart as SVG of `width` x `height` pixels; None where nothing has a place on this axis."""
    drawn, dense = curves(rows, times, task, axis), dense_point(rows, times, task, axis)
    if not drawn:
        return None
    title = f"Relative accuracy against {TITLES[axis]}, {task}"
    return drawing(drawn, dense, Axis(TITLES[axis], axis == TOKENS), width, height, title)


def pareto_png(rows: Sequence[Row], times: Sequence[Row], task: str, title: str, path: Path) -> Path:
    """The charts against tokens and, where it was measured, against time, side by side as a PNG for a README."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [axis for axis in (TOKENS, TTFT) if curves(rows, times, task, axis)]
    figure = Figure(figsize=(5.6 * max(len(shown), 1), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for i, axis in enumerate(shown):
        panel = figure.add_subplot(1, len(shown), i + 1)
        drawn, dense = curves(rows, times, task, axis), dense_point(rows, times, task, axis)
        _panel(panel, drawn, dense, 1.012 if axis == TOKENS else 1.0)
        panel.set(xlabel=TITLES[axis], ylabel="relative accuracy, % of dense" if i == 0 else "")
        if axis == TOKENS:
            _token_axis(
                panel, sorted({p.x for p in [*(p for c in drawn for p in c.points), *([dense] if dense else [])]})
            )
    handles, labels = figure.axes[0].get_legend_handles_labels() if shown else ([], [])
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, max(len(labels), 1)), frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _panel(panel: Any, drawn: Sequence[Curve], dense: Point | None, apart: float) -> None:
    """apart: the factor that sets methods of one budget apart, which would hide one another's intervals."""
    panel.axhline(100, color="#999999", lw=0.8)
    for i, curve in enumerate(drawn):
        x = [p.x * apart ** (i - (len(drawn) - 1) / 2) for p in curve.points]
        colour = GREY if curve.colour is None else LIGHT[curve.colour]
        style = {"5 3": "--", "1.5 3": ":"}.get(curve.dash, "-")
        mark, y = "os^D"[curve.mark % 4], [100 * p.y for p in curve.points]
        panel.plot(x, y, style, color=colour, marker=mark, ms=5, lw=1.6, label=curve.name)
        for at, p in zip(x, curve.points):
            if p.low is not None and p.high is not None:
                panel.vlines(at, 100 * p.low, 100 * p.high, color=colour, lw=1, alpha=0.45)
    if dense is not None:
        panel.plot([dense.x], [100 * dense.y], "D", color="black", ms=6, label="dense")
    panel.grid(alpha=0.25, lw=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _token_axis(panel: Any, tokens: Sequence[float]) -> None:
    panel.set_xscale("log")
    apart = [t for i, t in enumerate(tokens) if i == 0 or t > 1.15 * tokens[i - 1]]
    panel.set_xticks(apart, [f"{t:.0f}" for t in apart])
    panel.set_xticks([], minor=True)


def _place(row: Row, time: Row, axis: str) -> float | None:
    if axis == TTFT:
        return time["ttft_ms"]
    return None if row["visual_tokens"] is None else max(row["visual_tokens"][1], 0.5)  # a log scale has no 0


def _title(row: Row) -> str:
    return row["method"] if row["keep"] is None else f"{row['method']} at {share(row['keep'])}"


def _cost(row: Row, time: Row) -> str:
    tokens = row["visual_tokens"]
    told = "" if tokens is None else f"{tokens[1]:.0f} of {tokens[0]:.0f} visual tokens"
    ttft = time["ttft_ms"]
    return told if ttft is None else f"{told}, TTFT {milliseconds(ttft)} ms"
