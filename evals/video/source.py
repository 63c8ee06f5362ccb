"""A video file or its content, opened by PyAV: the stream that is the film, or an error that names what is wrong."""

from __future__ import annotations

import io
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

# FFmpeg opens these as films of a frame or of text, and playlists as the files or addresses that they name.
STILLS = re.compile(r"_pipe$|^(image2|ico|gem|fits|dpx)$")
TEXTS = {"ansi", "bintext", "xbin", "idf"}
PLAYLISTS = {"hls", "dash", "concat", "imf", "sdp"}


def source_of(path: Any) -> Source:
    """What `read` was given (a path, the bytes of a file or an open file), checked as far as no decoder is needed."""
    if isinstance(path, (bytes, bytearray, memoryview)):
        content = bytes(path)
        if not content:
            raise ValueError("there is no video in 0 bytes")
        return Source(f"the video of {len(content)} bytes", "clip", lambda: io.BytesIO(content))
    if hasattr(path, "read"):
        if isinstance(path, io.TextIOBase):
            raise ValueError(f"{path!r} is open as text: open the video with mode 'rb'")
        if not (hasattr(path, "seek") and getattr(path, "seekable", lambda: True)()):
            raise ValueError(
                f"{path!r} cannot be rewound, as decoding needs: give read() its content, .read(), instead"
            )
        if path.seek(0, io.SEEK_END) == 0:
            raise ValueError(f"{path!r} is empty (0 bytes)")
        name = getattr(path, "name", None)
        return Source(name if isinstance(name, str) else "the video", "clip", lambda: _rewound(path))
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{type(path).__name__} is no video: give read() a path, the bytes of a file or an open file")
    file = Path(path)
    if not file.exists():
        if re.match(r"[a-zA-Z][\w+.-]+:/|data:", os.fspath(path)):
            raise ValueError(f"{path} is a URL, and read() opens files only: download it and name the file")
        raise FileNotFoundError(f"{file}: no such video file")
    if not file.is_file():
        raise ValueError(f"{file} is not a file: name one video file")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes): copy or download it again")
    file.open("rb").close()  # Python's own error where it must not be read
    return Source(str(file), file.name, lambda: f"file:{file.absolute()}")


def _rewound(file: Any) -> Any:
    file.seek(0)
    return file


_listeners: list[tuple[Any, bool]] = []  # what to go back to, once for each read that listens
_listeners_lock = threading.Lock()


@contextmanager
def _listening(logging: Any) -> Iterator[None]:
    """FFmpeg's errors are on, which is one switch for all threads: the last one out puts it back."""
    with _listeners_lock:
        _listeners.append(_listeners[0] if _listeners else (logging.get_level(), logging.get_skip_repeated()))
        if len(_listeners) == 1:
            logging.set_level(logging.ERROR)
            logging.set_skip_repeated(False)  # else the second reading of a damaged file hears nothing
    try:
        yield
    finally:
        with _listeners_lock:
            level, skips = _listeners.pop()
            if not _listeners:
                logging.set_level(level)
                logging.set_skip_repeated(skips)


class Source:
    """A video that can be opened as often as needed: its name in messages and in commands, and how to open it."""

    def __init__(self, name: str, short: str, content: Callable[[], Any]) -> None:
        try:
            import av
        except ImportError as error:
            raise ImportError("reading a video file needs PyAV: pip install 'vtprune[video]'") from error
        self.av: Any = av
        self.name, self._short, self._content = name, short, content

    def remedy(self, options: str = "-c:v libx264", target: str = "out.mp4", before: str = "") -> str:
        """The command that writes the video anew."""
        return f"`ffmpeg {before}-i {shlex.quote(self._short)} {options} {target}`"

    def damaged(self, what: str) -> ValueError:
        """The error for a damaged file; `what` says how that shows."""
        again = self.remedy(before="-err_detect ignore_err ")
        return ValueError(
            f"{self.name} is truncated or damaged: {what}; copy or download it again, or keep what "
            f"is left of it with {again}"
        )

    @contextmanager
    def raw(self) -> Iterator[IO[bytes]]:
        """The file itself, for what FFmpeg does not tell."""
        content = self._content()
        if not isinstance(content, str):
            yield content
            return
        with open(content.removeprefix("file:"), "rb") as file:
            yield file

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """(container, its video stream) or an error that names the defect."""
        try:
            container = self.av.open(self._content())
        except (self.av.error.FFmpegError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.name} cannot be opened as a video: it is not one that FFmpeg knows, or it is truncated"
            ) from error
        with container:
            yield container, self._stream(container)

    @contextmanager
    def reports(self) -> Iterator[list[Any]]:
        """What FFmpeg reports as errors in this thread: the only trace of data that it had to skip or to guess.

        Nothing may decode in threads of its own meanwhile: they would wait for Python's lock, and Python for them.
        """
        with _listening(self.av.logging), self.av.logging.Capture() as log:
            yield log

    def _stream(self, container: Any) -> Any:
        """The first video stream that is a film in a form with times."""
        form = container.format.name
        if form in PLAYLISTS:
            raise ValueError(f"{self.name} is a playlist ({form}), not a video: name the video file itself")
        if not container.streams:
            raise ValueError(f"{self.name} cannot be opened as a video: it is truncated, or no stream is in it")
        covers = self.av.stream.Disposition.attached_pic
        films = [s for s in container.streams.video if not s.disposition & covers]
        if not films:
            kinds = ", ".join(sorted({s.type for s in container.streams}))
            cover = " and a cover picture" if container.streams.video else ""
            raise ValueError(f"{self.name} holds no video stream, only {kinds}{cover}: name a file with pictures")
        codec = self.codec(films[0])
        if "mov" in form:  # the items of AVIF and HEIC, which stand next to the film where there is one
            films = [s for s in films if s.frames != 1 or s.duration is not None]
        stream = films[0] if films else None
        if stream is None or STILLS.search(form):
            with self.raw() as file:
                moves = b"ANIM" in file.read(64)
            raise ValueError(
                f"{self.name} is an animated picture ({codec}) that FFmpeg does not decode: take its frames from "
                "PIL.ImageSequence.Iterator(PIL.Image.open(...))"
                if moves and codec == "webp"
                else f"{self.name} is a still picture ({codec}), not a video: open it with PIL.Image.open"
            )
        codec = self.codec(stream)
        if stream.codec_context is None:
            raise ValueError(
                f"{self.name} holds video of the codec {codec}, which this FFmpeg does not know; convert it where it "
                f"plays: {self.remedy()}"
            )
        if codec in TEXTS:
            raise ValueError(f"{self.name} is text ({codec}), not a video")
        if int(container.format.flags) & self.av.format.Flags.no_timestamps.value:
            raise ValueError(
                f"{self.name} is a raw {codec} stream, which states no times: put it into a file that does, at the "
                f"frame rate it was made for, such as {self.remedy(before='-framerate 25 ')}"
            )
        return stream

    @staticmethod
    def codec(stream: Any) -> str:
        """The name of the codec of a stream."""
        return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"

    def packets(self, container: Any, *streams: Any) -> Iterator[Any]:
        """The packets of some streams, or all, of sound too: a file may go on after its film."""
        try:
            yield from container.demux(*streams)
        except self.av.error.FFmpegError as error:
            raise self.damaged(f"it cannot be read to its end ({error.strerror})") from error
