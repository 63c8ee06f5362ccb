"""The demonstration behind `vtprune demo`: the embedded model, dense against pruned, on real questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import vtprune
from vtprune.evals.accuracy import AccuracyReport, evaluate

TOY = (
    "A toy: 2.3 million parameters, 64 x 64 pixels, 71 words. It shows how methods differ on a model that really "
    "looks; it says nothing about a 7B model on photographs."
)


def run(
    out: Path, keeps: Sequence[float | int] = (0.5, 0.25, 0.11), limit: int = 30, progress: bool = True
) -> tuple[AccuracyReport, list[Path]]:
    """Answer `limit` questions a capability with every registered method; returns the report and the files written."""
    from vtprune.evals import tiny
    from vtprune.show import gallery

    model, processor = tiny.load("cpu")
    questions = tiny.questions(per_capability=limit)
    names = [cls.name for cls in vtprune.methods()]
    title = "The embedded toy VLM, dense and pruned"
    workers = min(4, os.cpu_count() or 1)
    report = evaluate(
        model, processor, questions, names, keeps, seeds=1, title=title, progress=progress, workers=workers
    )
    report.notes = (TOY, *report.notes)
    overlay = gallery(model, processor, questions, names, keep=keeps[-1])
    out.mkdir(parents=True, exist_ok=True)
    overlay.save(out / "overlay.png")
    files = [report.save(out / "demo.json"), report.plot(out / "pareto.png"), out / "overlay.png"]
    return report, files
