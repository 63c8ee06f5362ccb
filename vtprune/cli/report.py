"""`vtprune report`: the page of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.common import folder, needs, print_json, sentence
from vtprune.cli.options import Json


@sentence
def report(
    results: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that vtprune eval --out wrote.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file to write [default: DIR/report.html].")] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page on an evaluation: charts, tables, changed answers; and pareto.png beside it."""
    needs("jinja2", "matplotlib")
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: name a file in it, such as {out / 'report.html'}")
        folder(out.parent)
    from vtprune.evals.tasks.report import write_report

    page = write_report(results, out)
    files = [str(page), str(page.with_name("pareto.png"))]
    if as_json:
        print_json("report", {"files": files})
    else:
        typer.echo(f"wrote {' and '.join(files)}")
