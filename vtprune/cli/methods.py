"""`vtprune methods`: which methods there are."""

from __future__ import annotations

import json
from typing import Any

import typer

from vtprune.cli.common import sentence, terminal
from vtprune.cli.options import Json


@sentence
def methods(as_json: Json = False) -> None:
    """List every method: where it acts, the signals it reads, and its paper."""
    import warnings

    import vtprune
    from vtprune import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what was left out is listed below
        classes = vtprune.methods()
    found: list[dict[str, Any]] = [
        {
            "name": cls.name,
            "seam": cls.seam,
            "needs": None if registry.required(cls) else [str(signal) for signal in cls().needs],
            "paper": cls.paper,
        }
        for cls in classes
    ]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        from rich.markup import escape
        from rich.table import Table

        table = Table("method", "seam", "needs", "paper")
        for row in found:
            needs = "depends on its options" if row["needs"] is None else ", ".join(row["needs"]) or "nothing"
            table.add_row(*(escape(cell) for cell in (row["name"], row["seam"], needs, row["paper"])))
        terminal().print(table)
    for failure in registry.failures():
        typer.secho(failure, err=True, fg="yellow")
