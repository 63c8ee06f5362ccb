"""Options that several commands take, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
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
Batch = Annotated[int, typer.Option(min=1, help="Samples run together.")]
Limit = Annotated[int, typer.Option(min=2, help="Questions of each capability.")]
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
Clips = Annotated[bool, typer.Option("--video", help="Clips and the embedded model that watches them.")]


def parse_keep(text: str) -> float | int:
    """'0.25' and '25%' -> 0.25, '64' -> 64; ValueError with the valid range for anything else."""
    from vtprune.types import check_keep

    ways = "use a share in (0, 1] such as 0.25 or 25%, or a number of tokens such as 64"
    try:
        if text.endswith("%"):
            value: float | int = float(text[:-1]) / 100
        else:
            value = int(text) if text.lstrip("+-").isdigit() else float(text)
        check_keep(value)
    except ValueError as error:
        raise ValueError(f"--keep {text}: {ways}") from error
    return value


def parse_keeps(texts: list[str] | None, default: tuple[float, ...]) -> list[float | int]:
    """Every --keep given, in order; commas separate too."""
    given = [part for text in texts or [] for part in text.split(",") if part]
    return [parse_keep(part) for part in given] or list(default)
