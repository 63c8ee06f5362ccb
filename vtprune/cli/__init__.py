"""The `vtprune` command. Heavy imports stay inside the commands, so that `vtprune --help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from vtprune.cli import bench, demo, evaluate, inspect, methods, report, serve, show, template, train, tune
from vtprune.cli.options import parse_keep, parse_keeps

__all__ = ["app", "parse_keep", "parse_keeps"]


def _version(asked: bool) -> None:
    if asked:
        import vtprune

        typer.echo(f"vtprune {vtprune.__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Prune the visual tokens of Hugging Face vision-language models."""


# In the order in which --help lists them.
app.command("methods")(methods.methods)
app.command("inspect")(inspect.inspect)
app.command("demo")(demo.demo)
app.command("eval")(evaluate.evaluate)
app.command("tune")(tune.tune)
app.command("report")(report.report)
app.command("template")(template.template)
app.command("bench")(bench.bench)
app.command("serve")(serve.serve)
app.command("show")(show.show)
app.command("eval-vit")(evaluate.evaluate_vit)
app.command("train-tiny")(train.train_tiny)
