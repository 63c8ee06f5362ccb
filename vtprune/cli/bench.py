"""`vtprune bench`: what pruning saves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vtprune.cli.bench_serve import served
from vtprune.cli.common import needs, seen, sentence, show_report
from vtprune.cli.options import (
    Batch,
    Device,
    Dtype,
    Image,
    Json,
    Keep,
    Methods,
    Model,
    Prompt,
    Recipes,
    Video,
    parse_keeps,
)
from vtprune.evals import models
from vtprune.evals.models import device_of, dtype_of
from vtprune.parsing import parse_method

RUNS = Path("benchmarks")
FEW = 100  # visual tokens, below which a prefill is all overhead


@sentence
def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(help="JSON of earlier runs, for --plot and --table.", show_default=False)
    ] = None,
    geometry: Annotated[
        str | None, typer.Option(help="llava-1.5-7b, llava-next-7b, llava-onevision-7b-video, qwen2.5-vl-7b or tiny.")
    ] = None,
    model: Model = None,
    image: Image = None,
    video: Video = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of --video.")] = 16,
    prompt: Prompt = None,
    method: Methods = None,
    all_methods: Annotated[bool, typer.Option("--all", help="Every registered method the model can take.")] = False,
    keep: Keep = None,
    recipe: Recipes = None,
    prefill: Annotated[
        str, typer.Option(help="Ways to run the LLM's prefill, of eager, graph (CUDA graphs) and compile; commas.")
    ] = "eager",
    bucket: Annotated[int, typer.Option(min=1, help="graph and compile round lengths up to a multiple.")] = 64,
    hooks: Annotated[bool, typer.Option("--hooks", help="Measure only what the hooks cost while decoding.")] = False,
    overhead: Annotated[
        bool, typer.Option("--overhead", help="Measure only what pruning itself costs, beside a run of equal lengths.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure only the kernels, against the plain way.")
    ] = False,
    selection: Annotated[bool, typer.Option("--selection", help="Measure only farthest point selection.")] = False,
    serve: Annotated[
        str | None, typer.Option(help="Measure only a server under load: vtprune, or vllm where it is installed.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --serve: requests under way at once.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="With --serve: requests of a round.")] = 64,
    side: Annotated[int, typer.Option(min=1, help="With --serve: pixels of a side of the pictures sent.")] = 336,
    server_args: Annotated[str, typer.Option(help="With --serve: more arguments of the server, in one text.")] = "",
    plot: Annotated[bool, typer.Option("--plot", help="Draw FILES: TTFT against kept tokens and limits.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Print FILES as the README's tables.")] = False,
    batch: Batch = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats; the median counts.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=1, help="Decode steps per repeat.")] = 16,
    layers: Annotated[int | None, typer.Option(help="Cut the geometry to this many layers (printed as such).")] = None,
    scale: Annotated[float, typer.Option(help="Narrow the geometry by this factor (printed as such).")] = 1.0,
    device: Device = None,
    dtype: Dtype = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record, where the checkout has no history.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to [default: benchmarks]; --overhead goes on there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time TTFT, prefill, decode and selection, dense and pruned in one run, beside the limits of card and stack."""
    import vtprune
    from vtprune.evals import speed
    from vtprune.evals.speed import bench as benchmark

    needs(*(["matplotlib"] if plot or overhead else []), *(["av", "torchvision"] if video is not None else []))
    if plot or table:
        _from_files(files or [], plot, table, out or RUNS)
        return
    if files:
        raise ValueError(f"{files[0]}: files are read by --plot and --table only")
    if geometry is not None and model is not None:
        raise ValueError("--geometry and --model exclude each other: the first has random weights, the second its own")
    yours = [name for name, given in (("image", image), ("video", video), ("prompt", prompt)) if given is not None]
    if yours and (geometry is not None or serve is not None or kernels or selection):
        raise ValueError(
            f"--{yours[0]} is for a model with weights of its own: name one with --model, and nothing else"
        )
    keeps = parse_keeps(keep, benchmark.KEEPS)
    named = method or ([] if recipe else benchmark.METHODS)
    names = [cls.name for cls in vtprune.methods()] if all_methods else list(named)
    models.quiet()
    where, progress = device_of(device), not as_json
    place = out or (RUNS / f"{date.today()}-overhead" if overhead else RUNS)

    def save(report: speed.BenchReport) -> Path:
        report.environment["commit"] = report.environment["commit"] or commit or None
        return report.write(place)

    report: speed.BenchReport
    if serve is not None:
        if geometry is not None:
            raise ValueError("--serve runs a server, which --geometry cannot be: name a checkpoint with --model")
        report = served(
            serve, model, method, keep, recipe, device, dtype, server_args, progress,
            requests=requests, concurrency=concurrency, repeats=repeats, new_tokens=new_tokens, side=side,
        )  # fmt: skip
    elif overhead:
        report = _overhead(
            geometry, model, method, keeps[0] if keep else None, repeats, new_tokens, device, dtype, batch, layers,
            scale, progress, seen(image, video, frames), prompt, place, save,
        )  # fmt: skip
    elif kernels or selection:
        from vtprune.evals.speed.bench_parts import parts

        report = parts("kernels" if kernels else "selection", where)
    else:
        what: benchmark.Subject
        if model is not None or yours:
            what = _subject(model, device, dtype, batch, seen(image, video, frames), prompt)
        else:
            what = benchmark.subject(geometry or "tiny", where, dtype_of(dtype, where), batch, layers, scale)
        if hooks:
            from vtprune.evals.speed.bench_hooks import hooks as measure_hooks

            report = measure_hooks(what, names[0], keeps[0], progress=progress)
        else:
            report = benchmark.bench(
                what, names, keeps, recipes=recipe or (), prefill=prefill.split(","), bucket=bucket, repeats=repeats,
                new_tokens=new_tokens, skip=all_methods, progress=progress, finished=save,
            )  # fmt: skip
    path = save(report)
    if overhead and report.rows:
        report.plot(path.with_suffix(".png"))
    show_report(report, as_json)
    if not as_json:
        typer.echo(f"wrote {path}")


