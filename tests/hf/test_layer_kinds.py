"""Stages inside LLMs whose layers are not all alike: linear attention works, sliding windows are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import families
import pytest
import reference
import torch
import transformers

import vtprune
from vtprune import Stage
from vtprune.methods.in_llm.withdraw import Withdraw

HYBRID = "qwen3_5"  # linear, full, linear, full
ROWS = (2, 0, 1)
STEPS = 4
TOLERANCE = 1e-5
UNIFORM, FASTV = vtprune.create("uniform"), vtprune.create("fastv")
STAGES = {
    **{f"uniform at {k}": [Stage(k, UNIFORM, keep=0.4)] for k in range(4)},
    "fastv at 2": [Stage(2, FASTV, keep=5)],
    "pyramiddrop at 1 and 3": [Stage(k, vtprune.create("pyramiddrop"), keep=0.6 - 0.1 * k) for k in (1, 3)],
    "merged at 2": [Stage(2, vtprune.create("holitom_inner"), keep=0.4)],
    "means at 2": [Stage(2, vtprune.create("average_pool"), keep=0.4)],
    "at every place": [Stage("llm", UNIFORM, keep=0.9), *(Stage(k, UNIFORM, keep=0.8 - 0.2 * k) for k in range(4))],
    "withdrawn at 2": [Stage(2, Withdraw(None))],
}
every_stages = pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)


def compare(model: Any, stages: Sequence[Stage], batch: Any, singles: Sequence[Any]) -> None:
    """Prefill and decode of every row of a batch against the stock layers, walked by hand on the tokens that stay."""
    stages, log = reference.spy(stages)
    with vtprune.patch(model, stages):
        tokens, ours = reference.greedy(model, batch, STEPS)
    assert len(log) == len(stages)
    cuts = reference.cuts_of_row(log, range(len(singles)), [single.units[0] for single in singles])
    for row, single in enumerate(singles):
        full = reference.dense(model, single, tokens[row][:-1].tolist())
        theirs = reference.pruned_logits(model, full, cuts[row])[-STEPS:]
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=TOLERANCE)


@every_stages
def test_linear_attention_in_a_padded_batch(stages: list[Stage]) -> None:
    singles = [families.inputs(HYBRID, rows=ROWS, only=row) for row in range(len(ROWS))]
    compare(families.model(HYBRID), stages, families.inputs(HYBRID, rows=ROWS), singles)


@every_stages
def test_linear_attention_where_only_the_cut_makes_padding(stages: list[Stage]) -> None:
    """Rows of one length come without a mask; once they keep different counts, padding must not enter the state."""
    image = families.turn(HYBRID, 1, seed=3)
    length = sum(len(piece.ids) for piece in image)
    rows = [[families.Piece([families.BOS]), families.text(8, length - 1)], image]
    batch, singles = families.build(HYBRID, rows), [families.build(HYBRID, [row]) for row in rows]
    assert batch["attention_mask"].all()
    compare(families.model(HYBRID), stages, batch, singles)


def test_linear_attention_with_beams_and_a_static_cache() -> None:
    model, batch = families.model(HYBRID), families.inputs(HYBRID, rows=ROWS)
    with vtprune.patch(model, Stage(2, FASTV, keep=0.4)):
        tokens, dynamic = reference.greedy(model, batch, STEPS)
        same, static = reference.greedy(model, batch, STEPS, cache_implementation="static")
        assert torch.equal(tokens, same)
        torch.testing.assert_close(static, dynamic, rtol=0, atol=TOLERANCE)
    with vtprune.patch(model, Stage(2, UNIFORM, keep=0.4)):
        options = {"num_beams": 3, "max_new_tokens": STEPS, "do_sample": False}
        assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_a_layer_without_attention_rows_is_not_read() -> None:
    model = families.model(HYBRID)
    for layer, method, read, ways in (
        (1, "fastv", 0, r"a layer of \[2\]"),
        (3, "transprune", 2, "another method"),  # it reads two layers side by side
        (2, "pyramiddrop", 2, r"a layer of \[1, 3\]"),
        (2, "spatten", 0, "another method"),  # all layers so far
    ):
        message = f"reads layer {read} of qwen3_5, whose kind is linear_attention.*use {ways}"
        with reference.untouched(model), pytest.raises(vtprune.UnsupportedModel, match=message):
            vtprune.patch(model, Stage(layer, vtprune.create(method), keep=0.5))


@pytest.mark.parametrize("method", ["dycoke_kv", "lazyllm"])
def test_nothing_is_stored_to_choose_from_at_decode(method: str) -> None:
    model = families.model(HYBRID)
    with reference.untouched(model), pytest.raises(vtprune.UnsupportedModel, match="linear_attention, which store"):
        vtprune.patch(model, Stage(2, vtprune.create(method), keep=0.5))


@pytest.mark.parametrize("where", ["llm", 2])
def test_padding_between_two_turns_would_enter_the_state(where: Any) -> None:
    """Rows that keep different counts behind a cache: refused; the same rows one by one work."""
    model = families.model(HYBRID)
    first = [families.turn(HYBRID, 0, seed=seed) for seed in (2, 4)]
    images = [families.turn(HYBRID, 1, seed=seed, first=False) for seed in (3, 4)]
    both = families.build(HYBRID, [[*a, *b] for a, b in zip(first, images)])
    start, new = families.build(HYBRID, first), families.build(HYBRID, images)
    length = start["input_ids"].shape[1]
    mask = torch.cat([start["attention_mask"], new["attention_mask"]], 1)
    with vtprune.patch(model, Stage(where, UNIFORM, keep=0.4)), torch.no_grad():
        cache = model(**start, use_cache=True).past_key_values
        new.update(attention_mask=mask)
        positions = torch.arange(length, length + new["input_ids"].shape[1]).expand(3, 2, -1)
        with pytest.raises(vtprune.UnsupportedCall, match=r"different numbers of tokens.*one by one"):
            model(**new, past_key_values=cache, position_ids=positions)
        model(**both)


@pytest.mark.parametrize("family", ["gemma3", "gemma3-window"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_sliding_layers_are_refused(family: str, layer: int) -> None:
    model = families.model(family)
    with (
        reference.untouched(model),
        pytest.raises(vtprune.UnsupportedModel, match=r"gemma3.*sliding_attention.*before"),
    ):
        vtprune.patch(model, Stage(layer, UNIFORM, keep=0.5))


def test_a_window_without_named_kinds_is_refused() -> None:
    """Mistral's config says nothing of its layers but the window that all of them have."""
    config = families.FAMILIES["mistral3"].config()
    config.text_config.sliding_window = 16
    model = transformers.Mistral3ForConditionalGeneration._from_config(config)
    with reference.untouched(model), pytest.raises(vtprune.UnsupportedModel, match=r"mistral3.*sliding_attention"):
        vtprune.patch(model, Stage(2, FASTV, keep=0.5))
    with vtprune.patch(model, Stage("llm", UNIFORM, keep=0.5)), torch.no_grad():
        model(**families.inputs("mistral3"))
