"""Choose among the visual tokens of features that somebody else encoded: what a patched model does before its LLM.

images of a row, side by side -> units of a stage -> one answer of the method each -> what is left of every image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..kernels import full_precision
from .ask import ask
from .framing import clips_seen, clips_told
from .method import Stage
from .signal import Signal
from .units import Alive, Unit, begin, groups, joined_spans, tokens_of
from .visual import Assignment, Visual


@dataclass(frozen=True)
class Selected:
    """What is left of one image or video of n tokens.

    idx: [K] int64, the kept positions in it, ascending. features: [K, D], what stands there: copies, or weighted sums
    where the method merges, in the dtype of the features. order: [K] int64, the kept positions in the order in which
    they were picked, unit by unit; tokens that no method was asked about (kept newlines) come last. None if a method
    has no order, or was asked about none of the tokens. scores: [n] float32 of the last stage that scored
    a token, NaN where none did; None if there are no scores. notes: fallbacks that were used, in words.
    """

    n: int
    idx: Tensor
    features: Tensor
    order: Tensor | None = None
    scores: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Rows:
    """The rows of one call while the stages run. hidden: [L, D] for each row, merged tokens in place.

    picked: for each image the row positions of its units in the order picked, of the last stage that asked about it;
    None stands for a unit without an order. scores: [L] for each row; scored: the images that have some.
    """

    stages: Sequence[Stage]
    units: Sequence[Unit]
    hidden: list[Tensor]
    text: Sequence[Tensor | None]
    alive: list[Alive]
    scores: list[Tensor]
    picked: dict[int, list[Tensor | None]] = field(default_factory=dict)
    scored: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def run_stages(
    features: Sequence[Tensor], units: Sequence[Unit], stages: Sequence[Stage], text: Sequence[Tensor | None]
) -> list[Selected]:
    """Run stages that act before the LLM, one after the other.

    features: [N, D] of each image or video, in order over the rows. units: the same images as `rows_of` lays them out.
    text: [M, D] embeddings of the text of each row, or None.
    Raises ValueError for a stage at another place, and what the methods raise; VtpruneError for a wrong answer.
    """
    for stage in stages:
        _check(stage)
    rows: list[list[Tensor]] = [[] for _ in text]
    for x, unit in zip(features, units):
        rows[unit.row].append(x)
    hidden = [torch.cat(row) for row in rows]
    alive = [begin(unit, i, hidden[unit.row].device) for i, unit in enumerate(units)]
    scores = [torch.full((len(x),), torch.nan, device=x.device) for x in hidden]
    run = _Rows(stages, units, hidden, text, alive, scores)
    for stage in stages:
        _run(run, stage)
    return [_selected(run, i) for i in range(len(units))]


def _check(stage: Stage) -> None:
    name = stage.method.name or type(stage.method).__name__
    if stage.where != "llm":
        raise ValueError(
            f"{name} at {stage.where!r} acts inside a model, and features alone stand before the LLM: leave that stage "
            "to the engine, or say Stage('pre_llm', ...) where the method can do without"
        )
    if "prefill" not in stage.method.phases or stage.method.of != "tokens":
        raise ValueError(
            f"{name} chooses among {stage.method.of} at {' and '.join(stage.method.phases)}, not among tokens before "
            "the LLM: choose a method of seam 'pre_llm', see vtprune.methods()"
        )


def rows_of(
    sizes: Sequence[int],
    spans: Sequence[tuple[Any, ...]],
    video: Sequence[bool],
    signals: Sequence[dict[Signal, Tensor]],
    rows: Sequence[int],
) -> list[Unit]:
    """Images of sizes[i] tokens, laid side by side in their rows."""
    ends: dict[int, int] = {}
    units = []
    for n, parts, moves, own, row in zip(sizes, spans, video, signals, rows):
        start = ends.get(row, 0)
        units.append(Unit(row, "video" if moves else "image", [(start, n)], parts, own))
        ends[row] = start + n
    return units


def _run(run: _Rows, stage: Stage) -> None:
    """Ask the method of a stage about every unit of which something goes."""
    run.alive, units = groups(run.alive, stage, _clips(run, stage))
    budgets = _budgets(stage, units, len(run.text))
    todo = [i for i, group in enumerate(units) if (k := budgets[i]) is None or k < sum(a.m for a in group)]
    state: dict[str, Any] = {}
    views = [_visual(run, stage, units[i], budgets[i], state) for i in todo]
    with full_precision(run.hidden[0].device):
        answers = ask(stage, views) if views else []
    asked = {a.image for i in todo for a in units[i]}
    for image in asked:
        run.picked[image] = []
    for i, view, answer in zip(todo, views, answers):
        _take(run, units[i], view, answer)
        note = view.state.get("note")
        if note and note not in run.notes:
            run.notes.append(note)
    if stage.newlines == "drop":
        for a in run.alive:
            if a.separator and a.image in asked:
                a.keep(a.positions[:0])


def _clips(run: _Rows, stage: Stage) -> list[int] | None:
    """The clip of every image, for a stage that sees samples: as counted, or neighbours of one size."""
    if stage.per != "sample":
        return None
    if stage.clips:
        return clips_told(run.units, len(run.text), stage.clips)
    if any(s.per == "sample" and s.method.video for s in run.stages):
        return clips_seen(run.units, [()] * len(run.text))  # no words stand between
    return None


def _budgets(stage: Stage, units: list[list[Alive]], rows: int) -> list[int | None]:
    budgets: list[int | None] = [None] * len(units)
    for row in range(rows):
        mine = [i for i, group in enumerate(units) if group[0].row == row]
        dealt = stage.budgets([sum(a.n for a in units[i]) for i in mine]) if mine else []
        for i, budget in zip(mine, dealt):
            budgets[i] = budget
    return budgets


def _visual(run: _Rows, stage: Stage, group: list[Alive], budget: int | None, state: dict[str, Any]) -> Visual:
    row, one = group[0].row, group[0] if len(group) == 1 else None
    positions, order = tokens_of(group)
    signals = {}
    for need in stage.method.needs:
        if all(need in a.unit.signals for a in group):
            joined = torch.cat([a.unit.signals[need].index_select(0, a.origin) for a in group])
            signals[need] = joined if order is None else joined.index_select(0, order)
    return Visual(
        x=run.hidden[row].index_select(0, positions),
        budget=budget,
        grid=one.grid if one else None,
        spans=one.spans if one else joined_spans(group),
        video=stage.per == "sample" or group[0].unit.modality == "video",
        signals=signals,
        text=run.text[row],
        state=state,
    )


def _take(run: _Rows, group: list[Alive], view: Visual, answer: Assignment) -> None:
    """Write down an answer: merged tokens, what is left of each member, the order and the scores."""
    row, (positions, order) = group[0].row, tokens_of(group)
    images = {a.image for a in group}
    if answer.merges:
        places = positions.index_select(0, answer.idx)
        run.hidden[row] = run.hidden[row].index_put((places,), answer.apply(view.x))
    for image in images:
        run.picked[image].append(None if answer.order is None else positions.index_select(0, answer.order))
    if answer.scores is not None:
        run.scores[row] = run.scores[row].index_copy(0, positions, answer.scores.float())
        run.scored |= images
    chosen = answer.idx if order is None else order.index_select(0, answer.idx).sort().values
    for a, start in zip(group, list(accumulate((a.m for a in group), initial=0))):
        a.keep(chosen[(chosen >= start) & (chosen < start + a.m)] - start)


def _selected(run: _Rows, image: int) -> Selected:
    unit = run.units[image]
    start, n = unit.ranges[0]
    hidden, members = run.hidden[unit.row], [a for a in run.alive if a.image == image]
    idx = torch.cat([a.origin for a in members]).sort().values
    scores = run.scores[unit.row][start : start + n] if image in run.scored else None
    return Selected(
        n=n,
        idx=idx,
        features=hidden.index_select(0, idx + start),
        order=_order(run.picked.get(image, []), idx, start, n),
        scores=scores,
        notes=tuple(run.notes),
    )


def _order(picked: list[Tensor | None], idx: Tensor, start: int, n: int) -> Tensor | None:
    """The kept positions idx of an image in the order in which its units were picked."""
    units = [some for some in picked if some is not None]
    if not units or len(units) < len(picked):
        return None
    order = torch.cat(units) - start
    order = order[(order >= 0) & (order < n)]  # a unit may hold other images too
    return torch.cat([order, idx[~torch.isin(idx, order)]])
