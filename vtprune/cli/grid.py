"""`vtprune eval --data` and `--tasks`: a grid of methods and budgets on a file of one's own, or on benchmarks."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vtprune.cli.common import folder, needs, show_report
from vtprune.cli.options import parse_keeps

if TYPE_CHECKING:
    from vtprune.evals.tasks.cells import Cell
    from vtprune.evals.tasks.setup import Setup

KEEPS = (0.5, 0.25, 0.11)


def shard_of(text: str | None) -> tuple[int, int]:
    """'2/4' -> (2, 4), the second of four; (1, 1) where there is none. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard {text}: write i/n with i from 1 to n, such as 1/4 for the first of four machines")
    return int(found[1]), int(found[2])


def grid_cells(
    methods: Sequence[str], keep: Sequence[str] | None, seeds: int, recipes: Sequence[Path], preset: str | None
) -> list[Cell]:
    """Dense, the controls, every method at every budget, every recipe; a preset brings the budgets of its papers."""
    from vtprune.evals.tasks.cells import cells

    budgets: tuple[float | int, ...] = KEEPS
    if preset is not None:
        from vtprune.evals.tasks.published import preset_of

        budgets = tuple(preset_of(preset).keeps)
    return cells(methods, parse_keeps(list(keep or ()), budgets), seeds, recipes)


def run_grid(
    setup: Setup,
    todo: Sequence[Cell],
    out: Path | None,
    shard: tuple[int, int],
    ray: str | None,
    as_json: bool,
    preset: str | None = None,
    actors: int | None = None,
) -> None:
    """Run the grid into a folder, print its tables, and leave with status 1 if a cell failed."""
    if actors is not None and ray is None:
        raise ValueError("--actors belongs to --ray: name a cluster, or start one with --ray local")
    needs("scipy", "jinja2", *(["rapidfuzz"] if setup.data else []))
    from vtprune.evals.tasks.folder import ResultFolder
    from vtprune.evals.tasks.grid import jobs, run
    from vtprune.evals.tasks.published import published
    from vtprune.evals.tasks.summary import summarise

    results = ResultFolder(out or default_folder(setup))
    results.check_ours()
    folder(results.path)
    subject = setup.load()
    document = setup.document(subject)
    document["environment"]["command"] = shlex.join(["vtprune", *sys.argv[1:]])
    results.open({**document, "cells": [cell.document for cell in todo]})
    wanted = jobs([task["name"] for task in subject.tasks], todo, shard)
    if ray is None:
        failed = run(subject, wanted, results, progress=not as_json)
    else:
        from vtprune.evals.tasks import cluster

        failed = cluster.run(setup, subject, wanted, results, ray, actors=actors, progress=not as_json)
    summary = summarise(results)
    summary.write(results)
    show_report(summary, as_json)
    if preset is not None and not as_json:
        show_report(published(preset, sorted({cell.method.name for cell in todo if cell.keep is not None})), False)
    if not as_json:
        typer.echo(f"wrote {results.path}/eval.json; `vtprune report {results.path}` makes a page of it")
    for sentence in failed:
        typer.secho(f"vtprune: {sentence}", err=True, fg="red")
    if failed:
        raise typer.Exit(1)


def default_folder(setup: Setup, command: str = "eval") -> Path:
    """Where results go without --out: a folder here that is named after the command, the data and the model."""
    what = Path(setup.data).stem if setup.data else "-".join(setup.tasks) or "questions"
    model = Path(setup.model).name if setup.model else "toy"
    return Path(f"vtprune-{command}-{re.sub(r'[^A-Za-z0-9._-]+', '-', f'{what}-{model}')[:80]}")
