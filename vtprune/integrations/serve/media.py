"""Pictures and films of a request: where they come from, how large they may be, and what they hold."""

from __future__ import annotations

import base64
import binascii
import io
import urllib.error
import urllib.request
import warnings
from typing import TYPE_CHECKING, Any

from PIL import Image

from vtprune import pictures
from vtprune.integrations.serve.errors import RequestError
from vtprune.integrations.serve.limits import Limits

if TYPE_CHECKING:
    from vtprune.evals.video import Video

# What people send. Pillow reads dozens more, some by starting other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO", "TIFF")
# Files that hold their film themselves. FFmpeg also knows lists of other files and addresses, which it would open.
CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv", "asf")
SHOWN = 60  # characters of a refused address in a message


class MediaReader:
    """Reads the pictures and films of one request, as long as its pixels are few enough."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self._left = limits, limits.pixels

    def picture(self, url: str, name: str) -> Image.Image:
        """The picture of an address, in RGB and upright. name: what messages call it.

        Raises RequestError, before anything is decoded where there are too many pixels.
        """
        data = content(url, name, self.limits)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is told instead
                with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                    width, height = opened.size
        except Image.DecompressionBombError as error:
            raise self._too_many(name, "more pixels than Pillow reads safely") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
            kinds = ", ".join(FORMATS)
            raise RequestError(f"{name} cannot be read as a picture: it is none of {kinds}, or damaged") from error
        self._take(width * height, name, f"{width} x {height} pixels")
        try:
            return pictures.read(data)[0]
        except (ValueError, OSError) as error:
            raise RequestError(f"{name}: {error}") from error

    def film(self, url: str, name: str) -> Video:
        """The film of an address: `limits.video_frames` frames at most, spread evenly. Raises as `picture`."""
        data, frames = content(url, name, self.limits), self.limits.video_frames
        try:
            import av

            from vtprune.evals.video import read
        except ImportError as error:
            raise RequestError(
                f"{name}: this server reads no films, as it lacks {error.name}: run pip install 'vtprune[video]' there",
                501,
                code="no_video",
            ) from error
        try:
            with av.open(io.BytesIO(data), options={"format_whitelist": ",".join(CONTAINERS)}) as container:
                coded = [stream.codec_context for stream in container.streams.video if stream.codec_context]
                width, height = max(((one.width, one.height) for one in coded), default=(0, 0))
        except (OSError, ValueError) as error:  # PyAV's own errors are OSErrors and ValueErrors
            kinds = ", ".join(CONTAINERS)
            raise RequestError(f"{name} cannot be read as a video: it is none of {kinds}, or damaged") from error
        # A header may be wrong about the number of its frames, so all that may be taken are counted.
        self._take(width * height * frames, name, f"{frames} frames of {width} x {height} pixels")
        try:
            return read(data, frames)
        except (ValueError, OSError) as error:
            raise RequestError(f"{name}: {error}") from error

    def _take(self, pixels: int, name: str, size: str) -> None:
        if pixels > self._left:
            raise self._too_many(name, size)
        self._left -= pixels

    def _too_many(self, name: str, size: str) -> RequestError:
        most = self.limits.pixels
        message = f"{name} has {size}, and a request may have {most} in all: scale it down, or raise --max-pixels"
        return RequestError(message, code="too_many_pixels")


def content(url: Any, name: str, limits: Limits) -> bytes:
    """The bytes behind a data URL, or a remote one where these are allowed. Raises RequestError."""
    if not isinstance(url, str):
        raise RequestError(f"{name}: its url is a {type(url).__name__}: send a data URL")
    scheme, colon, rest = url.partition(":")
    if colon and scheme.lower() == "data":
        return _of_data_url(rest, name)
    if colon and scheme.lower() in ("http", "https"):
        if limits.remote_urls:
            return _fetched(url, name, limits)
        raise RequestError(
            f"{name}: this server fetches nothing from other machines: send a data URL, or start it with "
            "--allow-remote-urls",
            code="remote_url",
        )
    raise RequestError(
        f"{name}: {url[:SHOWN]!r} is no data URL, and files of the server are never read: send "
        "data:image/png;base64,..."
    )


def _of_data_url(rest: str, name: str) -> bytes:
    head, comma, data = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(f"{name}: its data URL is not base64: send data:image/png;base64,...")
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name}: its data URL is no valid base64 ({error})") from error
    if not found:
        raise RequestError(f"{name}: its data URL holds 0 bytes")
    return found


def _fetched(url: str, name: str, limits: Limits) -> bytes:
    opener = urllib.request.OpenerDirector()  # http and https alone: the default one reads files and FTP, too
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(url, timeout=min(limits.seconds, 30)) as answer:
            found = answer.read(limits.body_bytes + 1)
    except (OSError, ValueError) as error:
        raise RequestError(f"{name} cannot be fetched: {error!s:.200}") from error
    if len(found) > limits.body_bytes:
        raise RequestError(f"{name} is longer than {limits.body_bytes} bytes", 413, code="body_too_large")
    return found
