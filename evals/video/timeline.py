"""When the pictures of a film come on screen: what its packets announce, and how far that can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.video.damage import cut_off, lost_packets, reported
from vtprune.evals.video.source import Source


class Packet(NamedTuple):
    """One packet of the film. shown, decoded: ticks of the stream's clock, or None where the file does not say."""

    shown: int | None
    decoded: int | None
    is_key: bool
    is_hidden: bool  # by an edit list


@dataclass
class Stated:
    """What a file tells of its film when it is read to its end and nothing is decoded."""

    packets: list[Packet]
    form: str  # FFmpeg's name of the container format
    codec: str
    decoder: str
    program: int  # the number of the stream in MPEG-TS
    reorders: bool  # whether pictures may be stored in another order than they are shown
    base: float  # seconds of a tick, the unit of its times
    rates: list[float]  # frames per second, if the file states or FFmpeg guesses any
    duration: float  # seconds that the file announces, 0 if it does not
    end: float  # seconds at which the last packet of any stream ends
    reports: list[Any]  # of FFmpeg, from the first key frame on those of the decoder too


def scan(source: Source) -> Timeline:
    """Read all packets; raises if the file ends early or is damaged."""
    stated = _packets_of(source)
    joints = 0
    with source.raw() as file:
        missing = cut_off(file, stated.form)
        if missing is None and stated.form == "mpegts":
            missing, joints = lost_packets(file, stated.program)
    if missing:
        raise source.damaged(missing)
    if stated.reports:
        raise source.damaged(f"FFmpeg reports {stated.reports[0].strip()!r}")
    tolerance = max(3 * stated.end / max(len(stated.packets), 1), 0.02 * stated.duration, 0.1)
    if tolerance < stated.duration - stated.end < 1e8:  # seconds; beyond is what stands for an unknown number
        raise source.damaged(f"it announces {stated.duration:.2f} seconds and ends after {stated.end:.2f}")
    if not stated.packets:
        raise ValueError(
            f"{source.name} holds a video stream ({stated.codec}) without a frame: record or download it again"
        )
    return Timeline(stated, joints)


