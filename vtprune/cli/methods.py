"""`vtprune methods`: which methods there are."""

from __future__ import annotations

from typing import Any

import typer

from vtprune.cli.common import print_json, sentence, terminal
from vtprune.cli.options import Json


def _reads_question(method: Any) -> bool:
    """True if a stage of the method's schedule looks at the question (`Method.reads_text`)."""
    return any(stage.method.reads_text for stage in method.stages(0.25, 32))


@sentence
def methods(as_json: Json = False) -> None:
    """List every method: where it acts, whether its choice depends on the question, the signals it reads, its paper."""
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
            "reads_question": None if registry.required(cls) else _reads_question(cls()),
            "needs": None if registry.required(cls) else [str(signal) for signal in cls().needs],
            "paper": cls.paper,
        }
        for cls in classes
    ]
    if as_json:
        print_json("methods", {"methods": found, "failures": list(registry.failures())})
    else:
        from rich.markup import escape
        from rich.table import Table

        table = Table("method", "seam", "question", "needs", "paper")
        for row in found:
            needs = "depends on its options" if row["needs"] is None else ", ".join(row["needs"]) or "nothing"
            question = {None: "depends", True: "read", False: "not read"}[row["reads_question"]]
            table.add_row(*(escape(cell) for cell in (row["name"], row["seam"], question, needs, row["paper"])))
        terminal().print(table)
    for failure in registry.failures():
        typer.secho(failure, err=True, fg="yellow")
