"""The demonstration behind `vtprune demo`: an embedded model, dense against pruned, on real questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vtprune
from vtprune.evals.accuracy import AccuracyReport, evaluate
from vtprune.evals.accuracy.table import every_method
from vtprune.evals.toys import TOYS, toy

KEEPS = (0.25, 0.11)
# One of each kind that a newcomer asks about: what to take, what the field knows, inside the LLM, inside the tower.
FEW = ("auto", "divprune", "visionzip", "fastv", "pyramiddrop", "tome")
FEW_FILMS = ("auto", "divprune", "holitom", "evs", "vidcom2", "fastv")
CAVEATS = {
    "image": "A toy: 2.3 million parameters, 64 x 64 pixels, 71 words. It shows how methods differ on a model that "
    "really looks; it says nothing about a 7B model on photographs.",
    "video": "A toy: 1.1 million parameters, clips of 16 frames of 48 x 48 pixels, 57 words. It shows how methods "
    "differ on a model that really looks; it says nothing about a 7B model on films.",
    "mid": "Real parts and real depth in a small closed world: it says nothing about a 7B model on photographs.",
}


def caveat(which: str) -> str:
    """What an embedded model is, and is not good for."""
    return CAVEATS[which]


def run(
    out: Path,
    keeps: Sequence[float | int] = (),
    limit: int = 10,
    progress: bool = True,
    which: str = "image",
    every: bool = False,
) -> tuple[AccuracyReport, list[Path]]:
    """Answer `limit` questions a capability, dense and pruned; returns the report and the files written.

    which: a name of `TOYS`; "video" asks about generated clips. every: with all methods; those that the model of clips
    cannot take are noted. Else with six. demo.json grows with every method that is done.
    """
    from vtprune.evals.pictures import film_gallery, gallery

    video = which == "video"
    methods = every_method(video) if every else FEW_FILMS if video else FEW
    keeps = keeps or KEEPS
    model: Any
    model, processor = toy(which).load("cpu")
    questions: Sequence[Any] = toy(which).questions(per_capability=limit)
    title = f"{TOYS[which][0].upper()}{TOYS[which][1:]}, dense and pruned"

    def save(report: AccuracyReport) -> Path:
        report.kind = "demo"
        return report.save(out / "demo.json")

    report = evaluate(
        model, processor, questions, methods, keeps, seeds=1, title=title, progress=progress,
        workers=min(4, os.cpu_count() or 1), skip=video, prompts=4, finished=save,
    )  # fmt: skip
    report.notes = (caveat(which), *report.notes)
    ran = {row["method"] for row in report.rows}
    drawn = [name for name in methods if name in ran and "prefill" in vtprune.create(name).phases]
    overlay = (film_gallery if video else gallery)(model, processor, questions, drawn, keep=keeps[-1])
    out.mkdir(parents=True, exist_ok=True)
    overlay.save(out / "overlay.png")
    files = [save(report), report.plot(out / "pareto.png"), out / "overlay.png"]
    return report, files
