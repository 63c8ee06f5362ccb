"""`vtprune train-tiny`: the embedded models from nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.common import sentence
from vtprune.cli.options import Out


@sentence
def train_tiny(
    out: Out = Path("out/tiny"),
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    scale: Annotated[float, typer.Option(help="Length of every training phase; 1 is the published schedule.")] = 1.0,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on from what lies in the folder.")] = False,
    video: Annotated[bool, typer.Option("--video", help="The model that watches clips.")] = False,
) -> None:
    """Train the embedded model from nothing: one script, one schedule, resumable."""
    from vtprune.evals.toys.image.train import train as train_image
    from vtprune.evals.toys.video.train import train as train_video

    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} trains nothing: use a number above 0; 1 is the published schedule")
    (train_video if video else train_image)(out, resume=not restart, seed=seed, scale=scale, progress=True)
    typer.echo(f"wrote {out}")
