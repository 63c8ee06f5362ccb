"""Find the recipe for one model, one machine and one user's samples: successive halving over methods and budgets.

1. The samples of every task are shuffled and cut in two: one half to search on, one half to judge by.
2. Every way of pruning that the model can take is asked a few samples. A third goes on to three times as many, again
   and again, until the first half is used up: by turns the most promising ones and those that lose least.
3. The finalists are asked the other half. Its scores had no part in the choice of the finalists, and the intervals
   hold for all finalists at once (Bonferroni), so choosing one of them does not flatter it.

A way of pruning is promising if it can meet the targets within its noise, and then by its speed. Times are measured in
the same run, on the same samples as dense, and compared in steps of 5 %; in one step the smaller drop wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import vtprune
from vtprune.evals.accuracy.plans import CONTROLS, plans
from vtprune.evals.tasks.cells import DENSE, Cell
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.gather import same_words
from vtprune.evals.tasks.metrics import METRICS
from vtprune.evals.tasks.resampling import RESAMPLES, resampled
from vtprune.evals.tasks.setup import Subject

KEEPS = (0.5, 0.25, 0.11, 0.05)
FIRST, THIRD, FINALISTS = 12, 3, 6  # samples of the first round, which share goes on, how many are judged
EQUAL = 1.05  # the ratio of one step of time to the next
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """What is wanted. max_drop: share of the dense score that may be lost. ttft: seconds; speedup: of the TTFT.

    With a time to reach, the recipe that loses least is sought among those that reach it; without one the fastest
    among those that lose no more than `max_drop`.
    """

    max_drop: float = 0.01
    ttft: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop={self.max_drop}: use a share of the dense score in [0, 1), such as 0.01 or 1%")
        for name, value in (("ttft", self.ttft), ("speedup", self.speedup)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a positive number")

    @property
    def words(self) -> str:
        """For people: 'a drop of at most 1 %, 2x the speed'."""
        wanted = [f"a drop of at most {100 * self.max_drop:.3g} %"]
        wanted += [] if self.ttft is None else [f"a TTFT of at most {1e3 * self.ttft:.4g} ms"]
        wanted += [] if self.speedup is None else [f"a speed-up of at least {self.speedup:.3g}x"]
        return ", ".join(wanted)


@dataclass
class Trial:
    """One way of pruning and what is known of it so far, on `lines` by task."""

    cell: Cell
    lines: dict[str, list[Line]] = field(default_factory=dict)
    drop: float = 0.0
    noise: float = 0.0  # standard error of the drop
    ttft: float = 0.0  # seconds, the median
    speedup: float = 1.0

    def misses(self, target: Target, noise: float = 0.0) -> float:
        """How far the targets are missed, as a share of each; 0 if they are met with `noise` of the drop forgiven."""
        missed = max(0.0, self.drop - noise * self.noise - target.max_drop)
        if target.ttft is not None:
            missed += max(0.0, self.ttft / target.ttft - 1)
        if target.speedup is not None:
            missed += max(0.0, target.speedup / self.speedup - 1)
        return missed

    def rank(self, target: Target, noise: float = 0.0) -> tuple[Any, ...]:
        """The smaller, the better."""
        step = round(math.log(self.ttft) / math.log(EQUAL)) if self.ttft > 0 else 0
        timed = target.ttft is not None or target.speedup is not None
        by = (self.drop, step) if timed and noise == 0 else (step, self.drop)
        return (self.misses(target, noise), *by, self.cell.name)


class Tuning:
    """One search, in the order in which `subject` holds its samples."""

    def __init__(self, subject: Subject, target: Target, folder: ResultFolder, told: Callable[[str], None]) -> None:
        self.subject, self.target, self.folder, self.told = subject, target, folder, told
        self.tasks = {task["name"]: task["n"] for task in subject.tasks}
        few = {name: n for name, n in self.tasks.items() if n < 2}
        if few:
            raise ValueError(f"{', '.join(few)}: one sample, and half of a task's samples are held back: bring more")
        self.dense = Trial(DENSE)
        self.tried: list[Trial] = []

    def run(self, cells: Sequence[Cell]) -> list[Trial]:
        """The finalists, judged, the best first."""
        trials = self.tried = [Trial(cell) for cell in cells]
        for size in self._rounds():
            self.told(f"{len(trials)} ways of pruning on {sum(size.values())} samples")
            self._ask([self.dense, *trials], size)
            for trial in trials:
                self._measure(trial, 0, size)
            trials = self._best(trials)
        self.told(f"judging {len(trials)} of them on the samples held back")
        self._ask([self.dense, *trials], self.tasks)
        for trial in [*trials, self.dense]:
            self._measure(trial, self._half, self.tasks)
        return sorted(trials, key=lambda trial: trial.rank(self.target))

    def also(self, cell: Cell) -> Trial:
        """One more way of pruning, measured on the samples held back."""
        trial = Trial(cell)
        self._ask([trial], self.tasks)
        self._measure(trial, self._half, self.tasks)
        return trial

    def parts_held_back(self, trial: Trial) -> tuple[list[Array], list[str | None]]:
        """Of the samples held back, by task [2, n, k]: the parts of dense and pruned answers; and their metrics."""
        return self._parts(trial, self._half, self.tasks)

    @property
    def _half(self) -> dict[str, int]:
        return {name: n // 2 for name, n in self.tasks.items()}

    def _rounds(self) -> Iterator[dict[str, int]]:
        """Samples of every task in every round: three times as many each time, up to the first half of them."""
        half = self._half
        size = {name: min(n, max(1, math.ceil(FIRST / len(half)))) for name, n in half.items()}
        while size != half:
            yield size
            size = {name: min(half[name], n * THIRD) for name, n in size.items()}
        yield half

    def _best(self, trials: list[Trial]) -> list[Trial]:
        """The third that goes on: by turns the most promising one and the one that loses least.

        Of many fast ones some lose little by luck; those that lose least stay beside them until both are judged.
        """
        count = max(FINALISTS, math.ceil(len(trials) / THIRD))
        promising = sorted(trials, key=lambda trial: trial.rank(self.target, noise=1.0))
        safest = sorted(trials, key=lambda trial: (trial.drop, trial.rank(self.target)))
        turns = [trial for pair in zip(promising, safest) for trial in pair]
        return list({trial.cell.name: trial for trial in turns}.values())[:count]

    def _ask(self, trials: Sequence[Trial], upto: dict[str, int]) -> None:
        for trial in trials:
            for task, stop in upto.items():
                name = trial.cell.name
                there = self.folder.lines_of(task, name)
                fresh = self.subject.answers(task, trial.cell, len(there), stop) if len(there) < stop else ()
                trial.lines[task] = [*there, *self.folder.append(task, name, fresh, keep=len(there))]

    def _measure(self, trial: Trial, start: dict[str, int] | int, stop: dict[str, int]) -> None:
        """Drop, its noise and times on the samples from `start` to `stop` of every task."""
        drops = resampled_drops(*self._parts(trial, start, stop))
        trial.drop, trial.noise = float(drops[0]), float(drops[1:].std())
        times = [[line["seconds"]["ttft"] for line in _between(one, start, stop)] for one in (trial, self.dense)]
        trial.ttft, dense = (median(part[1:] or part) for part in times)
        trial.speedup = dense / trial.ttft

    def _parts(self, trial: Trial, start: Any, stop: dict[str, int]) -> tuple[list[Array], list[str | None]]:
        """By task [2, n, k]: the parts of every answer, of the dense model and pruned; and the names of the metrics."""
        found, metrics = [], []
        for task in self.subject.tasks:
            name = task["name"]
            begin = start if isinstance(start, int) else start[name]
            pair = [one.lines[name][begin : stop[name]] for one in (self.dense, trial)]
            labelled = all(line["parts"] is not None for lines in pair for line in lines)
            if labelled:
                parts = [[line["parts"] for line in lines] for lines in pair]
            else:  # without labels: is the answer that of the dense model?
                parts = [[[1.0]] * len(pair[0]), [[same_words(*two)] for two in zip(*pair)]]
            found.append(np.array(parts, dtype=np.float64))
            metrics.append(task["metric"] if labelled and task["metric"] in METRICS else None)
        return found, metrics


def _between(trial: Trial, start: dict[str, int] | int, stop: dict[str, int]) -> list[Line]:
    first = {name: start if isinstance(start, int) else start[name] for name in trial.lines}
    return [line for name, lines in trial.lines.items() for line in lines[first[name] : stop[name]]]


def resampled_drops(parts: Sequence[Array], metrics: Sequence[str | None]) -> Array:
    """[1 + RESAMPLES] float64: the share of the dense score that is lost, the mean over tasks, as it is and resampled.

    parts: by task [2, n, k], dense first. The same samples are drawn for both. A task on which the dense model scores
    0 tells nothing and is left out; ValueError where that is all of them.
    """
    rng = np.random.default_rng(0)
    by_task = []
    for values, metric in zip(parts, metrics):
        n = values.shape[1]
        total = METRICS[metric].total if metric is not None else lambda means: means[..., 0]
        means = np.concatenate([values.mean(1)[None], resampled(values, rng, RESAMPLES)])
        dense, pruned = np.moveaxis(np.asarray(total(means)), -1, 0)
        if dense[0] > 0:
            lost = np.where(dense > 0, 1 - pruned / np.where(dense > 0, dense, 1), 0)
            # Resamples of n samples vary less than n new ones would: by (n - 1) / n.
            by_task.append(lost[0] + (lost - lost[0]) * math.sqrt(n / max(1, n - 1)))
    if not by_task:
        raise ValueError("the dense model answers none of these questions right, so no drop can be measured")
    return np.mean(by_task, axis=0)


def candidates(
    subject: Subject, methods: Sequence[str] | None, keeps: Sequence[float | int], video: bool, seed: int = 0
) -> tuple[list[Cell], list[str]]:
    """Every way of pruning that the model can take, found out with one sample each; and why the others were left out.

    methods: None for all of them, rules about frames among them if `video`. `random` is measured beside the finalists
    and never recommended.
    """
    chosen = methods or [cls.name for cls in vtprune.methods() if video or not cls.video]
    cells, left_out = [], []
    task = subject.tasks[0]["name"]
    for plan in plans(chosen, keeps, 1):
        if plan.label == CONTROLS[0]:
            continue
        cell = Cell(plan.label, plan.method, plan.keep, plan.seed, plan.positions)
        try:
            for _ in subject.answers(task, cell, 0, 1):
                pass
            cells.append(cell)
        except (vtprune.VtpruneError, ValueError, torch.OutOfMemoryError) as error:
            left_out.append(f"{cell.title}: {error}")
    if not cells:
        raise ValueError(f"the model can take none of these methods: {left_out[0] if left_out else 'none was named'}")
    return cells, left_out
