"""Stages below the last layer behind which Qwen3-VL adds visual features: they are cut and merged like the states."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import families
import pytest
import reference
import torch
import transformers

import vtprune
from vtprune import Stage

DEEP = 3  # layers that features are added behind: one more than in the conformance suite
ROWS = (2, 0, 1)
STEPS = 4
TOLERANCE = 1e-5
KINDS = pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl-video"])
FASTV, UNIFORM = vtprune.create("fastv"), vtprune.create("uniform")
SELECTING = {
    "at the first layer": [Stage(0, UNIFORM, keep=0.4)],
    "at layer 1": [Stage(1, FASTV, keep=0.4)],
    "at layer 1, ragged": [Stage(1, FASTV, keep=5, per="sample")],
    "at every layer": [Stage(k, FASTV if k else UNIFORM, keep=0.8 - 0.2 * k) for k in range(4)],
    "before the LLM and inside": [Stage("llm", UNIFORM, keep=0.7), Stage(1, FASTV, keep=0.3)],
}
# holitom_inner merges what it drops into what stays; average_pool makes means.
MERGING = {
    "at layer 1": [Stage(1, vtprune.create("holitom_inner"), keep=0.4)],
    "twice": [Stage(k, vtprune.create("holitom_inner"), keep=0.8 - 0.2 * k) for k in (1, 2)],
    "means at layer 1": [Stage(1, vtprune.create("average_pool"), keep=0.4)],
    "means, then merged": [
        Stage("llm", vtprune.create("average_pool"), keep=0.6, per="image"),
        Stage(2, vtprune.create("holitom_inner"), keep=0.2),
    ],
    "merged, then dropped": [Stage(1, vtprune.create("holitom_inner"), keep=0.6), Stage(2, FASTV, keep=0.2)],
}


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Qwen3-VL that adds features of all three tower layers."""
    torch.manual_seed(0)
    config = families.FAMILIES["qwen3_vl"].config()
    config.vision_config.deepstack_visual_indexes = list(range(DEEP))
    made = transformers.Qwen3VLForConditionalGeneration._from_config(config)
    families._spread(made)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = families.PAD
    return made.eval()


def run(model: Any, kind: str, stages: Sequence[Stage]) -> tuple[Any, Any, list[dict[Any, list[reference.Cut]]]]:
    """Tokens and logits of a ragged batch, and the cuts of every row."""
    stages, log = reference.spy(stages)
    with vtprune.patch(model, stages):
        tokens, logits = reference.greedy(model, families.inputs(kind, rows=ROWS), STEPS)
    units = [families.inputs(kind, rows=ROWS, only=row).units[0] for row in range(len(ROWS))]
    assert len(log) == len(stages)
    return tokens, logits, reference.cuts_of_row(log, range(len(ROWS)), units)


@KINDS
@pytest.mark.parametrize("stages", SELECTING.values(), ids=SELECTING)
def test_dropping_equals_masking(model: Any, kind: str, stages: list[Stage]) -> None:
    """The unpatched model, with all features added everywhere, but dropped keys hidden from the stage's layer on."""
    tokens, ours, cuts = run(model, kind, stages)
    for row in range(len(ROWS)):
        single = families.inputs(kind, rows=ROWS, only=row)
        theirs = reference.masked_logits(model, single, cuts[row], tokens[row][:-1].tolist())[-STEPS:]
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=TOLERANCE)


@KINDS
@pytest.mark.parametrize("stages", MERGING.values(), ids=MERGING)
def test_features_are_merged_by_the_weights_of_the_states(model: Any, kind: str, stages: list[Stage]) -> None:
    """Against a walk over the stock layers that gives a merged token the weighted sum of its members' features."""
    tokens, ours, cuts = run(model, kind, stages)
    for row in range(len(ROWS)):
        single = families.inputs(kind, rows=ROWS, only=row)
        full = reference.dense(model, single, tokens[row][:-1].tolist())
        assert len(full.deepstack) == (DEEP if ROWS[row] else 0)
        theirs = reference.pruned_logits(model, full, cuts[row])[-STEPS:]
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=TOLERANCE)


