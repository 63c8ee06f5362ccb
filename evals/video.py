"""Frames out of a video file, decoded by PyAV (FFmpeg): only the ones asked for, each at the moment it is on screen."""

from __future__ import annotations

import io
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

STRATEGIES = ("uniform", "fps")
# Times in a file are rounded, to a millisecond at worst where its frame rate is constant (Matroska, FLV).
ROUNDING = 1.001e-3
# FFmpeg opens these as films of a frame or of text, and playlists as the files or addresses that they name.
STILLS = re.compile(r"_pipe$|^(image2|ico|gem|fits|dpx)$")
TEXTS = {"ansi", "bintext", "xbin", "idf"}
REPORTING = threading.Lock()  # FFmpeg has one log level for all
PLAYLISTS = {"hls", "dash", "concat", "imf", "sdp"}


@dataclass(frozen=True)
class Video:
    """`frames` uint8 [T, height, width, 3], upright; `times` float64 [T]: seconds at which each comes on screen.

    `indices` int64 [T] among the `total` frames of the file; `rate` is their mean number per second.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    indices: NDArray[np.int64]
    total: int
    rate: float

    @property
    def metadata(self) -> dict[str, Any]:
        """What a Hugging Face processor takes as `video_metadata`: [metadata] next to videos=[frames].

        Processors compute the time of a frame as frames_indices / fps, and the rate of the frames they are given as
        their number / total_num_frames * fps. Where the frame rate of the file varies, no fps makes the first the true
        times, so all three then count milliseconds instead of frames: fps is 1000.
        """
        duration = self.total / self.rate
        fps, total, indices = self.rate, self.total, self.indices
        if np.abs(indices / fps - self.times).max(initial=0) > ROUNDING:
            fps, indices = 1000.0, np.round(self.times * 1000).astype(np.int64)
            total = max(round(duration * 1000), int(indices[-1]) + 1)
        return {"fps": fps, "total_num_frames": total, "duration": duration, "frames_indices": indices.tolist()}


def read(
    path: str | os.PathLike[str] | bytes | IO[bytes], frames: int = 32, strategy: str = "uniform", *, rate: float = 1.0
) -> Video:
    """Decode up to `frames` frames of the first video stream of a file, or of its content: bytes, or a file object.

    "uniform" takes the frames on screen at `frames` moments spread evenly over the clip, first and last included;
    "fps" one every 1 / `rate` seconds from the start, spread as by "uniform" if that would be more than `frames`.
    Moments are seconds, so a variable frame rate changes which frames are taken, never when. A clip with fewer frames
    than asked for comes whole.

    Times begin at 0 with the first picture on screen: what an edit list hides is not there, nor what comes before the
    first key frame of a recording that begins in the middle. Pictures are turned and mirrored as the file says. They
    are 8-bit RGB in the pixels that the file stores: not stretched to the aspect ratio of the pixels, fields of an
    interlaced film woven, transparency dropped, HDR not tone-mapped.

    The file is decoded from start to end, because only that tells in every container which pictures are shown and when;
    no more than the frames asked for are held. Raises FileNotFoundError, and ValueError with the reason and the way out
    for what cannot be decoded, or not without a doubt: a URL, an empty, truncated or damaged file, no video, a still
    picture, a raw stream without times. Damage that a decoder bridges without an error (lost packets of MPEG-TS,
    altered pixels of codecs without checks) is not noticed. Needs the `video` extra.
    """
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(map(repr, STRATEGIES))}")
    if not rate > 0:
        raise ValueError(f"rate={rate} frames per second must be above 0")
    source = _source(path)
    expected = source.scan()
    wanted = choose(expected, frames, strategy, rate)
    starts, pictures = source.decode(wanted)
    indices = choose(starts, frames, strategy, rate)
    if not set(indices.tolist()) <= pictures.keys():  # the file does not show what its packets announce
        starts, pictures = source.decode(indices)
    chosen = [pictures[index] for index in indices.tolist()]
    return Video(np.stack(chosen), starts[indices], indices, len(starts), _rate(starts, source.rates))


def choose(starts: NDArray[np.float64], frames: int, strategy: str, rate: float) -> NDArray[np.int64]:
    """Indices [T] of the frames to decode out of `starts` [n], the seconds at which they come on screen."""
    if len(starts) <= frames and strategy == "uniform":
        return np.arange(len(starts))
    moments = np.linspace(starts[0], starts[-1], frames)
    if strategy == "fps":
        regular = np.arange(starts[0], starts[-1] + 1e-3, 1 / rate)
        moments = regular if len(regular) <= frames else moments
    # A millisecond of grace: files round times to their time base.
    shown = np.searchsorted(starts, moments + 1e-3, side="right") - 1
    return np.unique(shown.clip(0))


def _rate(starts: NDArray[np.float64], stated: list[float]) -> float:
    """Frames per second: the number that gives every start if the rate is constant, else the mean."""
    if len(starts) == 1:
        return 1.0
    mean = (len(starts) - 1) / float(starts[-1])
    for rate in stated:
        if np.abs(np.arange(len(starts)) / rate - starts).max() <= ROUNDING:
            return rate
    return mean


def _source(path: Any) -> _Source:
    """What `read` was given, checked as far as that goes without a decoder."""
    if isinstance(path, (bytes, bytearray, memoryview)):
        content = bytes(path)
        if not content:
            raise ValueError("there is no video in 0 bytes")
        return _Source(f"the video of {len(content)} bytes", "clip", lambda: io.BytesIO(content))
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
        return _Source(name if isinstance(name, str) else "the video", "clip", lambda: _rewound(path))
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
    return _Source(str(file), file.name, lambda: f"file:{file.absolute()}")


def _rewound(file: Any) -> Any:
    file.seek(0)
    return file


class _Source:
    """A video that can be opened as often as needed: its name in messages and in commands, and how to open it."""

    def __init__(self, name: str, short: str, content: Callable[[], Any]) -> None:
        try:
            import av
        except ImportError as error:
            raise ImportError("reading a video file needs PyAV: pip install 'vtprune[video]'") from error
        self.av: Any = av
        self.name, self._short, self._content = name, short, content
        self.rates: list[float] = []
        self._first = 0  # packet at which decoding begins
        self._key: int | None = None  # the time of its picture
        self._begin: int | None = None  # the time of the first picture on screen that does not come before that one
        self._slots: NDArray[np.float64] | None = None  # the start of each frame where only their order is stated

    def remedy(self, options: str = "-c:v libx264", target: str = "out.mp4", before: str = "") -> str:
        return f"`ffmpeg {before}-i {shlex.quote(self._short)} {options} {target}`"

    def damaged(self, what: str) -> ValueError:
        again = self.remedy(before="-err_detect ignore_err ")
        return ValueError(
            f"{self.name} is truncated or damaged: {what}; copy or download it again, or keep what "
            f"is left of it with {again}"
        )

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
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
    def _reports(self) -> Iterator[list[Any]]:
        """What FFmpeg reports as errors in this thread: the only trace of data that a container had to skip.

        Not while something decodes in threads of its own: they would wait for Python's lock, and Python for them.
        """
        logging = self.av.logging
        with REPORTING:
            level = logging.get_level()
            logging.set_level(logging.ERROR)
            try:
                with logging.Capture() as log:
                    yield log
            finally:
                logging.set_level(level)

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
        stream = films[0]
        codec = self._codec(stream)
        if stream.codec_context is None:
            raise ValueError(
                f"{self.name} holds video of the codec {codec}, which this FFmpeg does not know; convert it where it "
                f"plays: {self.remedy()}"
            )
        if STILLS.search(form):
            raise ValueError(f"{self.name} is a still picture ({codec}), not a video: open it with PIL.Image.open")
        if codec in TEXTS:
            raise ValueError(f"{self.name} is text ({codec}), not a video")
        if int(container.format.flags) & self.av.format.Flags.no_timestamps.value:
            raise ValueError(
                f"{self.name} is a raw {codec} stream, which states no times: put it into a file that does, at the "
                f"frame rate it was made for, such as {self.remedy(before='-framerate 25 ')}"
            )
        return stream

    @staticmethod
    def _codec(stream: Any) -> str:
        return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"

    def _packets(self, container: Any) -> Iterator[Any]:
        """All packets, of sound too: a file may go on after its film."""
        try:
            yield from container.demux()
        except self.av.error.FFmpegError as error:
            raise self.damaged(f"it cannot be read to its end ({error.strerror})") from error

    def scan(self) -> NDArray[np.float64]:
        """Seconds [n] at which frames come on screen as the packets announce it; raises if the file ends early."""
        own: list[tuple[int | None, int | None, bool, bool]] = []
        end = 0.0
        with self._reports() as log, self._opened() as (container, stream):
            if "mov" in container.format.name:
                log.clear()  # about its header; what is missing of the film shows later
            for packet in self._packets(container):
                last = packet.pts if packet.dts is None else packet.dts if packet.pts is None else packet.pts
                if last is not None:
                    end = max(end, float((last + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index == stream.index and packet.size:
                    own.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
            form, base, codec = container.format.name, float(stream.time_base), self._codec(stream)
            self.rates = [float(r) for r in (stream.average_rate, stream.guessed_rate) if r]
            stated = (container.duration or 0) / self.av.time_base
        told = [message.strip() for _, name, message in log if name == form]
        if told:
            raise self.damaged(f"FFmpeg reports {told[0]!r}")
        if stated - end > max(3 * end / max(len(own), 1), 0.02 * stated):
            raise self.damaged(f"it announces {stated:.2f} seconds and ends after {end:.2f}")
        if not own:
            raise ValueError(f"{self.name} holds a video stream ({codec}) without a frame: record or download it again")
        if "mpeg" in form:  # a broadcast may be cut anywhere; other files begin with a key frame
            self._first = next((i for i, packet in enumerate(own) if packet[2]), 0)
        key = own[self._first][0]
        own = own[self._first :]
        times = [pts for pts, _, _, hidden in own if pts is not None and not hidden]
        self._key = key
        self._begin = min((pts for pts in times if key is not None and pts >= key), default=None)
        if form == "avi":  # it holds one picture after the other, and what FFmpeg makes of their times can be wrong
            times = [dts for _, dts, _, _ in own if dts is not None]
            self._slots = np.unique(times) * base
        starts = np.unique(np.array(times, np.int64)) * base
        return starts - starts[0] if len(starts) else np.zeros(1)

    def decode(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.float64], dict[int, NDArray[np.uint8]]]:
        """(seconds [n] at which the frames come on screen, the pictures of those wanted by their number)."""
        asked = set(wanted.tolist())
        times: list[int | None] = []
        pictures: dict[int, NDArray[np.uint8]] = {}
        with self._opened() as (container, stream):
            codec, base = self._codec(stream), float(stream.time_base)
            for frame in self._frames(container, stream):
                if frame.is_corrupt:
                    raise self.damaged(f"frame {len(times)} is incomplete")
                again = bool(times) and frame.pts is not None and frame.pts == times[-1]  # the later one covers it
                if not again:
                    times.append(frame.pts)
                if len(times) - 1 in asked:
                    pictures[len(times) - 1] = self._upright(frame)
        if not times:
            raise ValueError(
                f"{self.name} holds video of the codec {codec}, of which FFmpeg can decode no frame here: copy or "
                f"download it again, or convert it where it plays: {self.remedy()}"
            )
        if len({picture.shape for picture in pictures.values()}) > 1:
            sizes = sorted({f"{picture.shape[1]} x {picture.shape[0]}" for picture in pictures.values()})
            raise ValueError(f"{self.name} changes its size ({', '.join(sizes)}): bring it to one with {self.remedy()}")
        return self._starts(times, base, codec), pictures

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """Frames in the order of display from the first key frame on, where a film begins that was cut anywhere."""
        stream.codec_context.options = {"err_detect": "explode"}
        stream.thread_type = "AUTO"
        if self.av.logging.get_level() is not None:  # someone listens: see _reports
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        number = -1
        for packet in self._packets(container):
            if packet.stream_index != stream.index or (not packet.size and packet.dts is not None):
                continue
            number += bool(packet.size)
            if number < self._first:
                continue
            if packet.is_corrupt:
                raise self.damaged(f"packet {number} of its video is incomplete")
            # Of pictures before the first key frame some refer to what was cut away.
            leads = number > self._first and None not in (packet.pts, self._key) and packet.pts < self._key
            try:
                yield from packet.decode()
            except self.av.error.FFmpegError as error:
                if not leads:
                    raise self.damaged(f"packet {number} of its video cannot be decoded ({error.strerror})") from error

    def _starts(self, times: list[int | None], base: float, codec: str) -> NDArray[np.float64]:
        """Seconds at which the frames come on screen, the first at 0."""
        if self._slots is not None and len(self._slots) == len(times):
            return self._slots - self._slots[0]
        if None in times:
            raise ValueError(
                f"{self.name} does not say when its frame {times.index(None)} ({codec}) is shown: write it anew with "
                f"{self.remedy()}"
            )
        starts = np.array(times, np.int64)
        if self._begin is not None and self._slots is None and starts[0] > self._begin:
            raise self.damaged("its first pictures cannot be decoded")
        if (np.diff(starts) <= 0).any():
            at = int(np.argmax(np.diff(starts) <= 0)) + 1
            raise ValueError(
                f"{self.name} is damaged or put together from several: the time of frame {at} ({codec}) is before that "
                f"of the frame it follows; write it anew with {self.remedy()}"
            )
        return (starts - starts[0]) * base

    def _upright(self, frame: Any) -> NDArray[np.uint8]:
        """uint8 [height, width, 3], turned and mirrored by multiples of a quarter as the display matrix says."""
        picture = frame.to_ndarray(format="rgb24")
        matrix = frame.side_data.get(self.av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if matrix is None:
            return picture
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if max(abs(b), abs(c)) * 100 < min(abs(a), abs(d)):
            right, down = a, d
        elif max(abs(a), abs(d)) * 100 < min(abs(b), abs(c)):
            picture, right, down = picture.swapaxes(0, 1), c, b
        else:
            raise ValueError(
                f"{self.name} is to be shown turned by {frame.rotation} degrees, and read() turns by quarters only: "
                f"turn it with {self.remedy()}"
            )
        return np.ascontiguousarray(picture[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1])
