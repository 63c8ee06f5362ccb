"""`vtprune demo`: the embedded model, dense against pruned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from vtprune.cli.common import folder, needs, sentence, show_report
from vtprune.cli.options import All, Clips, Json, Keep, Limit, Mid, Out, one_toy, parse_keeps
from vtprune.evals import models


@sentence
def demo(
    keep: Keep = None,
    limit: Limit = 10,
    every: All = False,
    video: Clips = False,
    mid: Mid = False,
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Answer real questions with an embedded model, dense and pruned with six methods or with --all."""
    needs("scipy", "matplotlib", *(["torchvision"] if video else []))
    from vtprune.evals import demo as demonstration

    models.quiet()
    which = one_toy(video, mid)
    folder(out)
    keeps = parse_keeps(keep, ())
    if not as_json:
        typer.secho(demonstration.caveat(which), err=True)
    report, files = demonstration.run(out, keeps, limit, progress=not as_json, which=which, every=every)
    means = replace(
        report, rows=[row for row in report.rows if row["capability"] == "mean"]
    )  # the file holds all kinds
    show_report(report if as_json else means, as_json)
    if not as_json:
        for path in files:
            typer.echo(f"wrote {path}")
