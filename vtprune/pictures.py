"""Read an image file as a model should see it: upright, in eight bits, over white; or say in one sentence why not."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps


def read(source: str | os.PathLike[str] | bytes) -> tuple[Image.Image, list[str]]:
    """(the picture in RGB, what was done to it that a reader should know), from a file or from the bytes of one.

    The camera's rotation (EXIF) is applied, 16 bits of grey are scaled to 8, transparent parts lie over white.
    Raises OSError where the file cannot be read, and ValueError with the reason where it is no still picture: not an
    image, damaged, animated, of several pages, of 32-bit values, or of more pixels than Pillow reads safely.
    """
    name, data = _opened(source)
    with data, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(data) as image:
                _check_still(image, name)
                image.load()
                return _upright(image, name)
        except Image.DecompressionBombError as error:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise ValueError(
                f"{name} has over {limit / 1e6:.0f} million pixels, more than Pillow reads safely: scale it down"
            ) from error
        except ValueError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{name} cannot be read as a picture: {_short(reason)}") from error


def _opened(source: str | os.PathLike[str] | bytes) -> tuple[str, IO[bytes]]:
    """What messages call the picture, and its content."""
    if isinstance(source, bytes):
        return f"the picture of {len(source)} bytes", io.BytesIO(source)
    file = Path(source)
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name one picture in it")
    return str(file), file.open("rb")  # a missing or unreadable file is told by the system


def _short(reason: str) -> str:
    return "its format is unknown to Pillow" if reason.startswith("cannot identify") else reason


def _check_still(image: Image.Image, name: str) -> None:
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # MPO is a camera's JPEG, whose further frames are its previews
        pages = "pages" if image.format == "TIFF" else "frames"
        raise ValueError(
            f"{name} holds {count} {pages}, and a still picture is drawn: save one of them as a file of its own"
        )


def _upright(image: Image.Image, name: str) -> tuple[Image.Image, list[str]]:
    notes = []
    rotated = image.getexif().get(0x0112, 1) != 1
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _eight_bits(image, name)
        grey.info = dict(image.info)  # where the rotation stands
        image = grey
        notes.append("its 16-bit grey was scaled to 8 bits")
    turned = ImageOps.exif_transpose(image)
    if rotated:
        notes.append("it was turned upright as its EXIF data say")
    if turned.has_transparency_data:
        clear = turned.convert("RGBA")
        if clear.getchannel("A").getextrema() != (255, 255):
            notes.append("its transparent parts were laid over white, as the model saw them")
        turned = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return turned.convert("RGB"), notes


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits, which Pillow's own conversion would cut off at 255."""
    values = np.asarray(image)
    short = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not short or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} holds 32-bit values, of which none is known to be white: save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.float64) / 257) + 0.5).astype(np.uint8))
