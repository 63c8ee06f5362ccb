"""The contract every method keeps on every family: the seven invariants, by logits, against an independent oracle.

Methods come from the registry and families from `families.py`: a new one of either kind is tested without an edit.
The default profile runs one method of each kind on all families, and all methods on three; `--matrix whole` all on all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune.signals import kind_of

METHODS = [cls.name for cls in vtprune.methods()]
IN_TOWER = {cls.name for cls in vtprune.methods() if cls.seam == "in_vit"}
# Stages that act at decode: their oracle walks from step to step, in test_decode_stages.py.
AT_DECODE = {cls.name for cls in vtprune.methods() if "decode" in cls.phases}
AT_PREFILL = {cls.name for cls in vtprune.methods() if "prefill" in cls.phases}
ROWS = (2, 0, 1)  # images per row of the ragged, left-padded batch
STEPS = 5  # prefill and four decode steps
TOLERANCE = 1e-5

# Families that refuse stages inside the LLM, with a part of the message. Everything else must work.
NO_LAYERS = {
    "gemma3": "sliding_attention",
    "gemma3-window": "sliding_attention",
}
# Families that add visual features after their first decoder layers, and how many these are.
DEEP = {"qwen3_vl": 2, "qwen3_vl-video": 2}

every_method = pytest.mark.parametrize("method", METHODS)
# Stages inside the tower change the features themselves: their oracle walks the tower, in test_tower_stages.py.
ON_FEATURES = [name for name in METHODS if name not in IN_TOWER and name in AT_PREFILL]
every_method_on_features = pytest.mark.parametrize("method", ON_FEATURES)
every_method_asked_once = pytest.mark.parametrize("method", [name for name in ON_FEATURES if name not in AT_DECODE])
every_family = pytest.mark.parametrize("family", families.NAMES)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
# What a stage does to the model under eager attention is a matter of where it acts, not of the method.
ONE_OF_EACH_KIND = ("divprune", "visionzip", "fastv", "sparsevlm", "lazyllm", "flowcut", "tome")
# A grid of one image; crops and separators; clips, positions of three axes and a tower without CLS.
ONE_OF_EACH_LAYOUT = ("llava", "llava_next", "qwen2_5_vl-video")
pytestmark = pytest.mark.matrix(methods=ONE_OF_EACH_KIND, families=ONE_OF_EACH_LAYOUT)
every_method_and_attention = pytest.mark.parametrize(
    ("method", "attention"), [(m, "sdpa") for m in METHODS] + [(m, "eager") for m in ONE_OF_EACH_KIND]
)


@contextmanager
def pruned(family: str, method: str, keep: float | int, attention: str = "sdpa") -> Iterator[Any]:
    """(model, handle, log of the method's calls) of a tiny patched model.

    Every method looks at whole images here; crops and separators are the business of test_crops.py.
    """
    model = families.model(family, attention)
    stages, log = reference.spy([_by_image(s) for s in vtprune.create(method).stages(keep, families.depth(model))])
    if family in NO_LAYERS and any(isinstance(stage.where, int) for stage in stages):
        with pytest.raises(vtprune.UnsupportedModel, match=NO_LAYERS[family]):
            vtprune.patch(model, stages)
        pytest.skip(f"refused as it should be: {family} has {NO_LAYERS[family]} layers")
    if family == "qwen3_5" and method in AT_DECODE:
        with pytest.raises(vtprune.UnsupportedModel, match="linear_attention, which store none"):
            vtprune.patch(model, stages)
        pytest.skip("refused as it should be: linear attention stores nothing to choose from")
    if _reads_linear(model, stages):
        with pytest.raises(vtprune.UnsupportedModel, match=r"linear_attention.*use a"):
            vtprune.patch(model, stages)
        pytest.skip("refused as it should be: it reads a layer that has no attention rows")
    if method in AT_DECODE & AT_PREFILL and any(stage.where < DEEP.get(family, 0) for stage in stages):
        with pytest.raises(vtprune.UnsupportedModel, match="no longer adds visual features after its first"):
            vtprune.patch(model, stages)
        pytest.skip("refused as it should be: tokens that come back would miss their features")
    if family == "paligemma" and method in AT_DECODE & AT_PREFILL:
        with pytest.raises(vtprune.UnsupportedModel, match="both directions"):
            vtprune.patch(model, stages)
        pytest.skip("refused as it should be: tokens that come back would see later ones")
    if family == "llava_onevision" and method in IN_TOWER and keep != 1.0:
        with vtprune.patch(model, stages), pytest.raises(vtprune.UnsupportedCall, match="resizes"):
            logits(model, families.inputs(family, rows=ROWS))
        pytest.skip("refused as it should be: the features of one of these images are resized after the tower")
    with vtprune.patch(model, stages) as handle:
        yield model, handle, log


def _reads_linear(model: Any, stages: Sequence[vtprune.Stage]) -> bool:
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    inside = [s for s in stages if isinstance(s.where, int)]
    needs = [(s.where, need) for s in inside for need in s.method.needs]
    read = [at + need.layer for at, need in needs if kind_of(need).source not in ("embeddings", "layer")]
    return any(kinds[layer] == "linear_attention" for layer in read if kinds)


def _by_image(stage: vtprune.Stage) -> vtprune.Stage:
    return stage if stage.keep is None else replace(stage, per="image", newlines="compete")


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    return model(**batch).logits


@every_attention
@every_family
def test_oracle_reproduces_the_dense_model(family: str, attention: str) -> None:
    """The oracle itself, with nothing cut: else the tests below compare with something else than the model."""
    model, batch = families.model(family, attention), families.inputs(family, rows=ROWS)
    tokens, ours = reference.greedy(model, batch, STEPS)
    for row in range(len(ROWS)):
        theirs = reference.expected(model, family, ROWS, row, {}, tokens[row])
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=TOLERANCE)


@every_method_and_attention
@every_family
def test_keep_all_changes_no_bit(family: str, method: str, attention: str) -> None:
    batch = families.inputs(family, rows=ROWS)
    before = logits(families.model(family, attention), batch)
    with pruned(family, method, 1.0, attention) as (model, _, _):
        assert torch.equal(logits(model, batch), before)


@every_method_and_attention
@every_family
def test_removal_restores_the_model(family: str, method: str, attention: str) -> None:
    batch = families.inputs(family, rows=(1, 2))
    model = families.model(family, attention)
    before = logits(model, batch)  # also the warm-up after which transformers has its own hooks in place
    with reference.untouched(model), pruned(family, method, 0.5, attention):
        assert torch.equal(logits(model, batch), before) == (method not in AT_PREFILL)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize(("keep", "attention"), [(0.5, "sdpa"), (5, "sdpa"), (0.5, "eager")])
@every_method_asked_once
@every_family
def test_logits_equal_the_oracle(family: str, method: str, keep: float | int, attention: str) -> None:
    """Prefill and decode of a ragged batch against every row walked by hand on the tokens that stay."""
    batch = families.inputs(family, rows=ROWS)
    with pruned(family, method, keep, attention) as (model, handle, log):
        tokens, ours = reference.greedy(model, batch, STEPS)
        kept = [kept_positions(handle, row) for row in range(len(ROWS))]
    compact = reference.renumbers(log)
    cuts = reference.cuts_of_row(log, range(len(ROWS)), alone(family))
    for row in range(len(ROWS)):
        pads = int((batch["attention_mask"][row] == 0).sum())
        length = batch["input_ids"].shape[1] - pads
        assert [p - pads for p in kept[row]] == reference.survivors(cuts[row], length)
        theirs = reference.expected(model, family, ROWS, row, cuts[row], tokens[row], compact=compact)
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=TOLERANCE)


def alone(family: str) -> list[list[list[int]]]:
    """Placeholder positions of every row when it stands alone, without padding."""
    return [families.inputs(family, rows=ROWS, only=row).units[0] for row in range(len(ROWS))]


def kept_positions(handle: Any, row: int) -> list[int]:
    """Columns of the padded prompt that the last prefill kept in this row."""
    index, valid = handle.last.index[row], handle.last.valid
    return (index if valid is None else index[valid[row]]).tolist()


@every_method
@every_family
def test_batch_equals_its_rows_alone(family: str, method: str) -> None:
    """Same tokens stay, and logits differ no more than the dense model's own do between batch and single."""
    batch = families.inputs(family, rows=ROWS)
    singles = [families.inputs(family, rows=ROWS, only=row) for row in range(len(ROWS))]
    model = families.model(family)
    dense = logits(model, batch)
    own = max(float((dense[r, -1] - logits(model, s)[0, -1]).abs().max()) for r, s in enumerate(singles))
    with pruned(family, method, 0.5) as (model, handle, _):
        together = logits(model, batch)
        kept = [kept_positions(handle, row) for row in range(len(ROWS))]
        for row, single in enumerate(singles):
            one = logits(model, single)
            pads = batch["input_ids"].shape[1] - single["input_ids"].shape[1]
            if ROWS[row] and method in AT_PREFILL:  # `last` is about the last call that had images
                assert [p - pads for p in kept[row]] == kept_positions(handle, 0)
            torch.testing.assert_close(together[row, -1], one[0, -1], rtol=0, atol=max(TOLERANCE, 2 * own))


@pytest.mark.parametrize("keep", [0.5, 0.1, 5, 10_000])
@every_method_on_features
@every_family
def test_exactly_the_budget_stays(family: str, method: str, keep: float | int) -> None:
    """Every image (or video) of every row keeps round(keep * N) or min(keep, N) of its N tokens."""
    batch = families.inputs(family, rows=ROWS)
    sizes = [len(unit) for row in batch.units for unit in row]
    with pruned(family, method, keep) as (model, _, log):
        logits(model, batch)
    if keep == 10_000:  # nothing to drop: the method may not even be asked
        log = [call for call in log if call.stage.keep is not None]
    else:
        assert log, "the method was never asked"
    left = list(sizes)
    for call in log:
        if call.stage.keep is None:
            continue
        new = [min(call.stage.budgets([n])[0], m) for n, m in zip(sizes, left)]
        budgets = [b for b, m in zip(new, left) if b < m]  # units that keep all they have are not shown
        left = new
        assert [v.budget for v in call.units] == budgets
        assert [len(a.idx) for a in call.answers] == budgets
        for answer in call.answers:
            assert torch.equal(answer.idx, answer.idx.unique()), "positions must be ascending and distinct"


@every_method_on_features
@every_family
def test_method_sees_the_tokens_of_its_unit(family: str, method: str) -> None:
    """x of a unit is the features of that very image: same direction as what the text model receives there."""
    batch = families.inputs(family, rows=ROWS)
    with pruned(family, method, 0.5) as (model, _, log):
        logits(model, batch)
    features = []
    for row, units in enumerate(alone(family)):
        full = reference.dense(model, families.inputs(family, rows=ROWS, only=row))
        features += [full.hidden[unit] for unit in units]
    for call in log[:1]:
        if call.stage.where != "llm":
            continue
        assert [v.n for v in call.units] == [len(f) for f in features]
        for seen, there in zip(call.units, features, strict=True):
            likeness = torch.cosine_similarity(seen.x, there)
            torch.testing.assert_close(likeness, torch.ones_like(likeness), rtol=0, atol=1e-5)


# PaliGemma reads its whole prompt in both directions: a second turn would change the first one's keys.
CHATS = [name for name in families.NAMES if name != "paligemma"]


@every_method_asked_once
@pytest.mark.parametrize("family", CHATS)
def test_second_turn_equals_one_shot(family: str, method: str) -> None:
    """generate, then generate again with the returned cache and more words: logits of the whole conversation."""
    first, words = _first_turn(family), [families.text(77, 6)]
    with pruned(family, method, 0.5) as (model, _, log):
        ours, row, answer = _chat(model, family, first, words)
    theirs = _oracle(model, family, row, log, answer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def _first_turn(family: str) -> list[families.Piece]:
    return families.turn(family, 1, seed=3, shares_row=False)


def _chat(model: Any, family: str, first: list[families.Piece], second: list[families.Piece]):
    """Two calls of `generate` sharing a cache; (logits [steps, V], pieces of the conversation, second answer)."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 3}
    out = model.generate(**families.build(family, [first]), **options)
    length = sum(len(p.ids) for p in first)
    row = [*first, families.Piece(out.sequences[0, length:].tolist()), *second]
    again = families.build(family, [row])
    text_only = {k: again[k] for k in ("input_ids", "attention_mask")}
    out = model.generate(**text_only, past_key_values=out.past_key_values, **options)
    answer = out.sequences[0, again["input_ids"].shape[1] :]
    return torch.stack(out.logits, 1)[0], row, answer


def _oracle(model: Any, family: str, row: list[families.Piece], log: Sequence[Any], answer: Tensor) -> Tensor:
    batch = families.build(family, [row])
    full = reference.dense(model, batch, answer[:-1].tolist())
    units = batch.units[0]
    first = len(families.build(family, [_first_turn(family)]).units[0])
    cuts = reference.cuts_of_chat(log, [units[:first], units[first:]])
    return reference.pruned_logits(model, full, cuts, compact=reference.renumbers(log))[-len(answer) :]


@every_method_asked_once
@pytest.mark.parametrize("family", CHATS)
def test_second_turn_with_a_second_image(family: str, method: str) -> None:
    """A new image behind a pruned cache is pruned in its turn; compared with one pass over both turns."""
    first = _first_turn(family)
    second = families.turn(family, 1, seed=4, first=False, shares_row=False)
    model = families.model(family)
    ours, row, answer = _two_images(model, family, first, second)
    own = float((ours - _oracle(model, family, row, [], answer)).abs().max())
    assert own < 10 * TOLERANCE, "the stock model itself does not reproduce one shot"
    with pruned(family, method, 0.5) as (model, _, log):
        ours, row, answer = _two_images(model, family, first, second)
    assert len(log) == _rounds(family, method, (first, second))
    theirs = _oracle(model, family, row, log, answer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(TOLERANCE, 2 * own))


def _rounds(family: str, method: str, turns: Sequence[list[families.Piece]]) -> int:
    """How often the stages are asked in all: once a turn, unless a stage keeps all that the one before left."""
    count = 0
    for turn in turns:
        left = [len(unit) for unit in families.build(family, [turn]).units[0]]
        sizes = list(left)
        for stage in vtprune.create(method).stages(0.5, families.depth(families.model(family))):
            budgets = [stage.budgets([n])[0] for n in sizes]
            count += any(b is None or b < n for b, n in zip(budgets, left, strict=True))
            left = [n if b is None else min(b, n) for b, n in zip(budgets, left, strict=True)]
    return count


@torch.no_grad()
def _two_images(model: Any, family: str, first: list[families.Piece], second: list[families.Piece]):
    """Two manual prefills on one cache, then three greedy steps with explicit positions where they are 3-D."""
    both = [*first, *second]
    whole, length = families.build(family, [both]), sum(len(p.ids) for p in first)
    positions = reference.positions(model, whole)
    cache = model(**families.build(family, [first]), use_cache=True).past_key_values
    new = {k: v for k, v in families.build(family, [second]).items() if k not in ("input_ids", "attention_mask")}
    if "token_type_ids" in whole:  # Gemma3 reads them by position, from the start
        new["token_type_ids"] = whole["token_type_ids"]
    ids, tokens, steps = whole["input_ids"][:, length:], [], []
    for step in range(3):
        end = whole["input_ids"].shape[1] + step
        place = {} if positions is None else {"position_ids": positions[..., length:end]}
        mask = torch.ones(1, end, dtype=torch.long)
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **place, **new)
        steps.append(out.logits[0, -1])
        ids, length, new = out.logits[:, -1:].argmax(-1).clamp(min=families.FIRST_TEXT), end, {}
        tokens.append(ids[0, 0])
        if positions is not None:
            positions = torch.cat([positions, positions.amax() + 1 + torch.zeros_like(positions[..., :1])], -1)
    return torch.stack(steps), both, torch.stack(tokens)