def _overhead(
    geometry: str | None, model: str | None, method: list[str] | None, keep: float | int | None, repeats: int,
    steps: int, device: str | None, dtype: str | None, batch: int, layers: int | None, scale: float, progress: bool,
    given: Any, prompt: str | None, place: Path, save: Callable[[Any], Path],
) -> Any:  # fmt: skip
    import vtprune
    from vtprune.evals.speed import bench as benchmark
    from vtprune.evals.speed import bench_overhead as costs

    where = device_of(device)
    kind = dtype_of(dtype, where)
    if model is not None or given is not None or prompt is not None:
        subjects = [partial(_subject, model, device, dtype, batch, given, prompt)]
    elif geometry is not None:
        subjects = [partial(benchmark.subject, geometry, where, kind, batch, layers, scale)]
    elif layers is not None or scale != 1:
        raise ValueError("--overhead shrinks what --geometry names: name one, or leave out --layers and --scale")
    else:
        subjects = [partial(costs.small_llava, grid, where, kind, batch) for grid in costs.GRIDS]
    file, before = place / costs.FILE, None
    if file.exists():
        before = costs.OverheadReport.load(file)
        told = f"{file} holds {len(before.rows)} rows of commit {before.environment['commit']}, and what is missing"
        typer.secho(f"vtprune: {told} is measured", err=True, fg="yellow")
    names = method or [cls.name for cls in vtprune.methods()]
    before_llm = [text for text in names if vtprune.create(parse_method(text)[0]).seam == "pre_llm"]
    return costs.overhead(
        subjects, names, keep or costs.KEEP, repeats=repeats, steps=steps, grow=before_llm if where == "cpu" else (),
        loops=where == "cpu" and method is None, progress=progress, finished=save, before=before,
    )  # fmt: skip


def _subject(
    model: str | None, device: str | None, dtype: str | None, batch: int, given: Any, prompt: str | None
) -> Any:
    """A model asked about the user's picture or film, or about the toy's picture, which is small."""
    from vtprune.evals.speed import bench as benchmark
    from vtprune.evals.toys import image
    from vtprune.evals.video import Video as Clip

    question = image.questions(per_capability=1, capabilities=["color"])[0]
    loaded, processor = models.load(model, device, dtype, video=isinstance(given, Clip))
    about = question.image if given is None else given
    what = benchmark.from_processor(model or "tiny", loaded, processor, about, prompt or question.prompt, batch)
    if model is not None and what.visual < FEW:
        told = "" if given is not None else ": name a picture of yours with --image, or a film with --video"
        typer.secho(
            f"vtprune: {what.visual} visual tokens are too few to tell what pruning gains, and less than {FEW}{told}",
            err=True, fg="yellow",
        )  # fmt: skip
    return what


def _from_files(files: list[Path], plot: bool, table: bool, out: Path) -> None:
    from vtprune.evals import speed

    if not files:
        raise ValueError("--plot and --table read what earlier runs wrote: name the files, as in benchmarks/*.json")
    if table:
        typer.echo(speed.table(files))
    if plot:
        typer.echo(f"wrote {speed.plot([speed.load(path) for path in files], out / 'ttft.png')}")
