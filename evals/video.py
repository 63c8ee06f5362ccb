"""Frames out of a video file, decoded by PyAV (FFmpeg): only the ones asked for, each at the moment it is on screen."""

from __future__ import annotations

import io
import os
import re
import shlex
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

STRATEGIES = ("uniform", "fps")
# Times in a file are rounded, to a millisecond at worst where its frame rate is constant (Matroska, FLV).
ROUNDING = 1.001e-3
BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"mfra", b"free", b"skip", b"wide", b"sidx", b"uuid", b"meta"}
# Packets: the way to the next frame asked for is skipped where it is longer than that to the key frame before it.
GAP = 100
# FFmpeg opens these as films of a frame or of text, and playlists as the files or addresses that they name.
STILLS = re.compile(r"_pipe$|^(image2|ico|gem|fits|dpx)$")
TEXTS = {"ansi", "bintext", "xbin", "idf"}
# Errors that decoders report about what accompanies the pictures.
ASIDE = re.compile(r"\bSEI\b|\bAPP|E(xif|XIF)|\bICC\b|user data|timecode")
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

    The first of several films in a file is taken. All of it is read, to know which pictures are shown and when; decoded
    is what leads to the frames asked for, from the key frame before each, where the rest is long and the file leaves no
    doubt, else everything, from start to end. No more than the frames asked for are held.

    Raises FileNotFoundError, and ValueError with the reason and the way out for what cannot be decoded, or not without
    a doubt: a URL, an empty, truncated or damaged file, no video, a still picture, a raw stream without times, a stream
    joined from several whose times jump. Damage is what FFmpeg reports as an error, what is shorter than it announces,
    and what is missing of MPEG-TS. Not noticed is damage in parts that need not be decoded; altered pixels where a
    codec has no checks (uncompressed, HuffYUV, QuickTime animation, RealVideo, MPEG program streams, and many single
    bytes of others); a changed header that makes sense; the missing end of a form that states no length (MPEG, whose
    last picture is then a part of one, NUT, IVF, Y4M, MXF, ASF, up to three frames of FLV). Needs the `video` extra.
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


def _even(ticks: Sequence[int | None]) -> NDArray[np.int64] | None:
    """`ticks` as an array if they are those of a constant rate, which steps of one tick more or less round."""
    if None in ticks or len(ticks) < 2:
        return None
    steps = np.diff(np.array(ticks, np.int64))
    return np.array(ticks, np.int64) if steps.min() > 0 and np.ptp(steps) <= 1 else None


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


def _cut(file: IO[bytes], form: str) -> str | None:
    """What says that the end of a file is missing: the lengths that its outermost parts state."""
    file.seek(0, io.SEEK_END)
    size, at, ended = file.tell(), 8 * (form == "apng"), form != "apng"
    layout = "<4xI" if form == "avi" else ">I4x" if form == "apng" or "mov" in form else ""
    if form == "gif":
        file.seek(max(size - 1024, 0))
        tail = file.read()
        # Some end on the last block, without the trailer.
        whole = b"\0;" in tail or tail.endswith((b";", b"\0"))
        return None if whole else "it ends within a picture"
    while layout and at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        name = head[:4] if form == "avi" else head[4:8]
        length = struct.unpack(layout, head[:8])[0]
        if form == "avi":
            if name != b"RIFF" or length in (0, 2**32 - 1):  # written where one cannot go back to state it
                break
            length += 8
        elif form == "apng":
            length, ended = length + 12, ended or name == b"IEND"
        elif name not in BOXES or length == 0:  # the last one goes on to the end
            break
        elif length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if at + length > size:
            return f"its part {name.decode('latin1')!r} announces {length} bytes and {size - at} are there"
        at += max(length, 8)
    return None if ended else "its last part, 'IEND', is missing"


