"""The tables of README.md, the guides and benchmarks/README.md, made anew: `python -m vtprune.evals.readme`.

A comment above each table names what it is made from: the saved files of a run, relative to the file that shows them,
the registry of methods, or the folders of runs.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vtprune
from vtprune.evals import speed
from vtprune.evals.accuracy import CONTROLS, AccuracyReport, share
from vtprune.evals.accuracy.paired import paired
from vtprune.evals.accuracy.rows import COST_HEADER, budget_text, by_cost, cost_cells, difference
from vtprune.evals.report import Row
from vtprune.evals.speed.bench_overhead import OverheadReport
from vtprune.evals.speed.growth import NOTE, GrowthReport

BLOCK = re.compile(
    r"(<!-- vtprune (?:eval(?:-vit| --all| --video --all| --mid --all)|bench --overhead)"
    r"(?:, rows (\S+))?: (\S+) -->\n\n)"
    r".*?(\n\n<!-- end of table -->)",
    re.DOTALL,
)
LISTS = re.compile(r"(<!-- (vtprune methods|runs|auto) -->\n\n).*?(\n\n<!-- end of table -->)", re.DOTALL)
COSTS = (
    "LLM, tower: the share of the visual tokens in an average layer of either. FLOPs of the whole prefill and measured "
    "time to the first token (TTFT): of dense = 1."
)
PAGES = ("README.md", "examples/guides/choose.md", "benchmarks/README.md")
PICTURE = "examples/pictures/ttft.png"


def refreshed(text: str, root: Path) -> str:
    """`text` with every table made anew from what its comment names; root: the folder of the file it stands in."""

    def table(m: re.Match[str]) -> str:
        if "--overhead" in m[1]:
            return m[1] + overhead_tables(root / m[3]) + m[4]
        saved = json.loads((root / m[3]).read_text())
        only = m[2].split(",") if m[2] else None
        return m[1] + (vit_table(saved) if "-vit" in m[1] else summary(saved, only)) + m[4]

    lists: dict[str, Callable[[], str]] = {
        "vtprune methods": methods_table,
        "runs": lambda: runs_table(root),
        "auto": lambda: auto_table(root),
    }
    text = LISTS.sub(lambda m: m[1] + lists[m[2]]() + m[3], text)
    return speed.refreshed(BLOCK.sub(table, text), root)


def methods_table() -> str:
    """A row for each method of this package: where it acts, the signals it reads, and what it does in one line."""
    rows = []
    for cls in vtprune.methods():
        if not cls.__module__.startswith("vtprune.methods."):  # a plug-in that happens to be installed
            continue
        stages = cls().stages(0.25, 32)
        needs = dict.fromkeys(signal.kind for stage in stages for signal in stage.method.needs)
        idea = (sys.modules[cls.__module__].__doc__ or "").splitlines()[0].partition(": ")[2]
        name, reads = f"[`{cls.name}`]({cls.paper})", ", ".join(f"`{kind}`" for kind in needs) or "–"
        cells = name, _acts(cls, stages), reads, idea
        rows.append((cls.seam != "pre_llm", cls.seam == "in_vit", cls.video, cls.name, cells))
    lines = [("method", "acts", "reads", "idea"), ("---",) * 4, *(row[-1] for row in sorted(rows))]
    return _table(lines)


def _acts(cls: type[vtprune.Method], stages: Sequence[vtprune.Stage]) -> str:
    """Where the stages of a method stand in a model of 32 layers."""
    inside = [s for s in stages if isinstance(s.where, int)]
    reads = sum("prefill" in s.method.phases for s in inside)
    places = {
        "inside a tower or ViT": any(isinstance(s.where, tuple) for s in stages),
        "before the LLM": any(isinstance(s.where, str) for s in stages),
        "at a decoder layer" if reads == 1 else f"at {reads} decoder layers": reads > 0,
        "at every decode step": any("decode" in s.method.phases for s in inside),
    }
    return ("video: " if cls.video else "") + ", ".join(place for place, acts in places.items() if acts)


def runs_table(root: Path) -> str:
    """A row for each saved run below `root`, one folder a run: the machine, the versions and the commit."""
    lines = [("run", "machine", "versions", "commit, time"), ("---",) * 4]
    for path in sorted(root.glob("*/*.json")):
        env = json.loads(path.read_text())["environment"]
        versions = ", ".join(f"{name} {number}" for name, number in env["versions"].items() if number)
        machine = f"{env['gpu'] or env['cpu']}, {env['cpu_threads']} thread(s), {env['dtype']}, batch {env['batch']}"
        name = path.relative_to(root)
        lines.append((f"[{name.parent}]({name})", machine, versions, f"{env['commit']}, {env['time'][:16]}"))
    return _table(lines)


def auto_table(root: Path) -> str:
    """`auto` beside other methods on questions of a fresh seed: a row a model and keep, of folders DAY-auto-MODEL.

    Of a model that was asked on several days the last one counts.
    """
    others = "divprune", *reversed(CONTROLS)
    lines = [("model", "questions", "kept", "`auto`", *(f"over `{name}`" for name in others)), ("---", *["---:"] * 6)]
    for name, path in {p.parent.name.rpartition("-")[2]: p for p in sorted(root.glob("*-auto-*/eval.json"))}.items():
        report = AccuracyReport.load(path)
        over = {(other, row["keep"]): row for other in others for row in paired(report, "auto", other)}
        for keep in sorted({keep for _, keep in over}, reverse=True):
            right = f"{100 * over['divprune', keep]['right']:.1f}"
            apart = (difference(over[other, keep]["over"]).replace("±", " ± ") for other in others)
            seen = f"[{name}]({path.parent.name}/eval.md), [plot]({path.parent.name}/pareto.png)"
            lines.append((seen, str(len(report.kinds)), share(keep), right, *apart))
    return _table(lines)


def summary(saved: dict[str, Any], only: Sequence[str] | None = None) -> str:
    """Means over all kinds of question: a row a method and keep, the cheapest first, of one cost the best first.

    only: the rows to show, each a name or NAME@KEEP with the keep as a share of 1; dense is shown always. Accuracies
    that no row of the table reaches at a lower cost are bold. Raises ValueError for a name that is not there.
    """
    mean = sorted((row for row in saved["rows"] if row["capability"] == "mean"), key=by_cost)
    rows = [row for row in mean if not row["method"].startswith("blind")]
    for name in only or ():
        if not any(_named(row, name) for row in rows):
            raise ValueError(f"no row {name}: {', '.join(_name(row) for row in rows)}")
    rows = [row for row in rows if only is None or row["method"] == "dense" or any(_named(row, name) for name in only)]
    kinds = len({row["capability"] for row in saved["rows"]}) - 1
    head = [f"mean of {kinds} kinds of question", "kept", *COST_HEADER, "answer right, %", "vs uniform"]
    lines, best = [head, ["---", *["---:"] * (len(head) - 1)]], -1.0
    for row in rows:
        leads, best = row["right"] > best, max(best, row["right"])
        over = difference(row.get("over_uniform")).replace("±", " ± ")
        lines.append([_label(row), budget_text(row), *cost_cells(row), _cell(row, leads), over])
    table = _table(lines)
    cells = {row["method"]: row for row in mean}
    dense, zeroed, shuffled = (cells[name] for name in ("dense", "blind-zero", "blind-shuffle"))
    env = saved["environment"]
    equal = " (= 50 %): at that keep the LLM's share is 50 %." if any("(=" in line[1] for line in lines) else ""
    seen = "clip" if env.get("video") else "image"
    return (
        f"{table}\n\n{COSTS}{equal} **Bold**: no row above it is right as often. Blind: {100 * zeroed['right']:.1f} "
        f"with the {seen} zeroed, {100 * shuffled['right']:.1f} with {seen}s shuffled. ± is half of the 95 % bootstrap "
        f"interval, paired for differences; {dense['n'] // kinds} held-out questions of each kind, {env['cpu']}, "
        f"{env['dtype']}, batch {env['batch']}, torch {env['versions']['torch']}, "
        f"transformers {env['versions']['transformers']}."
        + "".join(f" {note}" for note in saved["notes"] if note.startswith("Out of reach") and only is None)
    )


def _named(row: Row, wanted: str) -> bool:
    name, _, keep = wanted.partition("@")
    return row["method"] == name and (not keep or float(keep) == row["keep"])


def _name(row: Row) -> str:
    return f"{row['method']}@{row['keep']}"


def vit_table(saved: dict[str, Any]) -> str:
    """A row a method and keep of `vtprune eval-vit`, in the order of the run; speed beside its limit by FLOPs."""
    env = saved["environment"]
    seconds = "images/CPU s" if env.get("clock") == "CPU time" else "images/s"
    head = ["tokens reduced inside", "left", "linear probe, %", "10-NN, %", seconds, "speed", "FLOPs"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in saved["rows"]:
        name = row["method"] if row["keep"] is None else f"`{row['method']}` {share(row['keep'])}"
        figures = f"{row['probe']:.1f}", f"{row['knn']:.1f}", f"{row['images_s']:.2f}", f"{row['speed']:.2f}x"
        lines.append([name, str(row["left"]), *figures, f"1 / {row['flops_ratio']:.2f}"])
    return (
        f"{_table(lines)}\n\n{saved['title']}: {env['test']} test images of {env['side']} pixels, probe and "
        f"neighbours from {env['train']}; {env['cpu']}, {env['cpu_threads']} thread, {env['dtype']}, "
        f"{env['attention']}, batch {env['batch']}, torch {env['versions']['torch']}, "
        f"transformers {env['versions']['transformers']}" + (f"; {env['load']}." if "load" in env else ".")
    )


def overhead_tables(path: Path) -> str:
    """What pruning costs, a row a method, by medians and by the least times; and how selections grow with the clip."""
    report = OverheadReport.load(path)
    sizes = sorted({row["visual"] for row in report.rows})
    header, told = report.cells()
    by = {(row["method"], row["visual"]): dict(zip(header, line)) for row, line in zip(report.rows, told)}
    least = {row["method"]: row["least"]["overhead"] for row in report.rows if row["visual"] == sizes[0]}
    head = ["method", *(f"{n} tokens" for n in sizes), "keep=1.0", "decode", "text us"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in sorted(least, key=lambda name: least[name]):
        few = by[name, sizes[0]]
        lines.append([f"`{name}`", *(by[name, n]["of dense"] for n in sizes), *(few[column] for column in head[-3:])])
    header, cells = GrowthReport("", report.growth).cells()
    growth = [header, ["---", *["---:"] * (len(header) - 1)], *([f"`{cell[0]}`", *cell[1:]] for cell in sorted(cells))]
    env = report.environment
    machine = (
        f"{env['cpu']}, {env['cpu_threads']} thread, {env['dtype']}, batch {env['batch']}, {share(env['keep'])} kept, "
        f"{env['repeats']} rounds, torch {env['versions']['torch']}, transformers {env['versions']['transformers']}, "
        f"commit {env['commit']}."
    )
    return "\n\n".join((_table(lines), machine, _table(growth), NOTE))


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _label(row: Row) -> str:
    seeds = f", {len(row['right_by_seed'])} seeds" if "right_by_seed" in row else ""
    name = "dense" if row["method"] == "dense" else f"`{row['method']}`"
    return f"{name} (control{seeds})" if row["method"] in CONTROLS else name


def _cell(row: Row, leads: bool) -> str:
    right = f"{100 * row['right']:.1f}"
    return f"{f'**{right}**' if leads else right} ± {50 * (row['high'] - row['low']):.1f}"


def main() -> None:
    """Rewrite the tables of the pages in place, and the speed picture from the files that their tables name."""
    for page in map(Path, PAGES):
        text = refreshed(page.read_text(), page.parent)
        page.write_text(text)
        saved = [speed.load(page.parent / name) for block in speed.BLOCK.finditer(text) for name in block[2].split()]
        if saved:
            speed.plot(saved, PICTURE)


if __name__ == "__main__":
    main()
