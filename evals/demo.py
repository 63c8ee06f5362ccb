"""The demonstration behind `vtprune demo`: the embedded model, dense against pruned, on real questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vtprune
from vtprune.evals.accuracy import VIDEO_KEEPS, AccuracyReport, evaluate

TOYS = {
    "image": "A toy: 2.3 million parameters, 64 x 64 pixels, 71 words.",
    "video": "A toy: 1.1 million parameters, clips of 16 frames of 48 x 48 pixels, 57 words.",
}
CAVEAT = "It shows how methods differ on a model that really looks; it says nothing about a 7B model on {}."
WHAT = {"image": "photographs", "video": "films"}
KEEPS = {"image": (0.5, 0.25, 0.11), "video": VIDEO_KEEPS}


def toy(video: bool) -> str:
    """What the embedded model is, and is not good for."""
    kind = "video" if video else "image"
    return f"{TOYS[kind]} {CAVEAT.format(WHAT[kind])}"


def run(
    out: Path, keeps: Sequence[float | int] = (), limit: int = 30, progress: bool = True, video: bool = False
) -> tuple[AccuracyReport, list[Path]]:
    """Answer `limit` questions a capability with every registered method; returns the report and the files written.

    video: questions about generated clips, to the model that watches them; methods that it cannot take are noted.
    """
    from vtprune.evals.pictures import film_gallery, gallery
    from vtprune.evals.toys import image
    from vtprune.evals.toys import video as clips

    keeps = keeps or KEEPS["video" if video else "image"]
    model: Any
    model, processor = clips.load("cpu") if video else image.load("cpu")
    questions: Sequence[Any] = (clips if video else image).questions(per_capability=limit)
    names = [cls.name for cls in vtprune.methods() if video or not cls.video]
    title = f"The embedded toy {'video ' if video else ''}VLM, dense and pruned"
    workers = min(4, os.cpu_count() or 1)
    report = evaluate(
        model, processor, questions, names, keeps, seeds=1, title=title, progress=progress, workers=workers, skip=video
    )
    report.notes = (toy(video), *report.notes)
    ran = {row["method"] for row in report.rows}
    drawn = [cls.name for cls in vtprune.methods() if cls.name in ran and "prefill" in cls.phases]
    overlay = (film_gallery if video else gallery)(model, processor, questions, drawn, keep=keeps[-1])
    out.mkdir(parents=True, exist_ok=True)
    overlay.save(out / "overlay.png")
    files = [report.save(out / "demo.json"), report.plot(out / "pareto.png"), out / "overlay.png"]
    return report, files
