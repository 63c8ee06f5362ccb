"""`vtprune show`: what a method keeps, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from vtprune.cli.common import needs, print_json, sentence, writable
from vtprune.cli.options import Device, Dtype, Image, Json, Model, parse_keep
from vtprune.evals import models
from vtprune.evals.models import device_of


@sentence
def show(
    image: Annotated[
        Path | None, typer.Argument(help="A picture, which --image names too.", show_default=False)
    ] = None,
    picture: Image = None,
    video: Annotated[Path | None, typer.Option(help="A video file instead: a contact sheet.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to take from it.")] = 16,
    method: Annotated[str, typer.Option(help="A name, or name:option=value,option=value.")] = "divprune",
    keep: Annotated[str, typer.Option(help="0.25 or 25% (share), 64 (tokens).")] = "0.25",
    recipe: Annotated[Path | None, typer.Option(help="A recipe.json in place of both, as vtprune tune writes.")] = None,
    model: Model = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--prompt", "--question", help="What is asked (how many shapes); methods that read it depend on it."
        ),
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
    if image is not None and picture is not None:
        raise ValueError(f"{image} and --image {picture}: name one picture")
    image = image or picture
    if vit is not None:
        if image is None or video is not None:
            raise ValueError("--vit draws one picture: name it")
        if recipe is not None:
            raise ValueError("--recipe is for vision-language models: name a --method with --vit")
        needs("onnx")
        _show_vit(image, method, keep, vit, device_of(device), out, as_json)
        return
    if (image is None) == (video is None):
        raise ValueError("name one picture, or one video file with --video")
    needs(*(["av", "torchvision"] if video is not None else []))
    import vtprune
    from vtprune import show as drawing
    from vtprune.evals.accuracy import parse_method, prepare, process
    from vtprune.places import boxes

    rule: Any
    if recipe is not None:
        rule, budget, title = vtprune.Recipe.load(recipe), None, recipe.stem
    else:
        name, options = parse_method(method)
        rule, budget, title = vtprune.create(name, **options), parse_keep(keep), f"{method} at {keep}"
    writable(out)
    subject, notes = _read(image, video, frames)
    loaded, processor = models.load(model, device, dtype, video is not None)
    asked = [question or f"how many shapes {'are there' if video is None else 'appear'} ?"]
    units = drawing.record(loaded, prepare(loaded, processor, asked, [subject]), rule, budget)
    if video is None:
        units = [drawing.joined(units)]
        places = boxes(lambda picture: process(processor, asked, [picture]), subject.size, drawing.rasters(units[0]))
        sheet = drawing.overlay(subject, units[0], title, places)
    else:
        sheet = drawing.contact_sheet(subject, units, title)
    sheet.save(out)
    starts = [sum(unit.n for unit in units[:i]) for i in range(len(units))]
    tokens = [start + i for start, unit in zip(starts, units) for i in unit.idx.tolist()]
    total = sum(unit.n for unit in units)
    told = {"file": str(out), "visual_tokens": total, "kept": tokens, "notes": notes}
    name = recipe.stem if recipe else method
    _tell("show", told, f"{name} kept {len(tokens)} of {total} visual tokens; wrote {out}", image, as_json)


def _read(image: Path | None, video: Path | None, frames: int) -> tuple[Any, list[str]]:
    """The picture or the clip, and what was done to it that a reader should know."""
    if video is not None:
        from vtprune.evals.video import read

        return read(video, frames), []
    from vtprune import pictures

    return pictures.read(cast(Path, image))


def _tell(kind: str, told: dict[str, Any], summary: str, image: Path | None, as_json: bool) -> None:
    """Print the result as JSON, or the notes on the picture and a summary."""
    if as_json:
        print_json(kind, told)
        return
    for note in told["notes"]:
        typer.echo(f"{image}: {note}")
    typer.echo(summary)


def _show_vit(image: Path, method: str, keep: str, weights: Path, device: str, out: Path, as_json: bool) -> None:
    """Draw which patches of a picture became one token inside a vision transformer."""
    import torch

    import vtprune
    from vtprune import pictures
    from vtprune.evals.accuracy import parse_method
    from vtprune.evals.accuracy.vit_data import dinov2_small, photo
    from vtprune.show import draw_groups

    models.quiet()
    name, options = parse_method(method)
    rule = vtprune.create(name, **options)
    budget = None if rule.adaptive else parse_keep(keep)
    writable(out)
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
    told = {"file": str(out), "patches": len(patches), "kept": kept, "slots": patches.tolist(), "notes": notes}
    _tell("show-vit", told, f"{method} made {kept} tokens of {len(patches)} patches; wrote {out}", image, as_json)
