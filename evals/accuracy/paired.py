"""Two methods on the same questions: `python -m vtprune.evals.accuracy.paired FOLDER METHOD OTHER`.

Prints a row for every keep at which a table of `vtprune.evals.accuracy` holds both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vtprune.evals.accuracy.rows import AccuracyReport, apart, difference, mean_and_draws
from vtprune.evals.report import Report, Row, share


def paired(report: AccuracyReport, method: str, other: str) -> list[Row]:
    """{"keep", "right", "other", "over": [difference, low, high]} for every keep that both were asked at.

    Means over kinds of question, and the 95 % interval of the bootstrap over questions, drawn anew within each kind.
    Raises ValueError where the report does not hold both.
    """
    index = {(one["method"], one["keep"]): i for i, one in enumerate(report.answers)}
    keeps = [keep for name, keep in index if name == method and (other, keep) in index]
    if not keeps:
        there = ", ".join(dict.fromkeys(name for name, _ in index))
        raise ValueError(f"no keep at which both {method} and {other} were asked; the table holds {there}")
    asked = np.array(report.kinds)
    exact, draws = mean_and_draws(report.answers, asked, list(dict.fromkeys(report.kinds)))
    rows = []
    for keep in sorted(keeps, reverse=True):
        a, b = index[method, keep], index[other, keep]
        over = apart(exact, draws, a, b)
        rows.append({"keep": keep, "right": float(exact[a]), "other": float(exact[b]), "over": over})
    return rows


def main(given: list[str] | None = None) -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.accuracy.paired", description=__doc__)
    parser.add_argument("folder", type=Path, help="holds eval.json")
    parser.add_argument("method")
    parser.add_argument("other")
    options = parser.parse_args(given)
    rows = paired(AccuracyReport.load(options.folder / "eval.json"), options.method, options.other)
    shown = [
        {
            "kept": share(row["keep"]),
            options.method: f"{100 * row['right']:.1f}",
            options.other: f"{100 * row['other']:.1f}",
            "difference": difference(row["over"]),
        }
        for row in rows
    ]
    print(Report(f"{options.method} and {options.other}", shown).to_markdown())


if __name__ == "__main__":
    main()
