"""`PromptState`: which visual tokens of a batch of prompts are left, and where they stand; `run_stage` prunes it.

A stage runs in four steps: divide what is left into units, deal out the budgets, ask the method, take its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..kernels import DeferredChecks, deferring, full_precision, recording
from ..kernels.clock import Clock, capturing
from ..kernels.dispatch import Backend
from .ask import ask
from .compaction import Compaction
from .method import Stage, Where
from .result import UnitResult, joined_by_row
from .signal import Signal
from .units import TokenGroup, Unit, UnitLayout, groups, layout_of
from .visual import Assignment, Visual

Members = list[TokenGroup]
# (stage, members of a unit, their slots, the order that makes their positions ascend or None) -> what `Visual` carries
ReadSignals = Callable[[Stage, Members, Tensor, "Tensor | None"], dict[Signal, Tensor]]
# (state, stage, what its method sees of each unit) -> its answers
Ask = Callable[["PromptState", Stage, Sequence[Visual]], list[Assignment]]
# A merge in a row: the slots of a unit's tokens when a stage saw them, and the answer.
Merge = tuple[int, Tensor, Assignment]


@dataclass
class PromptState:
    """Rows of tokens while stages run. A position counts tokens as fed, a slot counts those that are left.

        positions   0    1    2    3    4    5          positions 2 and 4 were dropped:
        slots       0    1    -    2    -    3          position 5 stands in slot 3

    units: the images and videos of all rows. groups: what is left of each.
    hidden: [B, n, D] states in the current slots; or a list of [n, D], where rows differ in length.
    keep: [B, L] bool on the device, or a list of [L]: the positions that are left. counts: its row sums, on the host.
    whole: the cut from positions to slots; None while nothing was cut, when a slot is a position.
    merges: what was merged since the last cut. results: one `UnitResult` a unit and stage. notes: fallbacks in words.
    method_state: by the number of a stage, what its method keeps from unit to unit (`Visual.state`). words: states of
    text by row and place, once a stage asked.
    checks: conditions whose results are on their way to the host.
    text: [M, D] embeddings of each row's words (or None), where they are given; else text_positions: [M] int64, where
    they stand.
    """

    units: list[Unit]
    groups: list[TokenGroup]
    hidden: Any
    keep: Any
    counts: list[int]
    text: Sequence[Tensor | None] = ()
    text_positions: Sequence[Tensor] = ()
    whole: Compaction | None = None
    merges: list[Merge] = field(default_factory=list)
    results: list[UnitResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    method_state: dict[int, dict[str, Any]] = field(default_factory=dict)
    clocks: list[Clock] = field(default_factory=list)
    kernels: dict[str, Backend] = field(default_factory=dict)
    checks: list[DeferredChecks] = field(default_factory=list)
    words: dict[tuple[int, Where], Tensor] = field(default_factory=dict)

    def slots(self, row: int, positions: Tensor) -> Tensor:
        """Where tokens of a row stand in the current states: [K] int64 -> [K] int64."""
        return positions if self.whole is None else self.whole.src[row].index_select(0, positions)

    def shrink(self, group: TokenGroup, idx: Tensor) -> None:
        """Cut a group down to its tokens idx [K], ascending."""
        row = group.unit.row
        self.counts[row] += idx.shape[0] - group.positions.shape[0]
        keep = self.keep[row]
        keep.index_fill_(0, group.positions, False)
        group.keep(idx)
        keep.index_fill_(0, group.positions, True)

    def write(self, row: int, slots: Tensor, states: Tensor) -> None:
        """Put states [K, D] in the slots [K] of a row; tensors that others hold are not changed."""
        if isinstance(self.hidden, list):
            self.hidden[row] = self.hidden[row].index_put((slots,), states)
        else:
            self.hidden = self.hidden.index_put((torch.full_like(slots, row), slots), states)

    def cut(self) -> tuple[Compaction, Compaction]:
        """Make `whole` of what is left by now: it, and the cut from the slots before to those of now."""
        before, self.whole = self.whole, Compaction.of(self.keep, self.counts)
        if before is None:
            return self.whole, self.whole
        now = self.keep.gather(1, before.index)
        now = now if before.valid is None else now & before.valid
        return self.whole, Compaction.of(now, self.counts)

    def note(self, text: str | None) -> None:
        """Say something in `Last.notes`, once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def raise_if_failed(self) -> None:
        """Raise what the checks of the stages found; the caller gets no answer that was computed from bad input."""
        while self.checks:
            self.checks.pop(0).raise_if_failed()


