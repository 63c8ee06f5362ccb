"""The report of an evaluation: one HTML file that needs no network, and the same chart as a PNG for a README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.evals.accuracy.plans import CONTROLS
from vtprune.evals.report import Row, share
from vtprune.evals.tasks import charts, wording
from vtprune.evals.tasks.cells import DENSE
from vtprune.evals.tasks.differences import differences
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.gather import gather
from vtprune.evals.tasks.published import PRESETS, Published, published
from vtprune.evals.tasks.scores import MEAN, RANDOM
from vtprune.evals.tasks.summary import Summary, by_cost, summarise

ENOUGH = 0.95  # of the dense score: the headline names the smallest budget that keeps so much
WIDE, NARROW = (560, 400), (350, 360)  # pixels of a chart beside another one, and on a telephone


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report on the evaluation in `folder` to `out` (FOLDER/report.html), and pareto.png beside it.

    Returns the path of the page. Raises ValueError where the folder holds no evaluation, or nothing finished yet.
    """
    results = ResultFolder(folder)
    summary = summarise(results)
    if not summary.rows:
        raise ValueError(f"{folder} holds no finished cell yet: run `vtprune eval` with the same options to go on")
    out = folder / "report.html" if out is None else out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(results, summary), encoding="utf-8")
    task = _subject(summary)
    charts.pareto_png(summary.rows, summary.timing.rows, task, _over(summary), out.with_name("pareto.png"))
    return out


def page(folder: ResultFolder, summary: Summary) -> str:
    """The report as HTML. Whatever comes from the run is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("vtprune.evals.tasks", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.globals.update(w=wording, share=share)
    return env.get_template("report.html").render(
        title=summary.title,
        headline=headline(summary),
        figures=_figures(summary),
        small=_small(summary),
        rows=_pairs(summary),
        tasks=list(dict.fromkeys(row["task"] for row in summary.rows)),
        methods=list(dict.fromkeys(row["method"] for row in summary.rows)),
        styles=charts.styles(summary.rows),
        light=charts.LIGHT,
        dark=charts.DARK,
        grey=charts.GREY,
        notes=summary.notes,
        time_notes=summary.timing.notes,
        differences=differences(folder, gather(folder)),
        settings=_flat({k: summary.document.get(k) for k in ("model", "data", "settings")}),
        environment=_flat(summary.environment),
        command=summary.environment.get("command"),
        published=_published(summary),
    )


def headline(summary: Summary) -> str:
    """One or two sentences: what the smallest sufficient budget is, and whether it beats random tokens."""
    task = _subject(summary)
    pairs = [(row, time) for row, time in zip(summary.rows, summary.timing.rows) if row["task"] == task]
    own = [(row, time) for row, time in pairs if row["method"] not in (DENSE.label, *CONTROLS)]
    known = [(row, time) for row, time in own if row["relative"] is not None and row["visual_tokens"] is not None]
    if not known:
        return "No pruning method has finished on every task yet, with its tokens counted and a dense score beside it."
    good = [pair for pair in known if pair[0]["relative"] >= ENOUGH]
    if good:
        row, time = min(good, key=lambda pair: (pair[0]["visual_tokens"][1], -pair[0]["relative"]))
    else:
        row, time = max(known, key=lambda pair: pair[0]["relative"])
    random = next((r for r, _ in pairs if r["method"] == RANDOM and r["keep"] == row["keep"]), None)
    end = "." if good else f": no method keeps {100 * ENOUGH:.0f} %."
    return _kept(row, time) + end + _against_random(row, random)


def _kept(row: Row, time: Row) -> str:
    before, after = row["visual_tokens"]
    said = f"{row['method']} keeps {wording.bounded(row)} of the dense accuracy"
    said += f" with {after:.0f} of {before:.0f} visual tokens ({100 * after / before:.0f} %)"
    if time["speedup"] is not None:
        said += f", and the first token comes {time['speedup']:.2f} times as fast"
    return said


def _against_random(row: Row, random: Row | None) -> str:
    if random is None or row["beats_random"] is None:
        return ""
    beats = "which it beats" if row["beats_random"] else "which it does not beat beyond noise"
    return f" As many random tokens keep {wording.percent(random['relative'])} %, {beats}."


def _subject(summary: Summary) -> str:
    """What the large charts show: the mean over tasks, or the only task."""
    names = [row["task"] for row in summary.rows]
    return MEAN if MEAN in names else names[0]


def _over(summary: Summary) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in summary.rows if row["task"] != MEAN))
    named = ", ".join(tasks) if len(tasks) <= 4 else f"{len(tasks)} tasks"
    return f"{summary.document['model']}, {'mean over ' if len(tasks) > 1 else ''}{named}"


def _figures(summary: Summary) -> list[Row]:
    """The large charts, each in two sizes."""
    found = []
    for axis, name in ((charts.TOKENS, "Accuracy against visual tokens"), (charts.TTFT, "Accuracy against time")):
        made = [
            charts.pareto_svg(summary.rows, summary.timing.rows, _subject(summary), axis, *size)
            for size in (WIDE, NARROW)
        ]
        found.append({"title": name, "wide": made[0], "narrow": made[1], "over": _over(summary)})
    return found


def _small(summary: Summary) -> list[Row]:
    """A small chart for every task, where there are several."""
    tasks = list(dict.fromkeys(row["task"] for row in summary.rows if row["task"] != MEAN))
    rows, times = summary.rows, summary.timing.rows
    made = [(task, charts.pareto_svg(rows, times, task, charts.TOKENS, 350, 280)) for task in tasks]
    return [{"task": task, "svg": svg} for task, svg in made if svg is not None] if len(tasks) > 1 else []


def _published(summary: Summary) -> Published | None:
    """The figures of the papers, where the run followed a preset of ours and some are known."""
    preset = summary.document.get("settings", {}).get("preset")
    if preset not in PRESETS:
        return None
    found = published(preset, dict.fromkeys(row["method"] for row in summary.rows))
    return found if found.rows else None


def _pairs(summary: Summary) -> list[tuple[Row, Row]]:
    """Scores beside times, by cost; the means first, which most readers want, not at all where there is one task."""
    pairs = list(zip(summary.rows, summary.timing.rows))
    alone = len({row["task"] for row in summary.rows} - {MEAN}) < 2
    tasks = list(dict.fromkeys(row["task"] for row in summary.rows))
    pairs.sort(key=lambda pair: (tasks.index(pair[0]["task"]), by_cost(pair[0])))
    means = [pair for pair in pairs if pair[0]["task"] == MEAN]
    return [*([] if alone else means), *(pair for pair in pairs if pair[0]["task"] != MEAN)]


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) lines."""
    if isinstance(value, dict):
        return [line for key, part in value.items() for line in _flat(part, f"{name}.{key}" if name else key)]
    text = value if isinstance(value, str) else ", ".join(map(str, value)) if _plain(value) else json.dumps(value)
    return [] if value is None else [(name, text)]


def _plain(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, str | int | float) for one in value)
