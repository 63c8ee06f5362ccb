"""How the selection alone grows with the clip: `vtprune bench --overhead` for every method before the LLM.

A process of its own measures each, so that one which takes too long or too much is stopped and the others go on.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vtprune
from vtprune.evals.report import Report, Row
from vtprune.evals.speed.meter import one_thread
from vtprune.parsing import parse_method
from vtprune.signals import kind_of
from vtprune.types import VtpruneError

FRAMES = (4, 8, 16, 32, 64, 65, 128, 256)  # 65: one frame more than that whose N x N float32 matrix has 1 GiB
SIDE, D, HEAD = 16, 1024, 64
SECONDS, MEMORY = 60.0, 4 * 2**30
NOTE = (
    "vtprune.select on clips of frames x 256 tokens of 1,024 channels: CPU seconds, and by how many MiB the peak of "
    f"memory grew. A method that takes more than {SECONDS:g} s of CPU time or {MEMORY / 2**30:g} GiB on a clip is "
    "stopped there. ! marks more than 1.5 times the seconds a token of the clip before."
)
CLIFF = 1.5


def growth(
    method: str,
    keep: float | int,
    *,
    frames: Sequence[int] = FRAMES,
    seconds: float = SECONDS,
    progress: bool = True,
) -> list[Row]:
    """A row for each clip, the last one with the reason if the method is stopped there."""
    rows: list[Row] = []
    task = json.dumps([method, keep, list(frames), seconds])
    code = "import sys; from vtprune.evals.speed.growth import _child; _child(sys.argv[1])"
    with (
        subprocess.Popen([sys.executable, "-c", code, task], stdout=subprocess.PIPE, text=True) as child,
        tqdm(total=len(frames), disable=not progress, desc=f"growth: {method}") as bar,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                rows.append(json.loads(line))
                bar.update()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        reason = f"the process of the measurement ended with status {child.returncode}"
        if len(rows) < len(frames) and not (rows and rows[-1]["stopped"]):
            t = frames[len(rows)]
            rows.append({"method": method, "keep": keep, "frames": t, "n": t * SIDE**2, "stopped": reason})
    return rows


class GrowthReport(Report):
    """A line a method, a column a clip."""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        sizes = sorted({row["n"] for row in self.rows})
        found = {(row["method"], row["n"]): _cell(row) for row in self.rows}
        lines = [
            [name, *(found.get((name, n), "–") for n in sizes)] for name in dict.fromkeys(name for name, _ in found)
        ]
        return ["method", *map(str, sizes)], lines


def _cell(row: Row) -> str:
    if row["stopped"]:
        return str(row["stopped"])
    cliff = " !" if (row["per_token"] or 1) > CLIFF else ""
    return f"{row['seconds']:.3f} s {row['peak_growth_bytes'] / 2**20:.0f} MiB{cliff}"


def _child(task: str) -> None:
    """Print a row a line."""
    method, keep, frames, seconds = json.loads(task)
    signal.signal(signal.SIGPROF, _late)
    data = int(_status("VmData")) + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (data, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with one_thread(), torch.inference_mode():
        for row in _rows(method, keep, frames, seconds):
            print(json.dumps(row), flush=True)


class _TooLong(Exception):
    """The seconds of one size are over."""


def _late(*_: Any) -> None:
    raise _TooLong


def _rows(method: str, keep: float | int, frames: Sequence[int], seconds: float) -> Iterator[Row]:
    name, options = parse_method(method)
    rule = vtprune.create(name, **options)
    before: float | None = None
    for t in frames:
        n = t * SIDE**2
        row: Row = {"method": method, "keep": keep, "frames": t, "n": n, "d": D, "limit_seconds": seconds}
        try:
            took, peak = _one(rule, keep, t, seconds)
        except (_TooLong, MemoryError, VtpruneError, ValueError, RuntimeError) as error:
            yield row | {"stopped": _reason(error, seconds)}
            return
        each = took / n
        yield row | {
            "seconds": took,
            "peak_growth_bytes": peak,
            "per_token": None if before is None else each / before,
            "stopped": None,
        }
        before = each


def _one(rule: vtprune.Method, keep: float | int, t: int, seconds: float) -> tuple[float, int]:
    """CPU seconds, the best of up to three within a second, and bytes by which the peak grew in the first."""
    clip = _clip(rule, t)

    def run() -> float:
        start = time.thread_time()  # while a timer of the process runs, its clock goes by ticks
        vtprune.select(method=rule, keep=keep, **clip)
        return time.thread_time() - start

    _release()
    start = _peak(reset=True)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        took = run()
        grown = _peak() - start
        return min([took, *(run() for _ in range(min(2, int(1 / took))))]), grown
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _clip(rule: vtprune.Method, t: int) -> dict[str, Any]:
    """Arguments of `select`: a clip of still scenes with noise, and whatever signals the method reads."""
    g = torch.Generator().manual_seed(0)
    n = t * SIDE**2
    scenes = torch.randn(-(-t // 8), 1, SIDE**2, D, generator=g).expand(-1, 8, -1, -1).flatten(0, 1)[:t]
    x = torch.randn(n, D, generator=g).mul_(0.5).add_(scenes.flatten(0, 1))
    widths = {"[N, C]": (n, D), "[N, d]": (n, HEAD)}
    signals = {need: torch.rand(widths.get(kind_of(need).shape, (n,)), generator=g) for need in rule.needs}
    words = torch.randn(20, D, generator=g)
    return {"features": x, "grid": (t, SIDE, SIDE), "video": True, "signals": signals, "text": words}


def _reason(error: Exception, seconds: float) -> str:
    if isinstance(error, _TooLong):
        return f"more than {seconds:g} s of CPU time"
    if isinstance(error, MemoryError) or "memory" in str(error):
        return f"more than {MEMORY / 2**30:g} GiB"
    return " ".join(str(error).split())


def _release() -> None:
    """Hand memory that was freed back to the system, so that the peak starts from what is in use."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak(reset: bool = False) -> int:
    """Highest resident set since the last reset, in bytes (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(_status("VmHWM"))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
