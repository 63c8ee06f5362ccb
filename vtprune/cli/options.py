"""Options that several commands take, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.parsing import parse_keep

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Keep = Annotated[list[str] | None, typer.Option("--keep", help="0.25 or 25% (share), 64 (tokens); repeat for several.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="A name, or name:option=value,option=value; repeat for several.")
]
Recipes = Annotated[
    list[Path] | None, typer.Option("--recipe", help="A recipe.json, as vtprune tune writes; repeat for several.")
]
Model = Annotated[str | None, typer.Option(help="Path or hub id; without it the embedded toy model.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one, unless said otherwise.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Image = Annotated[Path | None, typer.Option("--image", help="A picture of yours.")]
Video = Annotated[Path | None, typer.Option("--video", help="A video file.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="What is asked about it.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples run together.")]
Limit = Annotated[int, typer.Option(min=2, help="Questions of each capability.")]
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
All = Annotated[bool, typer.Option("--all", help="Every method; rules about frames with --video.")]
Mid = Annotated[bool, typer.Option("--mid", help="The mid model: real parts and real depth, asked about pictures.")]
Clips = Annotated[bool, typer.Option("--video", help="Clips and the embedded model that watches them.")]


def parse_keeps(texts: list[str] | None, default: tuple[float, ...]) -> list[float | int]:
    """Every --keep given, in order; commas separate too."""
    given = [part for text in texts or [] for part in text.split(",") if part]
    return [parse_keep(part) for part in given] or list(default)


def one_toy(video: bool, mid: bool) -> str:
    """The name of the embedded model that --video and --mid choose; ValueError for both."""
    if video and mid:
        raise ValueError("--video and --mid name two models: give one of them")
    return "video" if video else "mid" if mid else "image"
