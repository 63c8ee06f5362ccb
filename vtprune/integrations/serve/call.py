"""One request while it is served: how long it may take, who stopped it, and what its prefill kept."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vtprune.integrations.serve.errors import Stopped, timed_out
from vtprune.panels import Kept, kept_units

if TYPE_CHECKING:
    from vtprune.core.result import Last


@dataclass(frozen=True)
class Counts:
    """Tokens of one prompt. prompt: those that the first decoder layer ran on; unpruned: those of the prompt as sent.

    visual, kept: visual tokens as sent, and those left behind all stages, which may also stand inside the LLM.
    """

    prompt: int
    unpruned: int
    visual: int
    kept: int

    @classmethod
    def of(cls, length: int, units: list[Kept], last: Last | None) -> Counts:
        """Of a prompt of `length` tokens, of which `units` are the images and videos; last: None without any."""
        visual, kept = sum(unit.n for unit in units), sum(len(unit.idx) for unit in units)
        return cls(length if last is None else last.lengths[0], length, visual, kept)

    def details(self) -> dict[str, int]:
        """What `usage` tells beside OpenAI's own fields."""
        return {
            "prompt_tokens_unpruned": self.unpruned,
            "visual_tokens": self.visual,
            "visual_tokens_kept": self.kept,
            "visual_tokens_dropped": self.visual - self.kept,
        }


@dataclass
class Call:
    """A request from its arrival to its end. Times are seconds of `time.perf_counter`.

    started: when its generation began, first: when its first token came, which is after its prefill.
    """

    id: str
    seconds: float
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first: float | None = None
    counts: Counts | None = None
    units: list[Kept] = field(default_factory=list)
    ids: Any = None  # int64 [T], the tokens of the answer so far
    _stopped: Stopped | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return 0 if self.ids is None else len(self.ids)

    @property
    def left(self) -> float:
        """Seconds until its time is over, 0 at least."""
        return max(0.0, self.arrived + self.seconds - time.perf_counter())

    def stop(self, why: Stopped) -> None:
        """Let its generation end at the next token, or never begin; the first reason stays."""
        with self._lock:
            self._stopped = self._stopped or why

    @property
    def stopped(self) -> Stopped | None:
        """Why it is to end, None while it may go on."""
        if self._stopped is None and not self.left:
            self.stop(timed_out(self.seconds))
        return self._stopped

    def check(self) -> None:
        """Raise `Stopped` if it is to end."""
        why = self.stopped
        if why is not None:
            raise why

    def begin(self) -> None:
        """Its turn has come."""
        self.check()
        self.started = time.perf_counter()

    def prefilled(self, length: int, last: Last | None) -> None:
        """Its first token is there. last: what its own prefill left, None where nothing was visual."""
        self.first = time.perf_counter()
        self.units = kept_units(last) if last is not None and last.images else []
        self.counts = Counts.of(length, self.units, last)

    def line(self) -> dict[str, Any]:
        """For the log and the page of counters: tokens, and seconds since the arrival."""
        since = {"queued": self.started, "ttft": self.first, "total": time.perf_counter()}
        seconds = {name: round(at - self.arrived, 4) for name, at in since.items() if at is not None}
        counts = {} if self.counts is None else {"prompt_tokens": self.counts.prompt} | self.counts.details()
        return {"id": self.id, **counts, "completion_tokens": self.generated, "seconds": seconds}
