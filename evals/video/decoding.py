"""The pictures of the frames asked for, decoded with the least work that leaves no doubt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.video.damage import reported
from vtprune.evals.video.source import Source
from vtprune.evals.video.timeline import Timeline

# Packets: the way to the next frame asked for is skipped where it is longer than that to the key frame before it.
GAP = 100


class Run(NamedTuple):
    """Packets decoded in one go: from the one numbered `begin`, counting frames from the key frame of packet `key`."""

    begin: int
    key: int
    frames: list[int]  # the numbers of those to take, in order


class Decoder:
    """Decodes frames of a film by their number."""

    def __init__(self, source: Source, timeline: Timeline) -> None:
        self._source, self._timeline = source, timeline

    def decode(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.float64], dict[int, NDArray[np.uint8]]]:
        """(seconds [n] at which the frames come on screen, the pictures of those wanted by their number)."""
        for back in (0, 1):
            pictures = self._in_runs(self._runs(wanted, back))
            if pictures is not None and self._timeline.sure is not None:
                return self._timeline.seconds(self._timeline.sure), self._alike(pictures)
        return self._whole(set(wanted.tolist()))

    def _whole(self, asked: set[int]) -> tuple[NDArray[np.float64], dict[int, NDArray[np.uint8]]]:
        """`decode` from start to end, which takes the times from the frames."""
        times: list[int | None] = []
        pictures: dict[int, NDArray[np.uint8]] = {}
        with self._source.reports() as log, self._source.opened() as (container, stream):
            codec = self._source.codec(stream)
            for number, packet in self._coded(container, stream):
                if number < self._timeline.first:
                    continue
                for frame in self._decoded(packet, number, self._timeline.first, log):
                    again = bool(times) and frame.pts is not None and frame.pts == times[-1]  # the later one covers it
                    if self._timeline.mixes_times or not again:
                        times.append(frame.pts)
                    if len(times) - 1 in asked:
                        pictures[len(times) - 1] = self._upright(frame)
        if not times:
            raise ValueError(
                f"{self._source.name} holds video of the codec {codec}, of which FFmpeg can decode no frame here: copy "
                f"or download it again, or convert it where it plays: {self._source.remedy()}"
            )
        return self._timeline.of_frames(times, self._source, codec), self._alike(pictures)

    def _alike(self, pictures: dict[int, NDArray[np.uint8]]) -> dict[int, NDArray[np.uint8]]:
        """The pictures, if they are of one size."""
        if len({picture.shape for picture in pictures.values()}) > 1:
            sizes = sorted({f"{picture.shape[1]} x {picture.shape[0]}" for picture in pictures.values()})
            raise ValueError(
                f"{self._source.name} changes its size ({', '.join(sizes)}): bring it to one with "
                f"{self._source.remedy()}"
            )
        return pictures

    def _runs(self, wanted: NDArray[np.int64], back: int) -> list[Run]:
        """Which packets to decode for the frames `wanted`; [] where that is not certain.

        A frame needs what follows the last key frame that comes on screen, and in the file, no later than it does.
        Some H.264 decoders need what came before, too, to know what a key frame in the middle of the film refers to no
        more: `back` is how many key frames earlier a run begins.
        """
        timeline = self._timeline
        if timeline.sure is None:
            return []
        places = {packet.shown: place for place, packet in enumerate(timeline.packets)}
        keys = [(i, packet.shown) for i, packet in enumerate(timeline.packets) if packet.is_key and i >= timeline.first]
        runs: list[Run] = []
        end = -1
        for number, tick in zip(wanted.tolist(), timeline.sure[wanted].tolist(), strict=True):
            fit = [i for i, shown in keys if i <= places[tick] and shown is not None and shown <= tick][-1 - back :]
            if not fit:
                return []
            if runs and fit[0] - end <= GAP:
                runs[-1].frames.append(number)
            else:
                runs.append(Run(fit[0], fit[-1], [number]))
            end = places[tick]
        return runs

    def _in_runs(self, runs: list[Run]) -> dict[int, NDArray[np.uint8]] | None:
        """The pictures of several runs of packets, with what lies between them read but not decoded.

        None in any doubt: where a run shows other pictures, or at other times, than its packets announce, or one that
        cannot be decoded, only the whole film says what is on screen when.
        """
        if len(runs) < 2 or self._timeline.sure is None:
            return None
        pictures: dict[int, NDArray[np.uint8]] = {}
        with self._source.reports() as log, self._source.opened() as (container, stream):
            packets = self._coded(container, stream)
            limits = [run.begin for run in runs[1:]] + [len(self._timeline.packets) + 1]
            for i, (run, limit) in enumerate(zip(runs, limits, strict=True)):
                found = self._of_run(run, packets, limit, i > 0, self._timeline.sure, log)
                if found is None:
                    return None
                pictures |= found
                stream.codec_context.flush_buffers()
        return pictures if len(pictures) == sum(len(run.frames) for run in runs) else None

    def _of_run(
        self,
        run: Run,
        packets: Iterator[tuple[int, Any]],
        limit: int,
        in_the_middle: bool,
        sure: NDArray[np.int64],
        log: list[Any],
    ) -> dict[int, NDArray[np.uint8]] | None:
        """The pictures of one run, decoded up to its last frame; `limit` is the packet that it must not reach."""
        pictures: dict[int, NDArray[np.uint8]] = {}
        since = self._timeline.packets[run.key].shown or 0
        at = int(np.searchsorted(sure, since))
        for number, packet in packets:
            if number < run.begin:
                continue
            if number >= limit or (number == run.key and packet.pts != since):
                return None
            try:
                frames = self._decoded(packet, number, run.key, log)
            except ValueError:  # the whole film is tried, and says what is wrong with it
                return None
            for frame in frames:
                if in_the_middle and frame.pts is not None and frame.pts < since:
                    continue  # refers to what was skipped
                if at >= len(sure) or frame.pts != sure[at]:
                    return None
                if at in run.frames:
                    pictures[at] = self._upright(frame)
                at += 1
            if at > run.frames[-1]:
                break
        return pictures

    def _coded(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """The packets of the stream by their number, and one more that ends it, for a decoder set up to check them."""
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # see Source.reports
        number = -1
        for packet in self._source.packets(container, stream):
            if packet.size or packet.dts is None:
                number += 1
                yield number, packet

    def _decoded(self, packet: Any, number: int, key: int, log: list[Any]) -> list[Any]:
        """The frames that a packet completes, in the order of display; they count from the one of the packet `key`."""
        if packet.is_corrupt and not self._timeline.joints:
            raise self._source.damaged(f"packet {number} of its video is incomplete")
        # Of pictures before the key frame some refer to what is not there.
        since = self._timeline.packets[key].shown
        leads = number != key and None not in (packet.pts, since) and (number < key or packet.pts < since)
        log.clear()
        try:
            frames = packet.decode()
        except self._source.av.error.FFmpegError as error:
            if leads:
                return []
            raise self._source.damaged(f"packet {number} of its video cannot be decoded ({error.strerror})") from error
        told = reported(log, packet.stream.codec_context.name)
        if told and not leads:
            raise self._source.damaged(f"of packet {number} of its video FFmpeg reports {told[0]!r}")
        whole = []
        for frame in frames:
            if self._timeline.joints or not frame.is_corrupt:
                whole.append(frame)
            elif since is None or frame.pts is None or frame.pts >= since:
                raise self._source.damaged(f"the frame at {frame.time} seconds is incomplete")
        return whole

    def _upright(self, frame: Any) -> NDArray[np.uint8]:
        """uint8 [height, width, 3], turned and mirrored by multiples of a quarter as the display matrix says."""
        picture = frame.to_ndarray(format="rgb24")
        matrix = frame.side_data.get(self._source.av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if matrix is None:
            return picture
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if max(abs(b), abs(c)) * 100 < min(abs(a), abs(d)):
            right, down = a, d
        elif max(abs(a), abs(d)) * 100 < min(abs(b), abs(c)):
            picture, right, down = picture.swapaxes(0, 1), c, b
        else:
            raise ValueError(
                f"{self._source.name} is to be shown turned by {frame.rotation} degrees, and read() turns by quarters "
                f"only: turn it with {self._source.remedy()}"
            )
        return np.ascontiguousarray(picture[:: 1 if down > 0 else -1, :: 1 if right > 0 else -1])
