"""The table of one model, written into a folder as it grows: eval.json, eval.md and pareto.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vtprune
from vtprune.evals.accuracy import KEEPS, VIDEO_KEEPS, AccuracyReport, evaluate


def every_method(video: bool) -> list[str]:
    """All methods; rules about frames only for clips."""
    return [cls.name for cls in vtprune.methods() if video or not cls.video]


def keeps_of(video: bool) -> tuple[float, ...]:
    """The shares that a table asks for unless told otherwise."""
    return VIDEO_KEEPS if video else KEEPS


def started(out: Path) -> AccuracyReport | None:
    """What an earlier run left in the folder; None where there is nothing. ValueError for a file of another kind."""
    return AccuracyReport.load(out / "eval.json") if (out / "eval.json").exists() else None


def write(report: AccuracyReport, out: Path) -> None:
    """Write the JSON, the page and the picture."""
    report.save(out / "eval.json")
    report.plot(out / "pareto.png")
    (out / "eval.md").write_text(report.to_page(), encoding="utf-8")


def table(
    model: Any,
    processor: Any,
    questions: Sequence[Any],
    methods: Sequence[str],
    keeps: Sequence[float | int],
    out: Path,
    **options: Any,
) -> AccuracyReport:
    """`evaluate`, whose rows are saved in the folder as they come; a run that was stopped there goes on.

    options: of `evaluate`. Raises ValueError where the folder holds a run of other questions or settings.
    """
    report = evaluate(
        model, processor, questions, methods, keeps,
        before=started(out), finished=lambda report: report.save(out / "eval.json"), **options,
    )  # fmt: skip
    write(report, out)
    return report
