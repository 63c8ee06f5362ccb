"""`vtprune tune`: the recipe for one model, one machine and one user's samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.common import folder, needs, sentence, show_report
from vtprune.cli.options import Clips, Device, Dtype, Json, Keep, Methods, Model, parse_keeps


@sentence
def tune(
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option(help="Your samples, labelled or not; without them the questions of the embedded toy.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lmms-eval instead, separated by commas.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with lmms-eval tasks of your own.")] = None,
    max_drop: Annotated[str, typer.Option(help="Share of the dense score that may be lost.")] = "1%",
    ttft: Annotated[str | None, typer.Option(help="Time to the first token to reach, such as 150ms.")] = None,
    speedup: Annotated[str | None, typer.Option(help="Or how many times sooner it must come, such as 2x.")] = None,
    method: Methods = None,
    keep: Keep = None,
    metric: Annotated[str | None, typer.Option(help="As for vtprune eval --data.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a video.")] = 8,
    video: Clips = False,
    limit: Annotated[int | None, typer.Option(min=2, help="Samples of a task at most.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to generate at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order of the samples: which are searched on, which held back.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; a search that stopped goes on there.")] = None,
    as_json: Json = False,
) -> None:
    """Find the method and the budget that lose least, or are fastest, on your samples and your machine.

    Half of the samples is searched on, by successive halving; the other half judges the finalists. Writes recipe.json,
    which vtprune.patch and every command take.
    """
    needs("scipy", "matplotlib", *(["rapidfuzz"] if data else []))
    from vtprune.cli.grid import default_folder
    from vtprune.evals import tuning
    from vtprune.evals.tasks.folder import ResultFolder
    from vtprune.evals.tasks.setup import Setup

    target = tuning.Target(_share(max_drop), _seconds(ttft), _times(speedup))
    setup = Setup.of(
        model, data, tasks, include=include, video=video, metric=metric, frames=frames, limit=limit,
        new_tokens=new_tokens, device=device, dtype=dtype, seed=seed,
    )  # fmt: skip
    results = ResultFolder(out or default_folder(setup, "tune"))
    results.check_ours()
    folder(results.path)
    keeps = parse_keeps(keep, tuning.KEEPS)
    report = tuning.tune(setup, target, results, method, keeps, told=lambda text: typer.echo(text, err=True))
    report.plot(results.path / "tune.png")
    show_report(report, as_json)
    if not as_json:
        written = "recipe.json, " if report.recommended else ""
        typer.echo(f"{report.sentence}\nwrote {written}tune.json and tune.png to {results.path}")
    if report.recommended is None:
        raise typer.Exit(1)


def _share(text: str) -> float:
    """'1%' and '0.01' -> 0.01."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ValueError(f"--max-drop {text}: write a share such as 1% or 0.01") from error


def _seconds(text: str | None) -> float | None:
    """'150ms' and '0.15s' -> 0.15."""
    if text is None:
        return None
    for ending, factor in (("ms", 1e-3), ("s", 1.0)):
        if text.endswith(ending):
            try:
                return float(text.removesuffix(ending)) * factor
            except ValueError:
                break
    raise ValueError(f"--ttft {text}: write a time such as 150ms or 0.15s")


def _times(text: str | None) -> float | None:
    """'2x' and '2' -> 2.0."""
    try:
        return None if text is None else float(text.removesuffix("x"))
    except ValueError as error:
        raise ValueError(f"--speedup {text}: write how many times sooner, such as 2x") from error
