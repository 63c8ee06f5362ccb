"""Frames out of a video file, decoded by decord: only the ones asked for, each at the moment it is on screen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRATEGIES = ("uniform", "fps")


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
        """What a Hugging Face processor takes as `video_metadata`: [metadata] next to videos=[frames]."""
        return {
            "fps": self.rate,
            "total_num_frames": self.total,
            "duration": self.total / self.rate,
            "frames_indices": self.indices.tolist(),
        }


def read(path: str | os.PathLike[str], frames: int = 32, strategy: str = "uniform", *, rate: float = 1.0) -> Video:
    """Decode up to `frames` frames of the first video stream of the file at `path`.

    "uniform" takes the frames on screen at `frames` moments spread evenly over the clip, first and last included;
    "fps" one every 1 / `rate` seconds from the start, spread as by "uniform" if that would be more than `frames`.
    Moments are seconds, so a variable frame rate changes which frames are taken, never when. A clip with fewer frames
    than asked for comes whole. Raises FileNotFoundError, and ValueError with the reason for a file that cannot be
    decoded: empty, no video, truncated. Needs the `video` extra. decord turns a picture as the file says but mirrors
    none: a file that asks for that comes turned instead.
    """
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(map(repr, STRATEGIES))}")
    if not rate > 0:
        raise ValueError(f"rate={rate} frames per second must be above 0")
    file = Path(path)
    reader, starts = _open(file)
    indices = choose(starts, frames, strategy, rate)
    pictures = _decode(reader, indices, file)
    mean = (len(starts) - 1) / (starts[-1] - starts[0]) if len(starts) > 1 else 1.0
    return Video(pictures, starts[indices], indices, len(starts), float(mean))


def choose(starts: NDArray[np.float64], frames: int, strategy: str, rate: float) -> NDArray[np.int64]:
    """Indices [T] of the frames to decode out of `starts` [n], the seconds at which they come on screen."""
    if len(starts) <= frames and strategy == "uniform":
        return np.arange(len(starts))
    moments = np.linspace(starts[0], starts[-1], frames)
    if strategy == "fps":
        regular = np.arange(starts[0], starts[-1] + 1e-3, 1 / rate)
        moments = regular if len(regular) <= frames else moments
    # A millisecond of grace: decord rounds its times to float32, and files to their time base.
    shown = np.searchsorted(starts, moments + 1e-3, side="right") - 1
    return np.unique(shown.clip(0))


def _open(file: Path) -> tuple[Any, NDArray[np.float64]]:
    """(decord reader, start of every frame in seconds [n]) with every defect of the file as an error that names it."""
    try:
        import decord
    except ImportError as error:
        raise ImportError("reading a video file needs decord: pip install 'vtprune[video]'") from error
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such video file")
    if not file.is_file():
        raise ValueError(f"{file} is not a file: name one video file")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes): copy or download it again")
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(file), num_threads=1)
        count = len(reader)
        starts = reader.get_frame_timestamp(list(range(count)))[:, 0].astype(np.float64) if count else np.empty(0)
    except Exception as error:  # decord raises RuntimeError or its own DECORDError
        if "cannot find video stream" in str(error):
            raise ValueError(f"{file} holds no video stream (audio only?): name a file with pictures") from error
        raise ValueError(
            f"{file} cannot be opened as a video: it is not one that decord's FFmpeg knows, or it is truncated"
        ) from error
    if count == 0:
        raise ValueError(f"{file} holds a video stream without a frame: record or download it again")
    # A cut-off Matroska file has an index of unset times.
    if np.abs(starts).max() > 1e9 or (np.diff(starts) < 0).any() or (count > 1 and starts[-1] <= starts[0]):
        raise ValueError(f"{file} is truncated or damaged: its {count} frames have no times that increase")
    return reader, starts


def _decode(reader: Any, indices: NDArray[np.int64], file: Path) -> NDArray[np.uint8]:
    """[T, height, width, 3]; decord seeks to the key frame before each one."""
    pictures: NDArray[np.uint8] | None = None
    for place, index in enumerate(indices.tolist()):
        try:
            picture = reader[index].asnumpy()
        except Exception as error:
            raise ValueError(
                f"{file} is truncated or damaged: frame {index} of {len(reader)} cannot be decoded"
            ) from error
        height, width = picture.shape[:2]
        # decord takes the padding of narrow rows that it has turned by 90 degrees for a fourth channel.
        picture = picture.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
        if pictures is None:
            pictures = np.empty((len(indices), height, width, 3), np.uint8)
        pictures[place] = picture
    assert pictures is not None
    return pictures
