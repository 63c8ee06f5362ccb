"""Scores of an evaluation: each beside the dense one of the same run and beside random tokens, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtprune.evals.accuracy.plans import CONTROLS
from vtprune.evals.report import Row
from vtprune.evals.tasks.gather import AGREEMENT, Asked, Group, known, on_all
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
    random = {repr(one.group.keep): one for one in rows if one.group.label == RANDOM and _prunes(one.group)}
    sentences = []
    for one in rows:
        other = random.get(repr(one.group.keep))  # 1 is a token, and 1.0 all of them
        if other is None or one is other:
            continue
        mine, theirs = (known([o.ratio if relative else o.draws]) for o in (one, other))
        low, high = (None, None) if mine is None or theirs is None else interval(mine[0] - theirs[0])
        if low is None or high is None:
            continue
        one.row["beats_random"] = low > 0
        if low <= 0 and one.group.label not in CONTROLS:
            name = "relative" if relative else "score"
            where = "the mean over tasks" if relative else one.row["task"]
            sentences.append(_not_beaten(one.group, where, one.row[name] - other.row[name], low, high))
    return sentences


def _prunes(group: Group) -> bool:
    return not (isinstance(group.keep, float) and group.keep == 1)


def _not_beaten(group: Group, where: str, difference: float, low: float, high: float) -> str:
    difference, low, high = (100 * value for value in (difference, low, high))
    at = group.title.removeprefix(group.label)
    return (
        f"`{group.label}`{at} does not beat random tokens beyond noise on {where} "
        f"(difference {difference:.1f} points, 95 % interval {low:.1f} to {high:.1f})."
    )


def means(tasks: Sequence[Asked], rows: Sequence[Sequence[Scored]]) -> list[Scored]:
    """A row for every way of pruning that is finished on all tasks: means over them of what can be averaged."""
    by = [{one.group.key: one for one in of_task} for of_task in rows]
    return [_mean([of_task[key] for of_task in by]) for key in on_all(tasks)]


def _mean(same: Sequence[Scored]) -> Scored:
    rows = [one.row for one in same]
    drawn = known(one.ratio for one in same)
    ratio = None if drawn is None else np.mean(drawn, axis=0)
    low, high = interval(ratio)
    row = {
        **dict.fromkeys(rows[0]),  # scores of different metrics have no mean
        "task": MEAN,
        "method": rows[0]["method"],
        "keep": rows[0]["keep"],
        "seeds": min(row["seeds"] for row in rows),
        "metric": "relative",
        "n": sum(row["n"] for row in rows),
        "relative": _average(row["relative"] for row in rows),
        "low": low,
        "high": high,
        "agreement": _average(row["agreement"] for row in rows),
        "visual_tokens": _tokens(row["visual_tokens"] for row in rows),
        "tower_share": _average(row["tower_share"] for row in rows),
        "flops": _average(row["flops"] for row in rows),
    }
    return Scored(same[0].group, row, None, ratio)


def _average(values: Iterable[float | None]) -> float | None:
    found = known(values)
    return None if found is None else float(np.mean(found))


def _tokens(pairs: Iterable[Sequence[float] | None]) -> list[float] | None:
    found = known(pairs)
    return None if found is None else [float(value) for value in np.mean(found, axis=0)]


def _aggregate(group: Group) -> float | None:
    """The score that a harness gave to a cell, averaged over draws."""
    return _average(end.get("score") for end in group.ends)


def _row(asked: Asked, group: Group, score: float | None) -> Row:
    dense = asked.dense
    tokens, tower = group.mean("visual_tokens"), group.mean("tower_share")
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
        "tower_share": None if tower is None else float(tower.mean()),
        "flops": None if dense is None else _ratio(_flops(group), _flops(dense)),
    }


def _flops(group: Group) -> float | None:
    """FLOPs of a prefill: of the LLM as its layers ran, the mean over samples, and of the vision side on the first."""
    llm, vision = group.mean("llm_flops"), known(end.get("vision_flops") for end in group.ends)
    return None if llm is None or vision is None else float(llm.mean() + np.mean(vision))


def _ratio(mine: float | None, full: float | None) -> float | None:
    return None if mine is None or not full else mine / full


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
