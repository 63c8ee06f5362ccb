"""The `vtprune` command. Heavy imports stay inside the commands, so that `vtprune --help` answers at once."""

from __future__ import annotations

import typer

from vtprune.cli import bench, demo, evaluate, methods, report, serve, show, template, train, tune
from vtprune.cli.options import parse_keep, parse_keeps

__all__ = ["app", "parse_keep", "parse_keeps"]

app = typer.Typer(
    help="Prune the visual tokens of Hugging Face vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# In the order in which --help lists them.
app.command("methods")(methods.methods)
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
