"""Run one stage: divide what is left into its units, deal out the budgets, ask the method, write down the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels import DeferredChecks, deferring, full_precision, recording
from .ask import ask
from .clock import Clock, capturing
from .method import Stage, Where
from .prompt import PromptState
from .result import UnitResult, joined_by_row
from .signal import Signal
from .units import TokenGroup, groups, joined_spans, tokens_of
from .visual import Assignment, Visual

Members = list[TokenGroup]
# (stage, members of a unit, their slots, the order that makes their positions ascend or None) -> what `Visual` carries
ReadSignals = Callable[[Stage, Members, Tensor, "Tensor | None"], dict[Signal, Tensor]]
# (row, where the stage stands) -> embeddings of the row's text [M, D], or None
ReadText = Callable[[int, Where], "Tensor | None"]


def run_stage(
    state: PromptState,
    number: int,
    stage: Stage,
    clips: Sequence[int] | None,
    signals: ReadSignals,
    text: ReadText,
) -> list[tuple[Members, UnitResult]]:
    """Ask the method of the stage about every unit of which something goes: those units, and what became of them.

    number: that of the stage among its method's stages, for `Visual.state`. clips: the clip of every image, or None.
    """
    state.groups, units = groups(state.groups, stage, clips)
    budgets = budgets_of(stage, units, len(state.counts))
    todo = [i for i, unit in enumerate(units) if _shrinks(unit, budgets[i])]
    views = [_visual(state, number, stage, units[i], budgets[i], signals, text) for i in todo]
    answers = ask_method(state, stage, views) if views else []
    first, asked = len(state.results), []
    for i, view, answer in zip(todo, views, answers):
        asked.append((units[i], _take(state, stage, units[i], view, answer)))
        state.note(view.state.get("note"))
    for unit in units if not asked else ():
        take_whole(state, stage, unit)
    if stage.per == "sample":  # a method may have seen the clips of a row one by one
        state.results[first:] = joined_by_row(state.results[first:])
    if stage.newlines == "drop":
        touched = {(g.unit.row, g.image) for unit, _ in asked for g in unit}
        for g in state.groups:
            if g.separator and (g.unit.row, g.image) in touched:
                state.shrink(g, g.positions[:0])
    return asked


def budgets_of(stage: Stage, units: Sequence[Members], rows: int) -> list[int | None]:
    """Budgets of the units of a batch: a total is dealt out row by row."""
    budgets: list[int | None] = [None] * len(units)
    for row in range(rows):
        mine = [i for i, unit in enumerate(units) if unit[0].unit.row == row]
        dealt = stage.budgets([sum(g.total for g in units[i]) for i in mine]) if mine else []
        for i, budget in zip(mine, dealt):
            budgets[i] = budget
    return budgets


def _shrinks(unit: Members, budget: int | None) -> bool:
    """True if a method has something to choose: it decides itself, or has fewer places than there are tokens."""
    return budget is None or budget < sum(g.positions.shape[0] for g in unit)


def ask_method(state: PromptState, stage: Stage, views: Sequence[Visual]) -> list[Assignment]:
    """What the method answers, checked: at once, or for a trusted method on a GPU when the LLM is under way."""
    device = views[0].x.device
    clock = Clock(device)
    with deferring() as checks, recording(state.kernels), full_precision(device):
        answers = ask(stage, views)
    state.clocks.append(clock.stop())
    if not capturing(device):  # a CUDA graph replays what its warm-up run has checked
        state.checks.append(DeferredChecks(checks))
    if device.type != "cuda" or not stage.method.trusted:
        state.raise_if_failed()
    return answers


def _visual(
    state: PromptState,
    number: int,
    stage: Stage,
    unit: Members,
    budget: int | None,
    signals: ReadSignals,
    text: ReadText,
) -> Visual:
    """What the method sees of a unit."""
    row, one = unit[0].unit.row, unit[0] if len(unit) == 1 else None
    positions, order = tokens_of(unit)
    slots, hidden = state.slots(row, positions), state.hidden[row]
    if one and one.run and state.whole is None:
        start, length = one.run
        x = hidden[start : start + length]
    else:
        x = hidden.index_select(0, slots.to(hidden.device))
    return Visual(
        x=x,
        budget=budget,
        grid=one.grid if one else None,
        spans=one.spans if one else joined_spans(unit),
        video=stage.per == "sample" or unit[0].unit.modality == "video",
        signals=signals(stage, unit, slots, order),
        text=text(row, stage.where),
        state=state.method_state.setdefault(number, {}),
    )


def encoded_signals(stage: Stage, unit: Members, slots: Tensor, order: Tensor | None) -> dict[Signal, Tensor]:
    """The signals that came with the features of the unit's images, as far as all of them have one."""
    found = {}
    for need in stage.method.needs:
        if all(need in g.unit.signals for g in unit):
            joined = torch.cat([g.unit.signals[need].to(g.origin.device).index_select(0, g.origin) for g in unit])
            found[need] = joined if order is None else joined.index_select(0, order)
    return found


def _take(state: PromptState, stage: Stage, unit: Members, view: Visual, answer: Assignment) -> UnitResult:
    """Write down an answer: merged states, the result, and what is left of each member."""
    first, (positions, order) = unit[0], tokens_of(unit)
    if answer.merges:
        row = first.unit.row
        with recording(state.kernels):
            merged = answer.apply(view.x)
        slots = state.slots(row, positions).to(view.x.device)
        state.write(row, slots.index_select(0, answer.idx), merged)
        state.merges.append((row, slots, answer))
    result = UnitResult(
        first.unit.row, first.image, first.part, first.unit.modality, stage.method.name, stage.where, view.x.shape[0],
        positions.index_select(0, answer.idx), answer.idx, answer.order, answer.scores, view.spans, view.grid,
        answer, positions,
    )  # fmt: skip
    state.results.append(result)
    if len(unit) == 1:
        state.shrink(first, answer.idx)
        return result
    chosen = answer.idx if order is None else order.index_select(0, answer.idx).sort().values
    for g, start in zip(unit, list(accumulate((g.left for g in unit), initial=0))):
        # How many tokens each member keeps is known to the device alone.
        state.shrink(g, chosen[(chosen >= start) & (chosen < start + g.left)] - start)
    return result


def take_whole(state: PromptState, stage: Stage, unit: Members, where: Where | None = None) -> None:
    """Note a unit that keeps all it has, of which the method is not asked."""
    first, one = unit[0], unit[0] if len(unit) == 1 else None
    positions = tokens_of(unit)[0]
    idx = torch.arange(len(positions), device=positions.device)
    state.results.append(
        UnitResult(
            first.unit.row, first.image, first.part, first.unit.modality, stage.method.name,
            stage.where if where is None else where, len(idx), positions, idx, None, None,
            one.spans if one else joined_spans(unit), one.grid if one else None, Assignment(idx), positions,
        )
    )  # fmt: skip
