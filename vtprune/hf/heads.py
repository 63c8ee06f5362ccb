"""Stages that choose among query heads: what the heads said so far, and which of them speak from a layer on."""

from __future__ import annotations

import torch

from ..core.method import Stage
from ..core.prompt import ask_method
from ..core.visual import Visual
from . import cache as kv
from .plan import layer_of
from .prefill import Prefill


def run_heads(prefill: Prefill, number: int, stage: Stage) -> None:
    """Let the method choose heads in every row with visual tokens; the others are silent from this layer on."""
    layer, said, state = layer_of(stage), prefill.readings.heads, prefill.prompt
    output = next(iter(said.values()))
    count, host = output.shape[1], prefill.token_kind_on_host
    every = torch.arange(count, device=output.device)
    active = list(next(reversed(prefill.active_heads.values()), [every] * len(host)))
    budget = stage.budgets([count])[0]
    rows = [i for i, row in enumerate(host) if (row > 1).any()]
    rows = [i for i in rows if budget is None or budget < len(active[i])]
    if not rows:
        return
    memory, views = state.method_state.setdefault(number, {}), []
    for i in rows:
        signals = {need: said[need.kind][i].index_select(0, active[i]) for need in stage.needs}
        views.append(Visual(output.new_zeros(len(active[i]), 0), budget, signals=signals, state=memory))
    before = prefill.layers.heads[layer]
    if before is None and prefill.cache is not None:  # rows without an image in this turn
        before = getattr(kv.state(prefill.cache, layer), "heads", None)
    heads = torch.ones_like(output, dtype=torch.bool) if before is None else before.to(output.device, copy=True)
    for i, answer in zip(rows, ask_method(state, stage, views)):
        active[i] = active[i].index_select(0, answer.idx)
        heads[i].fill_(False).index_fill_(0, active[i], True)
    prefill.active_heads[layer] = active
    prefill.layers.heads[layer:] = [heads] * (prefill.plan.depth - layer)
