"""The tables of README.md and benchmarks/README.md, made anew: `python -m vtprune.evals.readme`.

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
from vtprune.evals.accuracy import CONTROLS, share
from vtprune.evals.report import Row

BLOCK = re.compile(
    r"(<!-- vtprune eval(?:-vit| --all| --video --all)(?:, rows (\S+))?: (\S+(?: \S+)*) -->\n\n)"
    r".*?(\n\n<!-- end of table -->)",
    re.DOTALL,
)
LISTS = re.compile(r"(<!-- (vtprune methods|runs) -->\n\n).*?(\n\n<!-- end of table -->)", re.DOTALL)
SHARED = 0.02  # by how much what several runs measured may differ, as a share of the questions
PAGES = ("README.md", "benchmarks/README.md")
PICTURE = "examples/pictures/ttft.png"


def refreshed(text: str, root: Path) -> str:
    """`text` with every table made anew from what its comment names; root: the folder of the file it stands in."""

    def table(m: re.Match[str]) -> str:
        saved = [json.loads((root / name).read_text()) for name in m[3].split()]
        only = m[2].split(",") if m[2] else None
        return m[1] + (vit_table(saved[0]) if "-vit" in m[1] else summary(*saved, only=only)) + m[4]

    lists: dict[str, Callable[[], str]] = {"vtprune methods": methods_table, "runs": lambda: runs_table(root)}
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
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(saved: dict[str, Any], *more: dict[str, Any], only: Sequence[str] | None = None) -> str:
    """Means over all kinds of question: a row a method, the best at the smallest share first, controls last.

    more: later runs of other methods. only: the methods to show. Raises ValueError if rows of the same name (dense,
    blind, controls; of several seeds the first) differ by more than `SHARED`.
    """
    mean = [row for row in saved["rows"] if row["capability"] == "mean"]
    cells = {(row["method"], row["keep"]): row for row in mean}
    apart = 0.0
    for row in (row for run in more for row in run["rows"] if row["capability"] == "mean"):
        first = cells.setdefault((row["method"], row["keep"]), row)
        ours, theirs = (r.get("right_by_seed", [r["right"]])[0] for r in (first, row))
        apart = max(apart, abs(ours - theirs))
        if apart > SHARED:
            raise ValueError(f"{row['method']} at {row['keep']}: {ours} and {theirs} in two runs")
    mean = list(cells.values())
    pruned = [row for row in mean if row["keep"] != 1.0 and (only is None or row["method"] in only)]
    keeps = sorted({row["keep"] for row in pruned}, reverse=True)
    names = sorted({row["method"] for row in pruned}, key=lambda name: (_rank(name, cells[name, keeps[-1]]), name))
    kinds = len({row["capability"] for row in saved["rows"]}) - 1
    head = [f"mean of {kinds} kinds of question, answer right, %", f"{share(keeps[0])} kept", *map(share, keeps[1:])]
    lines = [head, ["---"] * len(head), *([_label(n, cells[n, keeps[0]]), *_row(cells, n, keeps)] for n in names)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    dense, zeroed, shuffled = (cells[name, 1.0] for name in ("dense", "blind-zero", "blind-shuffle"))
    env = saved["environment"]
    seen = "clip" if env.get("video") else "image"
    return (
        f"{table}\n\n"
        f"Dense: {_cell(dense)}. Blind: {100 * zeroed['right']:.1f} with the {seen} zeroed, "
        f"{100 * shuffled['right']:.1f} with {seen}s shuffled. ± is half of the 95 % bootstrap interval; "
        f"{dense['n'] // kinds} held-out questions of each kind, {env['cpu']}, {env['dtype']}, batch {env['batch']}, "
        f"torch {env['versions']['torch']}, transformers {env['versions']['transformers']}."
        + "".join(_later(saved, run, apart, names) for run in more)
    )


def _later(saved: dict[str, Any], run: dict[str, Any], apart: float, shown: Sequence[str]) -> str:
    """Which of the methods shown a later run added, on what, and how well it repeats the rest."""
    old, new = ({row["method"] for row in r["rows"]} for r in (saved, run))
    names, versions = ", ".join(f"`{name}`" for name in sorted((new - old) & {*shown})), run["environment"]["versions"]
    same = "equal to" if apart == 0 else f"within {100 * apart:.1f} points of"
    return (
        f" Of a later run with torch {versions['torch']}, transformers {versions['transformers']}, whose dense and "
        f"blind rows and first random draw are {same} those here: {names}."
    )


def vit_table(saved: dict[str, Any]) -> str:
    """A row a method and keep of `vtprune eval-vit`, in the order of the run."""
    head = ["tokens reduced inside", "left", "linear probe, %", "10-NN, %", "images/s", "speed", "FLOPs"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in saved["rows"]:
        name = row["method"] if row["keep"] is None else f"`{row['method']}` {share(row['keep'])}"
        figures = f"{row['probe']:.1f}", f"{row['knn']:.1f}", f"{row['images_s']:.2f}", f"{row['speed']:.2f}x"
        lines.append([name, str(row["left"]), *figures, f"1 / {row['flops_ratio']:.2f}"])
    env = saved["environment"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n{saved['title']}: {env['test']} test images of {env['side']} pixels, probe and neighbours from "
        f"{env['train']}; {env['cpu']}, {env['cpu_threads']} thread, {env['dtype']}, {env['attention']}, batch "
        f"{env['batch']}, torch {env['versions']['torch']}, transformers {env['versions']['transformers']}"
        + (f"; {env['load']}." if "load" in env else ".")
    )


def _rank(name: str, row: Row) -> tuple[bool, float]:
    return name in CONTROLS, -row["right"]


def _label(name: str, row: Row) -> str:
    seeds = f", {len(row['right_by_seed'])} seeds" if "right_by_seed" in row else ""
    return f"`{name}` (control{seeds})" if name in CONTROLS else f"`{name}`"


def _row(cells: dict[tuple[str, Any], Row], name: str, keeps: Sequence[float]) -> list[str]:
    return [_cell(cells[name, keep]) for keep in keeps]


def _cell(row: Row) -> str:
    return f"{100 * row['right']:.1f} ± {50 * (row['high'] - row['low']):.1f}"


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
