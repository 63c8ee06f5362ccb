"""`vtprune inspect`: what pruning can do for a model, before anything is run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vtprune.cli.common import needs, print_json, seen, sentence
from vtprune.cli.options import Image, Json, Prompt, Video
from vtprune.evals import models

SIZE = "1344x896"


@sentence
def inspect(
    model: Annotated[str, typer.Argument(help="A folder of save_pretrained, or a hub id. Weights are not needed.")],
    size: Annotated[str | None, typer.Option(help=f"Pixels of the picture, or of a frame ({SIZE}).")] = None,
    image: Image = None,
    video: Video = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of --video (16), or of a clip of --size.")] = None,
    prompt: Prompt = None,
    as_json: Json = False,
) -> None:
    """Tell a model's family, its visual tokens for a picture or a film, the methods it can take and what that can gain.

    Config and processor are read, no weights. --json prints one object of the schema vtprune.inspect/1, which
    `pydoc vtprune.evals.inspection` documents.
    """
    if sum(given is not None for given in (size, image, video)) > 1:
        raise ValueError("--size, --image and --video each say what is looked at: give one of them")
    if image is not None and frames is not None:
        raise ValueError("--frames belongs to --video or --size: a picture has none")
    needs(*(["av", "torchvision"] if video is not None else []))
    from vtprune.evals import inspection

    looked_at = seen(image, video, frames or 16) or _empty(size or SIZE, frames)

    models.quiet()
    document = inspection.inspect(model, looked_at, prompt)
    if as_json:
        print_json("inspect", document)
    else:
        typer.echo("\n".join(inspection.in_words(document)))


def _empty(size: str, frames: int | None) -> Any:
    """An empty picture of that size, or a clip of so many of them, one a second."""
    import numpy as np
    from PIL import Image as Pillow

    from vtprune.evals.video import Video as Clip

    width, height = _pixels(size)
    if frames is None:
        return Pillow.new("RGB", (width, height))
    every = np.arange(frames)
    return Clip(np.zeros((frames, height, width, 3), np.uint8), every.astype(np.float64), every, frames, 1.0)


def _pixels(size: str) -> tuple[int, int]:
    """'1344x896' -> (1344, 896)."""
    width, _, height = size.partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and int(width) * int(height)):
        raise ValueError(f"--size {size}: write width and height in pixels, such as {SIZE}")
    return int(width), int(height)
