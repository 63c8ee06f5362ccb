"""Figures of the reports: accuracy against what it costs, and time to the first token against visual tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtprune.evals.speed import Limits

Row = dict[str, Any]
# Okabe-Ito colours, which stay apart for colour-blind readers; the controls are grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B")
_MARKERS = ("o", "^", "s")
LABELLED = 8
_CONTROLS = {"random": ("#8a8a8a", "--"), "uniform": ("#444444", ":")}


def pareto(rows: Sequence[Row], title: str, path: str | Path) -> Path:
    """Write a PNG of accuracy against cost: the mean over capabilities large, every capability small on the right.

    At most `LABELLED` curves have a colour and a name, the controls and the methods that lead; the others are grey.

    rows: those of the capability "mean" hold the costs. The cost of the left panel and of the small ones is the share
    of visual tokens in an average layer of the LLM; that of the second is the FLOPs of the prefill, where known.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs = {(row["method"], row["keep"]): row for row in rows if row["capability"] == "mean"}
    names = [n for n in dict.fromkeys(row["capability"] for row in rows) if n != "mean"]
    columns = 3 if len(names) <= 9 else 4
    lines = -(-len(names) // columns)
    large = ["llm_share", "flops"] if all(row["flops"] is not None for row in costs.values()) else ["llm_share"]
    figure = Figure(figsize=(5 * len(large) + 1.8 * columns, max(5.0, 1.75 * lines) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    named = _leaders([row for row in rows if row["capability"] == "mean" and row["keep"] != 1.0], costs)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(5 * len(large), 1.8 * columns))[0]
    axes = left.subplots(1, len(large), sharey=True, squeeze=False)[0]
    for axis, cost in zip(axes, large):
        _curves(axis, rows, "mean", costs, cost, named)
        axis.set(xlabel=COSTS[cost])
    axes[0].set(ylabel="answer right, mean over capabilities")
    handles, labels = axes[0].get_legend_handles_labels()
    left.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3 * len(large))
    small = right.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for cell, name in zip(small.flat, names):
        _curves(cell, rows, name, costs, "llm_share", named, marks=2.5)
        cell.set_title(name, fontsize=9)
        cell.tick_params(labelsize=6.5)
    for cell in small.flat[len(names) :]:
        cell.set_axis_off()
    figure.suptitle(title, fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


COSTS = {
    "llm_share": "visual tokens in an average layer of the LLM",
    "flops": "FLOPs of the prefill (tower, projector, LLM), of dense = 1",
}


def _curves(
    axis: Any,
    rows: Sequence[Row],
    capability: str,
    costs: dict[tuple[str, Any], Row],
    cost: str,
    named: Sequence[str],
    marks: float = 5,
) -> None:
    mine = [row for row in rows if row["capability"] == capability]
    full = next(row["right"] for row in mine if row["method"] == "dense")
    blind = max(row["right"] for row in mine if row["method"].startswith("blind"))
    axis.axhline(full, color="black", lw=1, label="all tokens")
    axis.axhspan(0, blind, color="black", alpha=0.08, lw=0, label="blind")
    pruned = [row for row in mine if row["keep"] != 1.0]
    others = sorted({row["method"] for row in pruned} - set(named))
    for i, method in enumerate(others):
        own = sorted((costs[method, row["keep"]][cost], row["right"]) for row in pruned if row["method"] == method)
        label = f"{len(others)} other method{'s' * (len(others) > 1)}" if i == 0 else None
        axis.plot(*zip(*own), "-", color="#c4c4c4", marker="o", ms=marks / 2, lw=0.8, label=label, zorder=1)
    for method, (color, style, marker) in _styles([row for row in pruned if row["method"] in named]).items():
        own = [(costs[method, row["keep"]][cost], row) for row in pruned if row["method"] == method]
        points = sorted(own, key=lambda point: (point[0], point[1]["keep"]))
        x = [at for at, _ in points]
        y = [row["right"] for _, row in points]
        hollow = {} if marker == "o" else {"mfc": "white"}
        axis.plot(x, y, style, color=color, marker=marker, ms=marks, lw=1.4, label=method, **hollow)
        axis.fill_between(x, [r["low"] for _, r in points], [r["high"] for _, r in points], color=color, alpha=0.1)
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.25, lw=0.5)
    if cost == "llm_share":
        _share_axis(axis, [row[cost] for row in costs.values()], large=marks >= 5)


def ttft(saved: Sequence[tuple[Row, Limits]], path: str | Path) -> Path:
    """Write a PNG, a panel for each benchmark: time to the first token against visual tokens kept, and both limits.

    saved: what a benchmark wrote, and the limits it was measured against. Nothing can lie below the roofline; the
    stack's floor is what this software reaches at best, vision and a forward pass of one token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(saved), 2)
    lines = -(-len(saved) // columns)
    figure = Figure(figsize=(max(7.0, 6.2 * columns), 5.0 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, (one, limits) in zip(axes.flat, saved):
        _ttft_panel(axis, one, limits)
    for axis in axes.flat[len(saved) :]:
        axis.set_axis_off()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def overhead(rows: Sequence[Row], title: str, path: str | Path, allowed: float = 0.02) -> Path:
    """Write a PNG of what pruning costs: a bar a method, the least on top, a panel a model.

    rows: geometry, visual, method, and overhead as a share of the dense prefill; that of the least times, where it is
    known, is marked on the bar. allowed: the share with a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys((row["geometry"], row["visual"]) for row in rows))
    tallest = max(sum(row["geometry"] == name for row in rows) for name, _ in models)
    figure = Figure(figsize=(5.5 * len(models), 1.6 + 0.2 * tallest), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, visual) in zip(figure.subplots(1, len(models), squeeze=False)[0], models):
        own = sorted((row for row in rows if row["geometry"] == name), key=lambda row: row["overhead"], reverse=True)
        shares = [100 * row["overhead"] for row in own]
        colors = [_COLORS[1] if row["overhead"] > allowed else _COLORS[0] for row in own]
        axis.barh([row["method"] for row in own], shares, color=colors, height=0.7)
        told = [f"{round(share, 1) + 0.0:.1f}" for share in shares]  # no minus before a zero
        if all("least" in row for row in own):
            least = [100 * row["least"]["overhead"] for row in own]
            axis.plot(least, range(len(own)), "|", color="black", ms=8, mew=1.2, label="by the least times")
            told = [f"{one} / {round(share, 1) + 0.0:.1f}" for one, share in zip(told, least)]
        for place, text in enumerate(told):
            axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=7)
        axis.axvline(100 * allowed, color="#b00000", lw=1, ls="--", label=f"{100 * allowed:.3g} %", zorder=1)
        axis.axvline(0, color="black", lw=0.8)
        axis.margins(x=0.05, y=0.01)
        axis.set_xlabel("overhead, % of the dense prefill")
        axis.set_title(f"{name}: {visual} visual tokens", fontsize=10, loc="left")
        axis.tick_params(axis="y", labelsize=7.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25, lw=0.5)
        axis.legend(fontsize=8, framealpha=1, edgecolor="none", loc="upper right")
    figure.suptitle(title, fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def tuned(tried: Sequence[Row], finalists: Sequence[Row], allowed: float, title: str, path: str | Path) -> Path:
    """Write a PNG of a search: the drop against the time to the first token, all that was tried and the finalists.

    tried: rows with method, keep, drop and ttft_ms as they were when each left the search. finalists: rows with low and
    high beside, the recommended first, dense last. allowed: the drop that is wanted at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    from vtprune.evals.report import share

    points = [(row["ttft_ms"], 100 * row["drop"]) for row in tried]
    axis.plot(*zip(*points), "o", ms=3.5, color="#b0b0b0", label="left on the way, on fewer samples")
    names = list(dict.fromkeys(row["method"] for row in finalists[:-1]))
    for row in finalists:
        color = "black" if row is finalists[-1] else _COLORS[names.index(row["method"]) % len(_COLORS)]
        label = row["method"] + ("" if row["keep"] is None else f" at {share(row['keep'])}")
        bounds = [[100 * (row["drop"] - row["low"])], [100 * (row["high"] - row["drop"])]]
        marker = "*" if row is finalists[0] else "o"
        axis.errorbar(
            row["ttft_ms"], 100 * row["drop"], [[max(0.0, b[0])] for b in bounds], fmt=marker, color=color, capsize=3,
            ms=11 if marker == "*" else 6, label=label,
        )  # fmt: skip
    axis.axhline(100 * allowed, color="#b00000", lw=1, ls="--", label=f"a drop of {100 * allowed:.3g} %")
    axis.set(xlabel="time to first token, ms", ylabel="share of the dense score lost, %", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _ttft_panel(axis: Any, one: Row, limits: Limits) -> None:
    rows, env = one["rows"], one["environment"]
    whole, text = env["visual_tokens"], env["tokens"] - env["visual_tokens"]
    for mode, style in zip(dict.fromkeys(row["prefill"] for row in rows), ("-", "--", ":")):
        of = "" if mode == "eager" else f", {mode}"
        mine = [row for row in rows if row["prefill"] == mode]
        dense = next(row for row in mine if row["method"] == "dense")
        axis.plot(whole, dense["ttft_ms"], "D", color="black", ms=5, label=f"dense{of}", zorder=5)
        for method, (color, _, marker) in _styles([row for row in mine if row is not dense]).items():
            points = sorted((mean(row["kept_by_layer"]), row["ttft_ms"]) for row in mine if row["method"] == method)
            x, y = zip(*points, (whole, dense["ttft_ms"]))
            axis.plot(x, y, style, color=color, marker=marker, ms=4, lw=1.5, label=f"{method}{of}")
        floor = 1e3 * limits.stack(mode)
        dashes = (0, (6, 3)) if style == "-" else style
        axis.axhline(floor, color="#555555", lw=1, ls=dashes, label=f"stack limit{of}: vision + one token")
    some = [whole * i / 100 for i in range(101)]
    ideal = [1e3 * limits.ideal(round(n) + text) for n in some]
    axis.plot(some, ideal, color="black", lw=1.2, label="roofline limit")
    axis.fill_between(some, ideal, color="black", alpha=0.07, lw=0)
    axis.set(xlabel="visual tokens in the LLM, mean over its layers", ylabel="time to first token, ms")
    axis.set_xlim(0, 1.02 * whole)
    axis.set_ylim(0, 1.12 * max(row["ttft_ms"] for row in rows))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    machine = f"{env['geometry']}: {env['gpu'] or env['cpu']}, {env['dtype']}, batch {env['batch']}"
    axis.set_title(machine, fontsize=10, loc="left", pad=20 if env["shrunk"] else 8)
    if env["shrunk"]:
        axis.text(0, 1.02, env["shrunk"], transform=axis.transAxes, fontsize=8, color="#b00000")


def _leaders(rows: Sequence[Row], costs: dict[tuple[str, Any], Row]) -> list[str]:
    """The methods whose curves have a name: the controls, `auto`, those that no cheaper row reaches, then the best.

    Methods that hold more than half of the tokens in an average layer come last: they save little.
    """
    share = {name: mean(costs[key]["llm_share"] for key in costs if key[0] == name) for name, _ in costs}
    means = {row["method"]: mean(r["right"] for r in rows if r["method"] == row["method"]) for row in rows}
    own = [name for name in means if "positions=" not in name]
    best, front = -1.0, []
    for row in sorted(rows, key=lambda row: (costs[row["method"], row["keep"]]["llm_share"], -row["right"])):
        if row["right"] > best and row["method"] in own and share[row["method"]] <= 0.5:
            best = row["right"]
            front.append(row["method"])
    first = [name for name in (*_CONTROLS, "auto") if name in means]
    ranked = sorted(own or means, key=lambda name: (share[name] > 0.5, -means[name], name))
    return list(dict.fromkeys([*first, *front, *ranked]))[:LABELLED]


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str, str]]:
    """Colour, line and marker of every method; once the colours are used up, they come again with other markers.

    A method with the other way of numbering positions has the colour of the method, crosses and dots.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    own = [name for name in names if name not in _CONTROLS and "positions=" not in name]
    rounds = {name: divmod(i, len(_COLORS)) for i, name in enumerate(own)}
    styles = {
        name: (_COLORS[i], "-." if turn else "-", _MARKERS[turn % len(_MARKERS)]) for name, (turn, i) in rounds.items()
    }

    def style(name: str) -> tuple[str, str, str]:
        if name in _CONTROLS:
            return (*_CONTROLS[name], "o")
        if name in styles:
            return styles[name]
        base = re.split("[:,]positions=", name)[0]
        return styles[base][0] if base in styles else _COLORS[0], ":", "X"

    return {name: style(name) for name in names}


def _share_axis(axis: Any, shares: Sequence[float], large: bool) -> None:
    """A logarithmic axis of shares, from the least one to all."""
    axis.set_xscale("log")
    known = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0) if large else (0.01, 0.05, 0.25, 1.0)
    least = min(shares)
    ticks = [share for share in known if share >= 0.8 * least]
    axis.set_xlim(0.9 * least, 1.1)
    axis.set_xticks(ticks, [f"{100 * share:.3g} %" for share in ticks])
    axis.set_xticks([], minor=True)