def _lost(file: IO[bytes], program: int) -> tuple[str | None, int]:
    """What says that packets of MPEG-TS are missing: they are counted, of which FFmpeg does not tell all that it knows.

    A jump right at a key frame harms nothing that follows: so begin segments that were joined, whose number is second.
    """
    file.seek(0)
    start = np.frombuffer(file.read(1 << 16), np.uint8)
    grids = [(step, at) for step in (188, 192, 204) for at in range(step) if (start[at::step][:4] == 0x47).all()]
    if not grids or len(start) < 4 * 204:
        return None, 0
    step, at = grids[0]
    last, joints = -1, 0
    while True:
        file.seek(at)
        block = np.frombuffer(file.read(step * 8192), np.uint8)
        if len(block) < step:
            within = 0 < len(block) < 188 and block[0] == 0x47
            return "it ends within a packet" if within else None, joints
        packets = block[: len(block) // step * step].reshape(-1, step)
        if (packets[:, 0] != 0x47).any():
            return f"no packet begins at byte {at + step * int(np.argmax(packets[:, 0] != 0x47))}", joints
        own = (packets[:, 1] & 31) * np.uint16(256) + packets[:, 2] == program
        where = np.flatnonzero(own & (packets[:, 3] & 16 > 0))  # those with content, which alone are counted
        rows = packets[where].astype(int)
        flags = np.where((rows[:, 3] & 32 > 0) & (rows[:, 4] > 0), rows[:, 5], 0)
        counts = np.append(last if last >= 0 or not len(rows) else (rows[0, 3] - 1) % 16, rows[:, 3] & 15)
        jumps = np.diff(counts) % 16 > 1  # the same number again is the same packet again
        joint = jumps & ((flags & 0x80 > 0) | (flags & 0x40 > 0) & (rows[:, 1] & 0x40 > 0))
        lost = jumps & ~joint | (rows[:, 1] & 0x80 > 0)
        if lost.any():
            return f"packets are missing before byte {at + step * int(where[np.argmax(lost)])}", joints
        joints += int(joint.sum())
        last = int(counts[-1])
        at += packets.size


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
        self._mixed = False  # whether the times of some frames are those of others
        self._base = 1.0  # seconds of a tick, the unit of its times
        self._joints = 0  # of segments of MPEG-TS, of which FFmpeg thinks that packets are missing
        self._first = 0  # packet at which decoding begins
        self._own: list[tuple[int | None, bool]] = []  # of each packet the time of its picture and whether it is a key
        self._begin: int | None = None  # the time of the first picture on screen that does not come before that one
        self._ticks: NDArray[np.int64] | None = None  # of all pictures in order, where the packets leave no doubt
        self._slots: NDArray[np.int64] | None = None  # of each frame, where only their order is stated

    def remedy(self, options: str = "-c:v libx264", target: str = "out.mp4", before: str = "") -> str:
        return f"`ffmpeg {before}-i {shlex.quote(self._short)} {options} {target}`"

    def damaged(self, what: str) -> ValueError:
        again = self.remedy(before="-err_detect ignore_err ")
        return ValueError(
            f"{self.name} is truncated or damaged: {what}; copy or download it again, or keep what "
            f"is left of it with {again}"
        )

    @contextmanager
    def _raw(self) -> Iterator[IO[bytes]]:
        content = self._content()
        if not isinstance(content, str):
            yield content
            return
        with open(content.removeprefix("file:"), "rb") as file:
            yield file

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
        codec = self._codec(films[0])
        if "mov" in form:  # the items of AVIF and HEIC, which stand next to the film where there is one
            films = [s for s in films if s.frames != 1 or s.duration is not None]
        stream = films[0] if films else None
        if stream is None or STILLS.search(form):
            with self._raw() as file:
                moves = b"ANIM" in file.read(64)
            raise ValueError(
                f"{self.name} is an animated picture ({codec}) that FFmpeg does not decode: take its frames from "
                "PIL.ImageSequence.Iterator(PIL.Image.open(...))"
                if moves and codec == "webp"
                else f"{self.name} is a still picture ({codec}), not a video: open it with PIL.Image.open"
            )
        codec = self._codec(stream)
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
    def _codec(stream: Any) -> str:
        return stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"

    def _packets(self, container: Any, *streams: Any) -> Iterator[Any]:
        """The packets of some streams, or all, of sound too: a file may go on after its film."""
        try:
            yield from container.demux(*streams)
        except self.av.error.FFmpegError as error:
            raise self.damaged(f"it cannot be read to its end ({error.strerror})") from error

    def scan(self) -> NDArray[np.float64]:
        """Seconds [n] at which frames come on screen as the packets announce it; raises if the file ends early."""
        own: list[tuple[int | None, int | None, bool, bool]] = []
        end, begun = 0.0, 0  # begun: reports until the first key frame, and one
        with self._reports() as log, self._opened() as (container, stream):
            if "mov" in container.format.name:
                log.clear()  # about its header; what is missing of the film shows later
            for packet in self._packets(container):
                last = packet.pts if packet.dts is None else packet.dts if packet.pts is None else packet.pts
                if last is not None:
                    end = max(end, float((last + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index == stream.index and packet.size:
                    own.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
                    begun = begun or (len(log) + 1 if packet.is_keyframe else 0)
            form, codec = container.format.name, self._codec(stream)
            base = self._base = float(stream.time_base)
            reorders, program, decoder = stream.codec_context.has_b_frames, stream.id, stream.codec_context.name
            self.rates = [float(r) for r in (stream.average_rate, stream.guessed_rate) if r]
            stated = (container.duration or 0) / self.av.time_base
        with self._raw() as file:
            missing = _cut(file, form)
            if missing is None and form == "mpegts":
                missing, self._joints = _lost(file, program)
        if missing:
            raise self.damaged(missing)
        # What a parser says before the first key frame is about what was cut away.
        parsed = [text for _, name, text in log[begun - 1 :] if begun and name == decoder and not ASIDE.search(text)]
        told = [text for _, name, text in log if name == form] + parsed
        if told:
            raise self.damaged(f"FFmpeg reports {told[0].strip()!r}")
        tolerance = max(3 * end / max(len(own), 1), 0.02 * stated, 0.1)
        if tolerance < stated - end < 1e8:  # seconds; beyond is what stands for an unknown number
            raise self.damaged(f"it announces {stated:.2f} seconds and ends after {end:.2f}")
        if not own:
            raise ValueError(f"{self.name} holds a video stream ({codec}) without a frame: record or download it again")
        ticks = self._arrange(own, form, reorders)
        return (ticks - ticks[0]) * base if len(ticks) else np.zeros(1)

    def _arrange(
        self, own: list[tuple[int | None, int | None, bool, bool]], form: str, reorders: bool
    ) -> NDArray[np.int64]:
        """The times [n] in ticks at which frames come on screen as far as the packets tell, and how far that is."""
        if "mpeg" in form:  # a broadcast may be cut anywhere; other files begin with a key frame
            self._first = next((i for i, packet in enumerate(own) if packet[2]), 0)
        self._own = [(pts, is_key) for pts, _, is_key, _ in own]
        key = own[self._first][0]
        own = own[self._first :]
        times = [pts for pts, _, _, hidden in own if pts is not None and not hidden]
        self._begin = min((pts for pts in times if key is not None and pts >= key), default=None)
        if form == "avi":  # it holds one picture after the other, and what FFmpeg makes of their times can be wrong
            times = [dts for _, dts, _, _ in own if dts is not None]
            self._slots = np.unique(np.array(times, np.int64))
        elif form == "mpeg" and (slots := _even([dts for _, dts, _, _ in own])) is not None:
            # Where two pictures begin in one packet of this form FFmpeg gives the time of the second to the first.
            self._mixed = _even(sorted(times)) is None or len(times) < len(own)
            self._slots, times = (slots, slots.tolist()) if self._mixed else (None, times)
        elif self._begin is not None:
            times = [pts for pts in times if pts >= self._begin]
        self._ticks = self._sure(own, reorders)
        return np.unique(np.array(times, np.int64))

    def _sure(self, own: list[tuple[int | None, int | None, bool, bool]], reorders: bool) -> NDArray[np.int64] | None:
        """Times [n] in ticks at which the pictures come on screen, in order, if there is no doubt about any of them."""
        told = [pts for pts, *_ in own if pts is not None]
        shown = [pts for pts, _, _, hidden in own if pts is not None and not hidden]
        shown = [pts for pts in shown if self._begin is not None and pts >= self._begin]
        ticks = np.unique(np.array(shown, np.int64))
        if not shown or len(told) < len(own) or len(ticks) < len(shown):
            return None
        # In one film the key frames follow each other, and no other picture goes back to before the last but one.
        before = last = latest = min(told) - 1
        for pts, (_, _, is_key, _) in zip(told, own, strict=True):
            if pts < before or (is_key and pts <= latest):
                return None
            if is_key:
                before, last = last, pts
            latest = max(latest, pts)
        if self._jump(ticks) is not None:
            return None
        if self._slots is not None:
            ordered = not reorders or told != sorted(told)
            if not ordered or not np.array_equal(ticks - ticks[0], self._slots - self._slots[0]):
                return None
        return ticks

    def _jump(self, ticks: NDArray[np.int64]) -> int | None:
        """The frame after which joined segments of MPEG-TS, which states a time every 0.7 seconds, jump in time."""
        gaps = np.diff(ticks) * self._base
        return int(np.argmax(gaps)) if self._joints and gaps.max(initial=0) > 1 else None

    def decode(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.float64], dict[int, NDArray[np.uint8]]]:
        """(seconds [n] at which the frames come on screen, the pictures of those wanted by their number)."""
        for back in (0, 1):
            pictures = self._in_runs(self._runs(wanted, back))
            if pictures is not None and self._ticks is not None:
                return (self._ticks - self._ticks[0]) * self._base, self._alike(pictures)
        return self._whole(set(wanted.tolist()))

    def _whole(self, asked: set[int]) -> tuple[NDArray[np.float64], dict[int, NDArray[np.uint8]]]:
        """`decode` from start to end, which takes the times from the frames."""
        times: list[int | None] = []
        pictures: dict[int, NDArray[np.uint8]] = {}
        with self._reports() as log, self._opened() as (container, stream):
            codec = self._codec(stream)
            for number, packet in self._coded(container, stream):
                if number < self._first:
                    continue
                for frame in self._decoded(packet, number, self._first, log):
                    again = bool(times) and frame.pts is not None and frame.pts == times[-1]  # the later one covers it
                    if self._mixed or not again:
                        times.append(frame.pts)
                    if len(times) - 1 in asked:
                        pictures[len(times) - 1] = self._upright(frame)
        if not times:
            raise ValueError(
                f"{self.name} holds video of the codec {codec}, of which FFmpeg can decode no frame here: copy or "
                f"download it again, or convert it where it plays: {self.remedy()}"
            )
        return self._starts(times, self._base, codec), self._alike(pictures)

    def _alike(self, pictures: dict[int, NDArray[np.uint8]]) -> dict[int, NDArray[np.uint8]]:
        if len({picture.shape for picture in pictures.values()}) > 1:
            sizes = sorted({f"{picture.shape[1]} x {picture.shape[0]}" for picture in pictures.values()})
            raise ValueError(f"{self.name} changes its size ({', '.join(sizes)}): bring it to one with {self.remedy()}")
        return pictures

    def _runs(self, wanted: NDArray[np.int64], back: int) -> list[tuple[int, int, list[int]]]:
        """(packet to begin with, key frame from which it counts, frames to take by number) of each run of packets.

        A frame needs what follows the last key frame that comes on screen, and in the file, no later than it does.
        Some H.264 decoders need what came before, too, to know what a key frame in the middle of the film refers to no
        more: `back` is how many key frames earlier a run begins.
        """
        if self._ticks is None:
            return []
        places = {pts: place for place, (pts, _) in enumerate(self._own)}
        keys = [(i, pts) for i, (pts, key) in enumerate(self._own) if key and pts is not None and i >= self._first]
        runs: list[tuple[int, int, list[int]]] = []
        end = -1
        for number, tick in zip(wanted.tolist(), self._ticks[wanted].tolist(), strict=True):
            fit = [i for i, pts in keys if i <= places[tick] and pts <= tick][-1 - back :]
            if not fit:
                return []
            begin, key = fit[0], fit[-1]
            if runs and begin - end <= GAP:
                runs[-1][2].append(number)
            else:
                runs.append((begin, key, [number]))
            end = places[tick]
        return runs

    def _in_runs(self, runs: list[tuple[int, int, list[int]]]) -> dict[int, NDArray[np.uint8]] | None:
        """The pictures of several runs of packets, with what lies between them read but not decoded.

        None in any doubt: where a run shows other pictures, or at other times, than its packets announce, or one that
        cannot be decoded, only the whole film says what is on screen when.
        """
        if len(runs) < 2 or self._ticks is None:
            return None
        pictures: dict[int, NDArray[np.uint8]] = {}
        with self._reports() as log, self._opened() as (container, stream):
            packets = self._coded(container, stream)
            for run, (begin, key, asked) in enumerate(runs):
                since = self._own[key][0] or 0
                at = int(np.searchsorted(self._ticks, since))
                limit = runs[run + 1][0] if run + 1 < len(runs) else len(self._own) + 1
                for number, packet in packets:
                    if number < begin:
                        continue
                    if number >= limit or (number == key and packet.pts != since):
                        return None
                    try:
                        frames = self._decoded(packet, number, key, log)
                    except ValueError:  # the whole film is tried, and says what is wrong with it
                        return None
                    for frame in frames:
                        if run and frame.pts is not None and frame.pts < since:
                            continue  # refers to what was skipped
                        if at >= len(self._ticks) or frame.pts != self._ticks[at]:
                            return None
                        if at in asked:
                            pictures[at] = self._upright(frame)
                        at += 1
                    if at > asked[-1]:
                        stream.codec_context.flush_buffers()
                        break
        return pictures if len(pictures) == sum(len(asked) for *_, asked in runs) else None

    def _coded(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """The packets of the stream by their number, and one more that ends it, for a decoder set up to check them."""
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # see _reports
        number = -1
        for packet in self._packets(container, stream):
            if packet.size or packet.dts is None:
                number += 1
                yield number, packet

    def _decoded(self, packet: Any, number: int, key: int, log: list[Any]) -> list[Any]:
        """The frames that a packet completes, in the order of display; they count from the one of the packet `key`."""
        if packet.is_corrupt and not self._joints:
            raise self.damaged(f"packet {number} of its video is incomplete")
        # Of pictures before the key frame some refer to what is not there.
        since = self._own[key][0]
        leads = number != key and None not in (packet.pts, since) and (number < key or packet.pts < since)
        log.clear()
        try:
            frames = packet.decode()
        except self.av.error.FFmpegError as error:
            if leads:
                return []
            raise self.damaged(f"packet {number} of its video cannot be decoded ({error.strerror})") from error
        decoder = packet.stream.codec_context.name
        told = [text.strip() for _, name, text in log if name == decoder and not ASIDE.search(text)]
        if told and not leads:
            raise self.damaged(f"of packet {number} of its video FFmpeg reports {told[0]!r}")
        whole = []
        for frame in frames:
            if self._joints or not frame.is_corrupt:
                whole.append(frame)
            elif since is None or frame.pts is None or frame.pts >= since:
                raise self.damaged(f"the frame at {frame.time} seconds is incomplete")
        return whole

    def _starts(self, times: list[int | None], base: float, codec: str) -> NDArray[np.float64]:
        """Seconds at which the frames come on screen, the first at 0."""
        if self._slots is not None and len(self._slots) == len(times):
            return (self._slots - self._slots[0]) * base
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
        seconds = (starts - starts[0]) * base
        jump = self._jump(starts)
        if jump is not None:
            raise ValueError(
                f"{self.name} is put together from several: the time of its frames jumps from {seconds[jump]:.2f} to "
                f"{seconds[jump + 1]:.2f} seconds; write it anew with {self.remedy()}"
            )
        return seconds

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
