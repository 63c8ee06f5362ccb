"""From marks to rows and tables: accuracy by kind of question, with intervals and the share of it that is kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.accuracy.exam import Marks
from vtprune.evals.report import Report, Row, share

NOTES = (
    "answer right: generation begins with the answer; stopped right: it is exactly the answer, then the end token.",
    "blind: the dense model with the image (or clip) zeroed, or shuffled between questions.",
    "accuracy kept = (pruned - blind) / (full - blind), with the better of the two blind scores.",
    "± half of the 95 % bootstrap interval over questions (scipy.stats.bootstrap, percentile, 2000 resamples; "
    "0 where every resample is the same, as when all answers are right).",
)


def _rows(
    marks: dict[tuple[str, float | int], list[tuple[Marks, Marks]]], asked: NDArray[np.str_], names: list[str]
) -> list[Row]:
    return with_accuracy_kept(measured(marks, asked, names))


def measured(
    marks: dict[tuple[str, float | int], list[tuple[Marks, Marks]]], asked: NDArray[np.str_], names: list[str]
) -> list[Row]:
    """A row for every method, keep and capability, and one for their mean."""
    rows = []
    for (method, keep), runs in marks.items():
        right, stopped = (np.mean([run[i] for run in runs], axis=0) for i in (0, 1))
        for name in [*names, "mean"]:
            groups = [right[asked == c] for c in (names if name == "mean" else [name])]
            halted = [stopped[asked == c].mean() for c in (names if name == "mean" else [name])]
            low, high = interval(groups)
            row: Row = {
                "method": method,
                "keep": keep,
                "capability": name,
                "n": sum(len(g) for g in groups),
                "right": float(np.mean([g.mean() for g in groups])),
                "low": low,
                "high": high,
                "stopped": float(np.mean(halted)),
            }
            if len(runs) > 1:
                each = [[r[asked == c].mean() for c in names if name in ("mean", c)] for r, _ in runs]
                row["right_by_seed"] = [float(np.mean(values)) for values in each]
            rows.append(row)
    return rows


def with_accuracy_kept(rows: list[Row]) -> list[Row]:
    """The rows beside the dense and blind scores, where these are known yet: a run may have been interrupted."""
    known = {(row["method"], row["capability"]): row["right"] for row in rows if row["keep"] == 1.0}
    for row in rows:
        name = row["capability"]
        zero, shuffled, full = (known.get((who, name)) for who in ("blind-zero", "blind-shuffle", "dense"))
        row.update(blind_zero=zero, blind_shuffle=shuffled, full=full, accuracy_kept=None)
        if zero is None or shuffled is None or full is None:
            continue
        blind = max(zero, shuffled)
        seeing = full - blind
        row["accuracy_kept"] = (row["right"] - blind) / seeing if seeing > 0.05 else None
    return rows


def interval(groups: Sequence[Marks], resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over groups of the mean over questions."""
    from scipy.stats import bootstrap

    if all(len(g) < 2 or g.min() == g.max() for g in groups):
        centre = float(np.mean([g.mean() for g in groups]))
        return centre, centre
    usable = [g if len(g) > 1 else np.repeat(g, 2) for g in groups]

    def mean(*samples: Marks, axis: int = -1) -> Marks:
        return np.mean([s.mean(axis=axis) for s in samples], axis=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one constant group among varying ones is no problem
        found = bootstrap(
            usable, mean, n_resamples=resamples, vectorized=True, method="percentile", rng=np.random.default_rng(0)
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


class AccuracyReport(Report):
    """Accuracy by method, keep and capability."""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        names = list(dict.fromkeys(row["capability"] for row in self.rows))
        header = ["method", "kept", *names, "stopped", "acc. kept"]
        lines: dict[tuple[str, Any], dict[str, Row]] = {}
        for row in self.rows:
            lines.setdefault((row["method"], row["keep"]), {})[row["capability"]] = row
        return header, [self._line(method, keep, by, names) for (method, keep), by in lines.items()]

    @staticmethod
    def _line(method: str, keep: float | int, by: dict[str, Row], names: list[str]) -> list[str]:
        def cell(row: Row) -> str:
            return f"{100 * row['right']:.1f}±{50 * (row['high'] - row['low']):.0f}"

        mean = by["mean"]
        kept = "–" if mean["accuracy_kept"] is None else f"{100 * mean['accuracy_kept']:.1f}"
        if method.startswith("blind"):
            kept = "–"
        return [method, share(keep), *(cell(by[n]) for n in names), f"{100 * mean['stopped']:.1f}", kept]

    def plot(self, path: str | Path) -> Path:
        """Accuracy against kept visual tokens: the mean large, every capability small beside it."""
        from vtprune.evals.figures import pareto

        return pareto(self.rows, self.title, path)
