"""What a search has found: the recommended recipe, the other finalists and random tokens beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vtprune.evals.report import Report, Row, share
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.gather import title
from vtprune.evals.tasks.wording import verdict
from vtprune.evals.tuning.search import Target, Trial, Tuning, resampled_drops

NOTES = (
    "drop: the share of the dense score that is lost, the mean over tasks, on samples that were held back from the "
    "search; without labels, the share of answers that change.",
    "TTFT: from the vision tower's first step to the first logits, the median, beside dense in the same run.",
)


@dataclass
class TuneReport(Report):
    """Rows of the finalists, the best first, of random tokens beside it and of dense.

    recommended: the best finalist if it meets the targets, else None. tried: all that was measured on the way.
    """

    target: Target = field(default_factory=Target)
    recommended: Row | None = None
    tried: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    kind = "tune"

    @property
    def sentence(self) -> str:
        """The recommendation, or that nothing meets the targets and what comes nearest."""
        best = self.rows[0]
        told = (
            f"{title(best['method'], best['keep'])}: a drop of {percent(best['drop'])} "
            f"(95 % interval {percent(best['low'])} to "
            f"{percent(best['high'])}), TTFT {best['ttft_ms']:.3g} ms against {self.rows[-1]['ttft_ms']:.3g} ms dense, "
            f"{best['speedup']:.2f}x"
        )
        if self.recommended is not None:
            return f"Recommended for {self.target.words}: {told}."
        return f"Nothing meets {self.target.words}. Nearest comes {told}."

    @property
    def body(self) -> Row:
        target = {"max_drop": self.target.max_drop, "ttft": self.target.ttft, "speedup": self.target.speedup}
        return {
            "title": self.title, "target": target, "sentence": self.sentence, "recommended": self.recommended,
            "rows": self.rows, "tried": self.tried, "left_out": self.left_out, "notes": list(self.notes),
            "environment": self.environment,
        }  # fmt: skip

    def cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["recipe", "kept", "drop", "95 % interval", "TTFT ms", "speed-up", "tokens", "meets the target"]
        return header, [_line(row) for row in self.rows]

    def write(self, folder: ResultFolder, recipe: Any) -> None:
        """Write tune.json, and recipe.json where something is recommended; an older recipe does not stay behind."""
        self.save(folder.path / "tune.json")
        file = folder.path / "recipe.json"
        if recipe is None:
            file.unlink(missing_ok=True)
        else:
            recipe.save(file)

    def plot(self, path: str | Path) -> Path:
        """Drop against TTFT: all that was tried, and the finalists by name."""
        from vtprune.evals.figures import tuned

        return tuned(self.tried, self.rows, self.target.max_drop, self.title, path)


def judged(
    search: Tuning, finalists: Sequence[Trial], control: Trial, model: str, environment: Row, left_out: Sequence[str]
) -> TuneReport:
    """The report of a finished search."""
    # All finalists' intervals hold together, so that choosing among them does not flatter the chosen one.
    rows = [row_of(search, trial, 0.05 / len(finalists)) for trial in finalists]
    target = search.target
    for row, trial in zip(rows, finalists):
        row["meets"] = trial.misses(target) == 0
    best = rows[0] if rows[0]["meets"] else None
    beside = row_of(search, control, 0.05)
    notes = [*NOTES]
    if best is not None and beside["drop"] <= best["drop"]:
        notes.append(f"As many random tokens lose no more here ({percent(beside['drop'])}): the method is not needed.")
    if best is not None and best["speedup"] <= 1:
        gain = f"{best['speedup']:.2f}x"
        notes.append(f"It is no sooner than the dense model here ({gain}): pruning pays where inputs are longer.")
    n = sum(task["n"] - task["n"] // 2 for task in search.subject.tasks)
    if n < 100:
        notes.append(f"Only {n} samples were held back to judge by: the intervals are wide; bring more samples.")
    tried = [{**_named(trial), "drop": trial.drop, "ttft_ms": 1e3 * trial.ttft} for trial in search.tried]
    every = [*rows, beside, row_of(search, search.dense, 0.05)]
    return TuneReport(f"Recipes for {model}", every, environment, tuple(notes), target, best, tried, list(left_out))


def row_of(search: Tuning, trial: Trial, alpha: float) -> Row:
    """Drop with the interval of level 1 - alpha, times and tokens on the samples that were held back."""
    drops = resampled_drops(*search.parts_held_back(trial))
    low, high = np.quantile(drops[1:], [alpha / 2, 1 - alpha / 2])
    # A bootstrap of samples among which nothing changed knows no doubt; what was not seen in n samples may still
    # happen to this share of all others.
    n = sum(task["n"] - task["n"] // 2 for task in search.subject.tasks)
    unseen = 1 - (alpha / 2) ** (1 / n) if trial is not search.dense else 0.0
    low, high = min(float(low), drops[0] - unseen), max(float(high), drops[0] + unseen)
    tokens = [line["visual_tokens"] for lines in trial.lines.values() for line in lines]
    return {
        **_named(trial),
        "drop": float(drops[0]),
        "low": float(low),
        "high": float(high),
        "ttft_ms": 1e3 * trial.ttft,
        "speedup": trial.speedup,
        "visual_tokens": [fmean(pair[i] for pair in tokens) for i in (0, 1)],
        "meets": None,
    }


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _named(trial: Trial) -> Row:
    return {"method": trial.cell.label, "keep": trial.cell.keep}


def _line(row: Row) -> list[str]:
    return [
        row["method"],
        share(row["keep"]),
        percent(row["drop"]),
        f"{percent(row['low'])} to {percent(row['high'])}",
        f"{row['ttft_ms']:.1f}",
        f"{row['speedup']:.2f}x",
        f"{row['visual_tokens'][1]:.0f}",
        verdict(row["meets"]),
    ]
