"""The answers in a folder of results, put together: for every task its ways of pruning, each with all its draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.accuracy.marking import words
from vtprune.evals.report import share
from vtprune.evals.tasks.cells import DENSE
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.metrics import METRICS

AGREEMENT = "agreement"  # the metric of questions without labels: is the answer that of the dense model?
Array = NDArray[np.float64]
T = TypeVar("T")


@lru_cache(maxsize=2**16)
def _words(answer: str) -> list[str]:
    return words(answer)  # a grid asks this of the same short answers thousands of times


@dataclass(frozen=True)
class Group:
    """One way of pruning and its answers: a finished cell, or those of a random method that differ in the seed alone.

    key: the same in every task; a cell without a seed has its own, so that two recipes of one name stay two. draws: for
    every cell a line for each sample, in the order of the task's samples. ends: how every cell ended.
    """

    label: str
    keep: float | int | None
    key: str
    draws: list[list[Line]] = field(default_factory=list)
    ends: list[Line] = field(default_factory=list)

    @property
    def title(self) -> str:
        """'divprune at 25 %', for people."""
        return title(self.label, self.keep)

    def mean(self, name: str) -> Array | None:
        """[n, k]: a list of numbers of every line, averaged over the draws; None where a line does not have it."""
        values = [[line.get(name) for line in draw] for draw in self.draws]
        if any(value is None for draw in values for value in draw):
            return None
        return np.array(values, dtype=np.float64).mean(0)

    def agreement(self, dense: Group) -> Array:
        """[n]: the share of draws whose answer is that of the dense model, word by word."""
        said = [_words(line["answer"]) for line in dense.draws[0]]
        same = [[_words(line["answer"]) == other for line, other in zip(draw, said)] for draw in self.draws]
        return np.array(same, dtype=np.float64).mean(0)


@dataclass(frozen=True)
class Asked:
    """One task: its finished ways of pruning, and sentences on what is not finished."""

    name: str
    metric: str
    groups: list[Group]
    notes: list[str]

    @property
    def dense(self) -> Group | None:
        """The unpruned model's answers; None where it has not finished."""
        return next((group for group in self.groups if group.label == DENSE.label), None)

    @property
    def n(self) -> int:
        """How many samples the task has, as far as cells are finished."""
        return len(self.groups[0].draws[0]) if self.groups else 0

    def total(self, parts: Array) -> Array:
        """Scores [...] from mean parts [..., k]; a metric of a harness is the mean of its samples' marks."""
        metric = METRICS.get(self.metric)
        return parts[..., 0] if metric is None else metric.total(parts)

    @cached_property
    def parts(self) -> Array | None:
        """[ways, n, k]: what scores are made of; None where a cell has a score only for all of its samples at once."""
        if self.metric == AGREEMENT:
            dense = self.dense
            return None if dense is None else np.stack([g.agreement(dense) for g in self.groups])[..., None]
        found = known(group.mean("parts") for group in self.groups)
        return np.stack(found) if found and all(map(self._explained, self.groups)) else None

    def _explained(self, group: Group) -> bool:
        """Whether the score at a cell's end is made of its parts: a harness may add up in a way of its own."""
        for draw, end in zip(group.draws, group.ends):
            made = float(self.total(np.array([line["parts"] for line in draw], dtype=np.float64).mean(0)))
            if end.get("score") is not None and not np.isclose(made, end["score"], rtol=1e-6, atol=1e-9):
                return False
        return True


def gather(folder: ResultFolder) -> list[Asked]:
    """Every task of the run with what is finished of it. Raises ValueError where cells answer different samples."""
    document = folder.document()
    return [_task(folder, task, document["cells"]) for task in document["tasks"]]


def known(values: Iterable[T | None]) -> list[T] | None:
    """The values as a list; None where one of them is missing."""
    found = list(values)
    there = [value for value in found if value is not None]
    return there if len(there) == len(found) else None


def on_all(tasks: Sequence[Asked]) -> list[str]:
    """The keys of the ways of pruning that are finished on every task: only these have a mean that can be compared."""
    keys = [[group.key for group in asked.groups] for asked in tasks]
    return [key for key in keys[0] if all(key in others for others in keys)] if keys else []


def title(label: str, keep: float | int | None) -> str:
    """'divprune at 25 %', for people."""
    return label if keep is None else f"{label} at {share(keep)}"


def _task(folder: ResultFolder, task: dict[str, Any], cells: list[dict[str, Any]]) -> Asked:
    groups: dict[str, Group] = {}
    notes: list[str] = []
    order: list[str] | None = None
    for cell in cells:
        name, end = cell["name"], folder.end_of(task["name"], cell["name"])
        lines = folder.lines_of(task["name"], name)
        if end is None or not lines:
            notes.append(_missing(folder, task, cell, len(lines)))
            continue
        by_id = {line["id"]: line for line in lines}
        order = order or list(by_id)
        if len(by_id) != len(lines) or by_id.keys() != set(order):
            raise ValueError(
                f"{_title(cell)} does not answer the same samples of {task['name']} as the cells before it: delete "
                f"its files {name}.* below {folder.path} and evaluate again"
            )
        key = name if cell.get("seed") is None else _title({**cell, "seed": None})
        group = groups.setdefault(key, Group(cell["label"], cell["keep"], key))
        group.draws.append([by_id[one] for one in order])
        group.ends.append(end)
    return Asked(task["name"], task["metric"], list(groups.values()), notes)


def _title(cell: dict[str, Any]) -> str:
    seed = cell.get("seed")
    return title(cell["label"], cell["keep"]) + ("" if seed is None else f", seed {seed}")


def _missing(folder: ResultFolder, task: dict[str, Any], cell: dict[str, Any], done: int) -> str:
    failure = folder.failure_of(task["name"], cell["name"])
    if failure is not None:
        return f"{_title(cell)} failed on {task['name']} and is in no row: {failure['error']}"
    return f"{_title(cell)} is not finished on {task['name']} ({done} of {task['n']} answers) and is in no row."
