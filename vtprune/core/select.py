"""Choose among the visual tokens of features that somebody else encoded: what a patched model does before its LLM.

images of a row, side by side -> units of a stage -> one answer of the method each -> what is left of every image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .framing import clips_seen, clips_told
from .method import Stage
from .prompt import PromptState, encoded_signals, run_stage, side_by_side
from .result import UnitResult
from .signal import Signal
from .units import TokenGroup, Unit, begin
from .visual import Assignment, Span, Visual


@dataclass(frozen=True)
class Selected:
    """What is left of one image or video of n tokens.

    idx: [K] int64, the kept positions in it, ascending. features: [K, D], what stands there: copies, or weighted sums
    where the method merges, in the dtype of the features. order: [K] int64, the kept positions in the order in which
    they were picked, unit by unit; tokens that no method was asked about (kept newlines) come last. None if a method
    has no order, or was asked about none of the tokens. scores: [n] float32 of the last stage that scored
    a token, NaN where none did; None if there are no scores. notes: fallbacks that were used, in words. start: where
    the n tokens begin in a video that comes in parts (`vtprune.Stream`): idx + start counts in the whole.
    """

    n: int
    idx: Tensor
    features: Tensor
    order: Tensor | None = None
    scores: Tensor | None = None
    notes: tuple[str, ...] = ()
    start: int = 0


def run_stages(
    features: Sequence[Tensor], units: Sequence[Unit], stages: Sequence[Stage], text: Sequence[Tensor | None]
) -> list[Selected]:
    """Run stages that act before the LLM, one after the other.

    features: [N, D] of each image or video, in order over the rows. units: the same images as `rows_of` lays them out.
    text: [M, D] embeddings of the text of each row, or None.
    Raises ValueError for a stage at another place, and what the methods raise; VtpruneError for a wrong answer.
    """
    state = _begin(features, units, stages, text)
    orders: dict[int, list[Tensor | None]] = {}
    scores: dict[int, Tensor] = {}
    for number, stage in enumerate(stages):
        clips = _clips(stage, stages, units, len(text))
        asked = run_stage(state, number, stage, clips, encoded_signals)
        orders |= {group.image: [] for unit, _ in asked for group in unit}
        for unit, result in asked:
            _note(unit, result, orders, scores, len(state.hidden[result.row]))
    state.raise_if_failed()
    return [_selected(state, i, orders.get(i, []), scores) for i in range(len(units))]


def count_stages(units: Sequence[Unit], stages: Sequence[Stage]) -> list[int]:
    """How many tokens `run_stages` leaves of each image, before there are features.

    Units and budgets are those of `run_stages`; in the place of a method's choice, the first tokens of a unit stay.
    Raises ValueError for a stage at another place, and where the count depends on what a method answers.
    """
    with torch.device("cpu"):  # whatever device a model is being built on meanwhile
        state, shared = _walk(units, stages)
    left = [sum(group.left for group in state.groups if group.image == i) for i in range(len(units))]
    for unit in shared:
        images = sorted({group.image for group in unit})
        if len(images) > 1:
            raise ValueError(
                f"{_name(stages[-1])} (per={stages[-1].per!r}) lets images {', '.join(map(str, images))} of row "
                f"{unit[0].row} compete for one budget: they keep {sum(left[i] for i in images)} of "
                f"{sum(units[i].n for i in images)} tokens together, but how many each keeps is known only once it has "
                "seen their features; use per='image'"
            )
    return left


def _walk(units: Sequence[Unit], stages: Sequence[Stage]) -> tuple[PromptState, list[Sequence[TokenGroup]]]:
    """What is left where the first tokens stay; and the units of which a method decides what each member keeps."""
    rows = units[-1].row + 1
    state = _begin([torch.empty(unit.n, 0) for unit in units], units, stages, [None] * rows)
    shared: list[Sequence[TokenGroup]] = []
    for number, stage in enumerate(stages):
        if shared:
            raise ValueError(
                f"{_name(stage)} comes behind a stage that lets parts of an image, or several images, compete for one "
                "budget: what it finds of each is known only once they have competed; count up to that stage"
            )
        clips = _clips(stage, stages, units, rows)
        asked = run_stage(state, number, stage, clips, encoded_signals, _first)
        shared = [unit for unit, _ in asked if len(unit) > 1]
    return state, shared


def _first(state: PromptState, stage: Stage, views: Sequence[Visual]) -> list[Assignment]:
    """Answers that hold as many tokens as those of the method; ValueError where only the method can tell."""
    if not stage.exact:
        raise ValueError(
            f"{_name(stage)} may keep fewer tokens than its budget, so how many it keeps is known only once it has "
            "seen the features"
        )
    kept = []
    for view in views:
        if view.budget is None:
            raise ValueError(
                f"{_name(stage)} without a budget decides how many tokens stay once it has seen the features: pass "
                "keep=... or keep_total=..., a share in (0, 1] or a count >= 1"
            )
        kept.append(Assignment(torch.arange(view.budget, device=view.x.device)))
    return kept


def _begin(
    features: Sequence[Tensor], units: Sequence[Unit], stages: Sequence[Stage], text: Sequence[Tensor | None]
) -> PromptState:
    """All images before anything was cut; ValueError for a stage that does not act before the LLM."""
    for stage in stages:
        _check(stage)
    hidden = side_by_side(features, units, len(text))
    groups = [begin(unit, i, hidden[unit.row].device) for i, unit in enumerate(units)]
    keep = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in hidden]
    return PromptState(list(units), groups, hidden, keep, [len(x) for x in hidden], text)


def _note(
    unit: Sequence[TokenGroup],
    result: UnitResult,
    orders: dict[int, list[Tensor | None]],
    scores: dict[int, Tensor],
    length: int,
) -> None:
    """Keep the order and the scores of one answer, in positions of the row, for the images it was about."""
    assert result.seen is not None
    order = None if result.order is None else result.seen.index_select(0, result.order)
    for image in {group.image for group in unit}:
        orders[image].append(order)
        if result.scores is not None:
            before = scores.get(image)
            row = before if before is not None else torch.full((length,), torch.nan, device=result.seen.device)
            scores[image] = row.index_copy(0, result.seen, result.scores.float())


def _clips(stage: Stage, stages: Sequence[Stage], units: Sequence[Unit], rows: int) -> list[int] | None:
    """The clip of every image, for a stage that sees samples: as counted, or neighbours of one size."""
    if stage.per != "sample":
        return None
    if stage.clips:
        return clips_told(units, rows, stage.clips)
    if any(s.per == "sample" and s.method.video for s in stages):
        return clips_seen(units, [()] * rows)  # no words stand between
    return None


def _check(stage: Stage) -> None:
    name = _name(stage)
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


def _name(stage: Stage) -> str:
    return stage.method.name or type(stage.method).__name__


def rows_of(
    sizes: Sequence[int],
    spans: Sequence[tuple[Span, ...]],
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


def _selected(state: PromptState, image: int, orders: Sequence[Tensor | None], scores: dict[int, Tensor]) -> Selected:
    """What is left of an image."""
    unit = state.units[image]
    start, n = unit.ranges[0]
    idx = torch.cat([group.origin for group in state.groups if group.image == image]).sort().values
    return Selected(
        n=n,
        idx=idx,
        features=state.hidden[unit.row].index_select(0, idx + start),
        order=_order(orders, idx, start, n),
        scores=scores[image][start : start + n] if image in scores else None,
        notes=tuple(state.notes),
    )


def _order(picked: Sequence[Tensor | None], idx: Tensor, start: int, n: int) -> Tensor | None:
    """The kept positions idx of an image in the order in which its units were picked."""
    units = [some for some in picked if some is not None]
    if not units or len(units) < len(picked):
        return None
    order = torch.cat(units) - start
    order = order[(order >= 0) & (order < n)]  # a unit may hold other images too
    return torch.cat([order, idx[~torch.isin(idx, order)]])
