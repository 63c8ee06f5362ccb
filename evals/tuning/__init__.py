"""Which method at which budget: found on a user's own samples and machine, and judged on samples held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vtprune.evals.accuracy.plans import plans
from vtprune.evals.tasks.cells import DENSE, Cell
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.grid import end_of
from vtprune.evals.tasks.setup import Setup
from vtprune.evals.tuning.result import TuneReport, judged
from vtprune.evals.tuning.search import FINALISTS, KEEPS, Target, Trial, Tuning, candidates

__all__ = ["FINALISTS", "KEEPS", "Target", "TuneReport", "tune"]


def tune(
    setup: Setup,
    target: Target,
    folder: ResultFolder,
    methods: Sequence[str] | None = None,
    keeps: Sequence[float | int] = KEEPS,
    told: Callable[[str], None] = lambda _: None,
) -> TuneReport:
    """Search, judge and write recipe.json, tune.json and the answers of all finalists into the folder.

    methods: those to try, with options or without; None for all that the model takes. told: is given a sentence before
    every step. A search that was stopped goes on with the answers that the folder holds.

    Raises ValueError where the samples are too few, none of the methods fits the model, or the dense model answers
    nothing right.
    """
    subject = setup.load()
    document = setup.document(subject)
    folder.open({**document, "cells": [DENSE.document]})
    cells, left_out = candidates(subject, methods, keeps, setup.films(subject))
    told(f"{len(cells)} ways of pruning to try, {len(left_out)} that this model cannot take")
    search = Tuning(subject, target, folder, told)
    finalists = search.run(cells)
    told("random tokens at the budget of the best, to compare with")
    control = search.also(_control(finalists[0]))
    folder.open({**document, "cells": [trial.cell.document for trial in (search.dense, *finalists, control)]})
    for trial in (search.dense, *finalists, control):
        for task, lines in trial.lines.items():
            if folder.end_of(task, trial.cell.name) is None:
                folder.finish(task, trial.cell.name, end_of(subject, task, trial.cell, lines))
    report = judged(search, finalists, control, document["model"], document["environment"], left_out)
    report.write(folder, recipe_of(subject.model, finalists[0].cell) if report.recommended else None)
    return report


def recipe_of(model: Any, cell: Cell) -> Any:
    """The recipe of a way of pruning, its layers those of this model."""
    with cell.applied(model) as handle:
        return handle.recipe


def _control(best: Trial) -> Cell:
    """Random tokens as many as the best recipe keeps; half of them where it decides by itself."""
    keep = best.cell.keep if best.cell.keep is not None else 0.5
    (plan,) = plans(["random:seed=0"], [keep], 1)[-1:]
    return Cell("random", plan.method, keep, 0)
