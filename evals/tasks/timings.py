"""Times of an evaluation: medians over samples of every way of pruning, measured in the same run as the scores."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from vtprune.evals.report import Row
from vtprune.evals.tasks.cells import DENSE
from vtprune.evals.tasks.gather import Asked, Group, known, on_all
from vtprune.evals.tasks.scores import MEAN

PHASES = {"ttft_ms": "ttft", "prefill_ms": "prefill", "encode_ms": "encode", "select_ms": "select"}
WARM_UP = 3  # a cell of more samples than this leaves out its first, which pays for what is made only once


def timed(asked: Asked) -> list[Row]:
    """A row for every way of pruning a task, in the order of its groups; null for what was not measured."""
    rows = [{"task": asked.name, "method": g.label, "keep": g.keep, **_medians(g)} for g in asked.groups]
    return _against_dense(rows)


def mean_times(tasks: Sequence[Asked], rows: Sequence[Sequence[Row]]) -> list[Row]:
    """Means over tasks of the medians, for every way of pruning that is finished on all tasks."""
    by = [{g.key: row for g, row in zip(asked.groups, of_task)} for asked, of_task in zip(tasks, rows)]
    return _against_dense([_mean([of_task[key] for of_task in by]) for key in on_all(tasks)])


def _mean(same: Sequence[Row]) -> Row:
    mean: Row = {"task": MEAN, "method": same[0]["method"], "keep": same[0]["keep"]}
    for name in PHASES:
        values = known(row[name] for row in same)
        mean[name] = None if values is None else round(fmean(values), 4)
    peaks = known(row["peak_mib"] for row in same)
    mean["peak_mib"] = None if peaks is None else max(peaks)
    return mean


def _medians(group: Group) -> Row:
    warm = [line for draw in group.draws for line in (draw[1:] if len(draw) > WARM_UP else draw)]
    seconds = [line.get("seconds") or {} for line in warm]
    row: Row = {}
    for name, phase in PHASES.items():
        values = known(one.get(phase) for one in seconds)
        row[name] = None if values is None else round(1e3 * median(values), 4)
    peaks = known(end.get("peak_mib") for end in group.ends)
    row["peak_mib"] = None if peaks is None else max(peaks)
    return row


def _against_dense(rows: Sequence[Row]) -> list[Row]:
    """The rows with the selector's share of the dense prefill, and how many times sooner the first token comes."""
    full: Row = next((row for row in rows if row["method"] == DENSE.label), {})
    return [
        {
            **row,
            "select_share": _ratio(row["select_ms"], full.get("prefill_ms")),
            "speedup": _ratio(full.get("ttft_ms"), row["ttft_ms"]),
        }
        for row in rows
    ]


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else round(above / below, 4)
