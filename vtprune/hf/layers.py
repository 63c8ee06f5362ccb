"""A decoder layer of a prompt that is pruned: the stages that stand there, and position ids behind them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UnsupportedCall
from ..core.method import Stage
from ..core.prompt import Members, run_stage
from ..core.signal import Signal
from ..signals import kind_of
from .arguments import note_lengths
from .heads import run_heads
from .prefill import Prefill, clips_of
from .remember import remember, remembered
from .slots import real_slots, text_behind


def run_layer(prefill: Prefill, i: int, hidden: Tensor, ids: Tensor | None, rope: Any = None) -> Tensor:
    """Hidden states [B, n, D] entering layer i, after the stages there.

    ids, rope: position ids and rotary embeddings as the text model was given them.
    """
    here = [s for s in prefill.plan.inside if s.where == i]
    if not here:
        return hidden
    at_decode = [s for s in here if "decode" in s.method.phases]
    selection = remember(prefill, i, hidden, rope, at_decode) if at_decode else None
    hidden = _run_stages(prefill, i, hidden, ids)
    if selection is not None:
        remembered(prefill, i, selection)
    return hidden


def _run_stages(prefill: Prefill, i: int, hidden: Tensor, ids: Tensor | None) -> Tensor:
    state = prefill.prompt
    renumber = any(s.compact for s in prefill.plan.inside if s.where == i)
    before, real = (_ids_at(prefill, i, ids), real_slots(prefill)) if renumber else (None, None)
    state.hidden, state.merges = hidden, []
    count = sum(state.counts)
    for number, stage in enumerate(prefill.plan.stages):
        if stage.where != i or "prefill" not in stage.method.phases:
            continue
        if stage.method.of == "heads":
            run_heads(prefill, number, stage)
        else:
            clips = clips_of(prefill, stage) if stage.per == "sample" else None
            run_stage(state, number, stage, clips, partial(_signals, prefill))
    if sum(state.counts) == count:
        return hidden
    whole, step = state.cut()
    note_lengths(prefill, whole, i)
    prefill.inner = step if prefill.inner is None else prefill.inner.then(step)
    prefill.inner_cuts.append((state.merges, step))
    prefill.readings.rows = {key: step.cut(row, 1) for key, row in prefill.readings.rows.items()}
    offsets = prefill.layers.position_offset
    if real is not None:
        _renumber(prefill, i, ids, before, real)
    elif (offset := offsets[i]) is not None:
        offsets[i:] = [step.cut(offset, 1)] * len(offsets[i:])
    return step.cut(state.hidden, 1)


def _signals(
    prefill: Prefill, stage: Stage, unit: Members, slots: Tensor, order: Tensor | None
) -> dict[Signal, Tensor]:
    """What was read in the layers before, of the tokens of a unit."""
    row, found, readings = unit[0].unit.row, {}, prefill.readings
    for need in stage.needs:
        layer: Any = stage.where + need.layer  # type: ignore[operator]  # both are ints inside the LLM
        words = readings.words.get((need.kind, layer), readings.words.get((need.kind, None)))
        if words is not None:
            found[need] = words[row]
            continue
        rows = readings.rows[need.kind, layer][row].index_select(0, slots)
        if rows.dim() > 1 and kind_of(need).per_word:
            rows = rows[..., : sum(length for _, length in text_behind(prefill, row))]
        found[need] = rows
    return found


def _ids_at(prefill: Prefill, i: int, ids: Tensor | None) -> Tensor | None:
    """Position ids [B or 1, n] of the current slots at layer i, earlier calls left out of account."""
    if ids is None:
        return None
    cut = ids if prefill.inner is None else prefill.inner.cut(ids, -1)
    offset = prefill.layers.position_offset[i]
    return cut if offset is None else cut - offset


def _renumber(prefill: Prefill, i: int, ids: Tensor | None, before: Tensor | None, real: Tensor) -> None:
    """positions="compact": from layer i on ids go up by one from the row's first, which is `before` the cut."""
    if ids is None or before is None:
        raise UnsupportedCall(
            f"{prefill.adapter.model_type} hands its decoder layers no position ids, so they cannot be renumbered "
            "inside the LLM: use positions='keep'"
        )
    last = torch.iinfo(before.dtype).max
    before = before.expand(len(real), -1)
    first = before.masked_fill(~real.to(before.device), last).amin(1, keepdim=True)
    real = real_slots(prefill).to(before.device)
    renumbered = (first + real.cumsum(1) - 1).clamp(min=0)
    assert prefill.inner is not None
    offsets = prefill.layers.position_offset
    offsets[i:] = [prefill.inner.cut(ids, -1) - renumbered] * len(offsets[i:])