def ask_method(state: PromptState, stage: Stage, views: Sequence[Visual]) -> list[Assignment]:
    """What the method answers, checked: at once, or for a trusted method on a GPU when the LLM is under way."""
    device = views[0].x.device
    clock = Clock(device)
    with deferring() as found, recording(state.kernels), full_precision(device):
        answers = ask(stage, views)
    captured = capturing(device)  # a CUDA graph replays what its warm-up run has checked
    state.clocks.append(clock.stop())
    if not captured:
        state.checks.append(DeferredChecks(found))
    if device.type != "cuda" or not stage.trusted:
        state.raise_if_failed()
    return answers


def run_stage(
    state: PromptState,
    number: int,
    stage: Stage,
    clips: Sequence[int] | None,
    signals: ReadSignals,
    ask_all: Ask = ask_method,
) -> list[tuple[Members, UnitResult]]:
    """Ask the method of the stage about every unit of which something goes: those units, and what became of them.

    number: that of the stage among its method's stages, for `Visual.state`. clips: the clip of every image, or None.
    ask_all: what answers for the units; another than the method's own answers where tokens are only counted.
    """
    state.groups, units = groups(state.groups, stage, clips)
    budgets = budgets_of(stage, units, len(state.counts))
    todo = [i for i, unit in enumerate(units) if _shrinks(unit, budgets[i])]
    layouts = [layout_of(units[i]) for i in todo]
    views = [_visual(state, number, stage, units[i], at, budgets[i], signals) for i, at in zip(todo, layouts)]
    answers = ask_all(state, stage, views) if views else []
    first, asked = len(state.results), []
    for i, at, view, answer in zip(todo, layouts, views, answers):
        asked.append((units[i], _take(state, stage, units[i], at, view, answer)))
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


def _visual(
    state: PromptState,
    number: int,
    stage: Stage,
    unit: Members,
    layout: UnitLayout,
    budget: int | None,
    signals: ReadSignals,
) -> Visual:
    """What the method sees of a unit."""
    row, one = unit[0].unit.row, unit[0] if len(unit) == 1 else None
    positions, order, grid, spans = layout
    slots, hidden = state.slots(row, positions), state.hidden[row]
    if one and one.run and state.whole is None:
        start, length = one.run
        x = hidden[start : start + length]
    else:
        x = hidden.index_select(0, slots.to(hidden.device))
    return Visual(
        x=x,
        budget=budget,
        grid=grid,
        spans=spans,
        video=stage.per == "sample" or unit[0].unit.modality == "video",
        signals=signals(stage, unit, slots, order),
        text=_text_of(state, row, stage.where),
        state=state.method_state.setdefault(number, {}),
        before=None if stage.per == "frame" else unit[0].unit.before,  # frames by themselves are compared with none
    )


def _text_of(state: PromptState, row: int, where: Where) -> Tensor | None:
    """States [M, D] of a row's words, as they enter the place `where`."""
    if state.text:
        return state.text[row]
    if (row, where) not in state.words:
        slots = state.slots(row, state.text_positions[row])
        state.words[row, where] = state.hidden[row].index_select(0, slots.to(state.hidden.device))
    return state.words[row, where]


def encoded_signals(stage: Stage, unit: Members, slots: Tensor, order: Tensor | None) -> dict[Signal, Tensor]:
    """The signals that came with the features of the unit's images, as far as all of them have one."""
    found = {}
    for need in stage.needs:
        if all(need in g.unit.signals for g in unit):
            joined = _joined([_left_of(g, g.unit.signals[need]) for g in unit])
            found[need] = joined if order is None else joined.index_select(0, order)
    return found


def _left_of(group: TokenGroup, signal: Tensor) -> Tensor:
    """What is left of an image's signal [n, ...]; it is not copied while that is all of it."""
    signal = signal.to(group.origin.device)
    return signal if group.left == group.unit.n else signal.index_select(0, group.origin)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _take(
    state: PromptState, stage: Stage, unit: Members, layout: UnitLayout, view: Visual, answer: Assignment
) -> UnitResult:
    """Write down an answer: merged states, the result, and what is left of each member."""
    first, positions, order = unit[0], layout.positions, layout.order
    if answer.src is not None:
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
    first, layout = unit[0], layout_of(unit)
    idx = torch.arange(len(layout.positions), device=layout.positions.device)
    state.results.append(
        UnitResult(
            first.unit.row, first.image, first.part, first.unit.modality, stage.method.name,
            stage.where if where is None else where, len(idx), layout.positions, idx, None, None,
            layout.spans, layout.grid, Assignment(idx), layout.positions,
        )
    )  # fmt: skip


def side_by_side(features: Sequence[Tensor], units: Sequence[Unit], rows: int) -> list[Tensor]:
    """Features [N, D] of images and videos, one after the other in their rows: [L, D] each."""
    parts: list[list[Tensor]] = [[] for _ in range(rows)]
    for x, unit in zip(features, units):
        parts[unit.row].append(x)
    return [_joined(row) for row in parts]