def _packets_of(source: Source) -> Stated:
    packets: list[Packet] = []
    end, begun = 0.0, 0  # begun: reports until the first key frame, and one
    with source.reports() as log, source.opened() as (container, stream):
        if "mov" in container.format.name:
            log.clear()  # about its header; what is missing of the film shows later
        for packet in source.packets(container):
            last = packet.pts if packet.dts is None else packet.dts if packet.pts is None else packet.pts
            if last is not None:
                end = max(end, float((last + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index and packet.size:
                packets.append(Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
                begun = begun or (len(log) + 1 if packet.is_keyframe else 0)
        decoder, form = stream.codec_context.name, container.format.name
        # What a parser says before the first key frame is about what was cut away.
        parsed = reported(log[begun - 1 :], decoder) if begun else []
        return Stated(
            packets=packets,
            form=form,
            codec=source.codec(stream),
            decoder=decoder,
            program=stream.id,
            reorders=stream.codec_context.has_b_frames,
            base=float(stream.time_base),
            rates=[float(r) for r in (stream.average_rate, stream.guessed_rate) if r],
            duration=(container.duration or 0) / source.av.time_base,
            end=end,
            reports=[text for _, name, text in log if name == form] + parsed,
        )


class Timeline:
    """The times of a film, in ticks of `base` seconds.

    packets: all packets of the film; decoding begins with the one numbered `first`.
    joints: how often one segment of MPEG-TS was joined to another, where FFmpeg thinks that packets are missing.
    sure: int64 [n], the times of all pictures in order, or None where the packets leave a doubt.
    """

    def __init__(self, stated: Stated, joints: int) -> None:
        self.packets, self.base, self.rates, self.joints = stated.packets, stated.base, stated.rates, joints
        self.first = 0
        if "mpeg" in stated.form:  # a broadcast may be cut anywhere; other files begin with a key frame
            self.first = next((i for i, packet in enumerate(self.packets) if packet.is_key), 0)
        own = self.packets[self.first :]
        times = [p.shown for p in own if p.shown is not None and not p.is_hidden]
        key = own[0].shown
        # The first picture on screen that does not come before the key frame which decoding begins with.
        self._begin = min((shown for shown in times if key is not None and shown >= key), default=None)
        self.mixes_times = False  # whether FFmpeg gives some frames the times of others
        self._slots: NDArray[np.int64] | None = None  # of each frame, where only their order is stated
        self._announced = np.unique(np.array(self._times(own, times, stated.form), np.int64))
        self.sure = self._believed(own, stated.reorders)

    def _times(self, own: list[Packet], times: list[int], form: str) -> list[int]:
        """The times of the frames as far as the packets tell."""
        if form == "avi":  # it holds one picture after the other, and what FFmpeg makes of their times can be wrong
            times = [packet.decoded for packet in own if packet.decoded is not None]
            self._slots = np.unique(np.array(times, np.int64))
            return times
        if form == "mpeg" and (slots := _even([packet.decoded for packet in own])) is not None:
            # Where two pictures begin in one packet of this form FFmpeg gives the time of the second to the first.
            self.mixes_times = _even(sorted(times)) is None or len(times) < len(own)
            self._slots = slots if self.mixes_times else None
            return slots.tolist() if self.mixes_times else times
        return times if self._begin is None else [shown for shown in times if shown >= self._begin]

    def _believed(self, own: list[Packet], reorders: bool) -> NDArray[np.int64] | None:
        """`sure`: the times at which the pictures come on screen, in order, if there is no doubt about any of them."""
        told = [packet.shown for packet in own if packet.shown is not None]
        shown = [packet.shown for packet in own if packet.shown is not None and not packet.is_hidden]
        shown = [tick for tick in shown if self._begin is not None and tick >= self._begin]
        ticks = np.unique(np.array(shown, np.int64))
        if not shown or len(told) < len(own) or len(ticks) < len(shown):
            return None
        # In one film the key frames follow each other, and no other picture goes back to before the last but one.
        before = last = latest = min(told) - 1
        for tick, packet in zip(told, own, strict=True):
            if tick < before or (packet.is_key and tick <= latest):
                return None
            if packet.is_key:
                before, last = last, tick
            latest = max(latest, tick)
        if self._jump(ticks) is not None:
            return None
        if self._slots is not None:
            ordered = not reorders or told != sorted(told)
            if not ordered or not np.array_equal(ticks - ticks[0], self._slots - self._slots[0]):
                return None
        return ticks

    def _jump(self, ticks: NDArray[np.int64]) -> int | None:
        """The frame after which joined segments of MPEG-TS, which states a time every 0.7 seconds, jump in time."""
        gaps = np.diff(ticks) * self.base
        return int(np.argmax(gaps)) if self.joints and gaps.max(initial=0) > 1 else None

    def seconds(self, ticks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Times counted from the first one."""
        return (ticks - ticks[0]) * self.base

    @property
    def announced(self) -> NDArray[np.float64]:
        """Seconds [n] at which frames come on screen as the packets announce it."""
        return self.seconds(self._announced) if len(self._announced) else np.zeros(1)

    def of_frames(self, times: list[int | None], source: Source, codec: str) -> NDArray[np.float64]:
        """Seconds at which decoded frames with these times come on screen, the first at 0; raises in any doubt."""
        if self._slots is not None and len(self._slots) == len(times):
            return self.seconds(self._slots)
        if None in times:
            raise ValueError(
                f"{source.name} does not say when its frame {times.index(None)} ({codec}) is shown: write it anew with "
                f"{source.remedy()}"
            )
        starts = np.array(times, np.int64)
        if self._begin is not None and self._slots is None and starts[0] > self._begin:
            raise source.damaged("its first pictures cannot be decoded")
        if (np.diff(starts) <= 0).any():
            at = int(np.argmax(np.diff(starts) <= 0)) + 1
            raise ValueError(
                f"{source.name} is damaged or put together from several: the time of frame {at} ({codec}) is before "
                f"that of the frame it follows; write it anew with {source.remedy()}"
            )
        seconds = self.seconds(starts)
        jump = self._jump(starts)
        if jump is not None:
            raise ValueError(
                f"{source.name} is put together from several: the time of its frames jumps from {seconds[jump]:.2f} to "
                f"{seconds[jump + 1]:.2f} seconds; write it anew with {source.remedy()}"
            )
        return seconds


def _even(ticks: Sequence[int | None]) -> NDArray[np.int64] | None:
    """`ticks` as an array if they are those of a constant rate, which steps of one tick more or less round."""
    if None in ticks or len(ticks) < 2:
        return None
    steps = np.diff(np.array(ticks, np.int64))
    return np.array(ticks, np.int64) if steps.min() > 0 and np.ptp(steps) <= 1 else None
