"""Time spent on a device, measured without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_clocks: ContextVar[list[Clock] | None] = ContextVar("vtprune_clocks", default=None)


class Clock:
    """Seconds between start and stop, without making the host wait for a GPU."""

    def __init__(self, device: torch.device) -> None:
        timed = device.type == "cuda" and not capturing(device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if timed else None
        self.begin = time.perf_counter()
        if self.events:
            self.events[0].record()

    def stop(self) -> Clock:
        """End the interval."""
        self.end = time.perf_counter()
        if self.events:
            self.events[1].record()
        return self

    def seconds(self) -> float:
        """Its length; on a GPU this waits for the end."""
        if not self.events:
            return self.end - self.begin
        self.events[1].synchronize()
        return float(self.events[0].elapsed_time(self.events[1])) / 1e3


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph records what this thread launches."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def timing(into: list[Clock]) -> Iterator[None]:
    """Collect the clocks of `timed` blocks inside."""
    token = _clocks.set(into)
    try:
        yield
    finally:
        _clocks.reset(token)


@contextmanager
def timed(device: torch.device) -> Iterator[None]:
    """Time the block, if somebody collects."""
    clocks = _clocks.get()
    if clocks is None:
        yield
        return
    clock = Clock(device)
    yield
    clocks.append(clock.stop())