def test_a_merged_token_holds_what_it_would_had_it_merged_later(model: Any) -> None:
    """x' = A x is linear: features added before the merge, or merged and added behind it, make the same state."""
    seen: list[torch.Tensor] = []
    text, batch = model.get_decoder(), families.inputs("qwen3_vl")
    stages, log = reference.spy([Stage(1, vtprune.create("holitom_inner"), keep=0.4)])
    with vtprune.patch(model, stages), torch.no_grad():
        model(**batch)
        step = text._deepstack_process
        text.__dict__["_deepstack_process"] = lambda h, *features: seen.append((h, step(h, *features))) or seen[-1][1]
        model(**batch)
    features = reference.dense(model, batch).deepstack
    (unit,), (answer,) = batch.units[0], log[0].answers
    for (before, after), feature in zip(seen, features):
        added = (after - before)[0]
        wanted = feature[unit] if len(added) == len(feature) else answer.apply(feature[unit])
        torch.testing.assert_close(added[unit[0] : unit[0] + len(wanted)], wanted, rtol=0, atol=1e-5)
        assert float(added[: unit[0]].abs().sum()) == float(added[unit[0] + len(wanted) :].abs().sum()) == 0
    assert [len(after[0]) for _, after in seen] == [len(features[0])] + [len(features[0]) - len(unit) + len(wanted)] * 2


@KINDS
def test_keep_all_changes_no_bit_and_removal_leaves_no_trace(model: Any, kind: str) -> None:
    batch = families.inputs(kind, rows=ROWS)
    with torch.no_grad():
        before = model(**batch).logits
        with reference.untouched(model), vtprune.patch(model, Stage(1, FASTV, keep=1.0)):
            assert torch.equal(model(**batch).logits, before)
            assert "_deepstack_process" in vars(model.get_decoder())
        with reference.untouched(model), vtprune.patch(model, Stage(1, FASTV, keep=0.3)):
            assert not torch.equal(model(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)
        with vtprune.patch(model, Stage(DEEP, FASTV, keep=0.3)):  # behind all features: nothing to wrap
            assert "_deepstack_process" not in vars(model.get_decoder())


def test_a_second_image_behind_a_pruned_cache(model: Any) -> None:
    """Features of a later turn are cut by the later turn's answers."""
    kind, stages = "qwen3_vl", [Stage(1, FASTV, keep=0.4)]
    first = families.turn(kind, 1, seed=3)
    second = families.turn(kind, 1, seed=4, first=False)
    whole, length = families.build(kind, [[*first, *second]]), sum(len(p.ids) for p in first)
    positions: Any = reference.positions(model, whole)
    stages, log = reference.spy(stages)
    with vtprune.patch(model, stages), torch.no_grad():
        cache = model(**families.build(kind, [first]), use_cache=True).past_key_values
        new = families.build(kind, [second])
        new.update(input_ids=whole["input_ids"][:, length:], attention_mask=whole["attention_mask"])
        ours = model(**new, past_key_values=cache, position_ids=positions[..., length:]).logits[0, -1]
    cuts = reference.cuts_of_chat(log, [whole.units[0][:1], whole.units[0][1:]])
    theirs = reference.masked_logits(model, whole, cuts)[-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_copies_and_threads(model: Any) -> None:
    """The step that is wrapped belongs to its own model, and what it cuts to its own thread."""
    batches = [families.inputs("qwen3_vl", rows=(1 + i % 2,), seed=i) for i in range(6)]
    dense = model(**batches[0]).logits
    run = torch.no_grad()(lambda batch: model(**batch).logits)
    with vtprune.patch(model, Stage(1, FASTV, keep=0.4)):
        one_by_one = [run(b) for b in batches]
        with ThreadPoolExecutor(3) as pool:
            assert all(torch.equal(a, b) for a, b in zip(one_by_one, pool.map(run, batches)))
        twin = copy.deepcopy(model)
    assert torch.equal(twin(**batches[0]).logits, one_by_one[0]), "the copy keeps its own patch"
    vtprune.unpatch(twin)
    assert torch.equal(twin(**batches[0]).logits, dense)
    assert "_deepstack_process" not in vars(twin.get_decoder())


def test_gradients_reach_the_features_of_kept_tokens(model: Any) -> None:
    batch = families.inputs("qwen3_vl")
    with vtprune.patch(model, Stage(1, FASTV, keep=0.4)):
        model(**batch).logits[0, -1].logsumexp(0).backward()
    merger = model.model.visual.deepstack_merger_list[-1]
    grads = [float(p.grad.abs().sum()) for p in merger.parameters() if p.grad is not None]
    model.zero_grad()
    assert grads
    assert all(g > 0 for g in grads)


def test_tokens_that_come_back_would_miss_their_features(model: Any) -> None:
    class Back(type(FASTV)):  # type: ignore[misc]
        phases = ("prefill", "decode")

    back = Back()
    with reference.untouched(model), pytest.raises(vtprune.UnsupportedModel, match=r"layer 1.*come back.*use layer 3"):
        vtprune.patch(model, Stage(1, back, keep=0.5))
