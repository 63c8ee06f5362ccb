"""Scores of an evaluation: each beside the dense one of the same run and beside random tokens, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.accuracy.plans import CONTROLS
from vtprune.evals.report import Row
from vtprune.evals.tasks.gather import AGREEMENT, Asked, Group, on_all
from vtprune.evals.tasks.resampling import interval, resampled

Array = NDArray[np.float64]
MEAN = "mean"  # the task of the rows that average over tasks
RANDOM = CONTROLS[0]
FEW = 30  # samples below which an interval is a rough guide only


@dataclass
class Scored:
    """A row, and the bootstrap draws [resamples] of its score and of its relative score; None where there are none."""

    group: Group
    row: Row
    draws: Array | None = None
    ratio: Array | None = None


def scored(asked: Asked, rng: np.random.Generator) -> list[Scored]:
    """A row for every way of pruning a task, dense first."""
    parts = asked.parts
    if parts is None:
        draws, exact = [None] * len(asked.groups), [_aggregate(group) for group in asked.groups]
    else:
        draws = list(asked.total(resampled(parts, rng)).T)
        exact = [float(score) for score in asked.total(parts.mean(1))]
    found = [Scored(g, _row(asked, g, score), drawn) for g, score, drawn in zip(asked.groups, exact, draws)]
    dense = next((one for one in found if one.group is asked.dense), None)
    for one in found:
        if dense is not None:
            _compare(one, dense)
        one.row["beats_random"] = None
    return found


def beaten(rows: Sequence[Scored], relative: bool = False) -> list[str]:
    """Fill in `beats_random` of a task's rows; a sentence for every method that does not beat random beyond noise.

    relative: compare relative scores, as the rows "mean" have no others.
    """
    random = {one.group.keep: one for one in rows if one.group.label == RANDOM}
    sentences = []
    for one in rows:
        other = random.get(one.group.keep)
        mine, theirs = ((o.ratio if relative else o.draws) if o is not None else None for o in (one, other))
        if one is other or other is None or mine is None or theirs is None:
            continue
        name = "relative" if relative else "score"
        low, high = interval(mine - theirs)
        if low is None or high is None:
            continue
        one.row["beats_random"] = low > 0
        if low <= 0 and one.group.label not in CONTROLS:
            where = "the mean over tasks" if relative else one.row["task"]
            apart = one.row[name] - other.row[name]
            sentences.append(
                f"`{one.group.label}`{one.group.title.removeprefix(one.group.label)} does not beat random tokens "
                f"beyond noise on {where} (difference {100 * apart:.1f} points, 95 % interval {100 * low:.1f} to "
                f"{100 * high:.1f})."
            )
    return sentences


def means(tasks: Sequence[Asked], rows: Sequence[Sequence[Scored]]) -> list[Scored]:
    """A row for every way of pruning that is finished on all tasks: means over them of what can be averaged."""
    by = [{one.group.key: one for one in of_task} for of_task in rows]
    return [_mean([of_task[key] for of_task in by]) for key in on_all(tasks)]


def _mean(same: Sequence[Scored]) -> Scored:
    rows = [one.row for one in same]
    drawn = [one.ratio for one in same if one.ratio is not None]
    ratio = np.mean(drawn, axis=0) if len(drawn) == len(same) else None
    low, high = interval(ratio)
    row = {
        **dict.fromkeys(rows[0]),  # scores of different metrics have no mean
        "task": MEAN,
        "method": rows[0]["method"],
        "keep": rows[0]["keep"],
        "seeds": min(row["seeds"] for row in rows),
        "metric": "relative",
        "n": sum(row["n"] for row in rows),
        "relative": _average(rows, "relative"),
        "low": low,
        "high": high,
        "agreement": _average(rows, "agreement"),
        "visual_tokens": _tokens([row["visual_tokens"] for row in rows]),
    }
    return Scored(same[0].group, row, None, ratio)


def _average(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if any(value is None for value in values) else float(np.mean(values))


def _tokens(pairs: Sequence[Sequence[float] | None]) -> list[float] | None:
    return None if any(pair is None for pair in pairs) else [float(v) for v in np.mean(pairs, axis=0)]


def _aggregate(group: Group) -> float | None:
    """The score that a harness gave to a cell, averaged over draws."""
    scores = [end.get("score") for end in group.ends]
    return None if any(score is None for score in scores) else float(np.mean(scores))


def _row(asked: Asked, group: Group, score: float | None) -> Row:
    dense = asked.dense
    tokens = group.mean("visual_tokens")
    return {
        "task": asked.name,
        "method": group.label,
        "keep": group.keep,
        "seeds": len(group.draws),
        "metric": asked.metric,
        "n": asked.n,
        "score": score,
        "relative": None,
        "low": None,
        "high": None,
        "delta": None,
        "delta_low": None,
        "delta_high": None,
        "agreement": None if dense is None else float(group.agreement(dense).mean()),
        "visual_tokens": None if tokens is None else [float(value) for value in tokens.mean(0)],
    }


def _compare(one: Scored, dense: Scored) -> None:
    """Relative score and difference, with intervals over the same resamples."""
    score, full = one.row["score"], dense.row["score"]
    if score is None or full is None:
        return
    one.row["delta"] = score - full
    one.row["relative"] = score / full if full else None
    if one.draws is None or dense.draws is None:
        return
    one.row["delta_low"], one.row["delta_high"] = interval(one.draws - dense.draws)
    if full:
        with np.errstate(divide="ignore", invalid="ignore"):
            one.ratio = one.draws / dense.draws  # not finite where a resample has no right answer: no interval then
        one.row["low"], one.row["high"] = interval(one.ratio)


def remarks(asked: Asked, rows: Sequence[Scored]) -> list[str]:
    """What a reader has to know of one task's numbers."""
    told = list(asked.notes)
    if asked.dense is None:
        told.append(f"{asked.name} has no finished dense cell, so nothing is relative to it.")
    elif asked.parts is None and asked.groups:
        told.append(
            f"{asked.name} ({asked.metric}) is scored over all of its samples at once, so its scores have no intervals."
        )
    elif next(one.row["score"] for one in rows if one.group is asked.dense) == 0:
        told.append(f"The dense model scores 0 on {asked.name}, so nothing can be relative to it.")
    if asked.metric == AGREEMENT:
        told.append(f"{asked.name} has no labels: its score is the share of answers equal to those of the dense model.")
    if 0 < asked.n < FEW:
        told.append(f"{asked.name} has {asked.n} samples only: intervals from so few are rough, and often too narrow.")
    return told
