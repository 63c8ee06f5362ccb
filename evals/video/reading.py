"""Frames out of a video file: which ones are taken, and what a processor is told of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.video.decoding import Decoder
from vtprune.evals.video.source import source_of
from vtprune.evals.video.timeline import scan

STRATEGIES = ("uniform", "fps")
# Times in a file are rounded, to a millisecond at worst where its frame rate is constant (Matroska, FLV).
ROUNDING = 1.001e-3


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
    source = source_of(path)
    timeline = scan(source)
    decoder = Decoder(source, timeline)
    wanted = choose(timeline.announced, frames, strategy, rate)
    starts, pictures = decoder.decode(wanted)
    indices = choose(starts, frames, strategy, rate)
    if not set(indices.tolist()) <= pictures.keys():  # the file does not show what its packets announce
        starts, pictures = decoder.decode(indices)
    chosen = [pictures[index] for index in indices.tolist()]
    return Video(np.stack(chosen), starts[indices], indices, len(starts), _rate(starts, timeline.rates))


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
