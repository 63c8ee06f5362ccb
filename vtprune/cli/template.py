"""`vtprune template`: an example of own data to begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.common import needs, print_json, sentence
from vtprune.cli.options import Json


@sentence
def template(
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("vtprune-data"),
    force: Annotated[bool, typer.Option("--force", help="Write over the files of an earlier example.")] = False,
    as_json: Json = False,
) -> None:
    """Write an example of data for eval --data: pictures, a clip, questions for every metric, and what columns mean."""
    needs("av")
    from vtprune.evals.tasks import template as example

    written = example.write(folder, force)
    if as_json:
        print_json("template", {"files": [str(file) for file in written]})
        return
    typer.echo(f"wrote {len(written)} files; {folder / example.README} explains the columns. Try")
    typer.echo(f"  vtprune eval --data {folder / example.PICTURES}")
    typer.echo(f"  vtprune eval --data {folder / example.CLIPS} --frames 16")
