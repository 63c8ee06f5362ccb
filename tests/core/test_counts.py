"""How many tokens stay: every method counts as its official code does, at sizes where the ways to round differ."""

from __future__ import annotations

from math import ceil
from typing import Any

import families
import pytest
import torch

import vtprune
from vtprune import Signal, Stage, Visual
from vtprune.methods.in_llm.withdraw import Withdraw
from vtprune.reduction import Reducer
from vtprune.types import budget

# Where the official code cuts a share off to a count; elsewhere it rounds half to even, or states counts itself.
CUT_OFF = {
    "aim_inllm", "dycoke_kv", "globalcom2", "holov", "mmtok", "prumerge", "pyramiddrop", "transprune", "v2drop", "vscan"
}  # fmt: skip
SIZES = (5, 7, 24, 30, 35, 100, 140, 576)
SHARES = (0.05, 0.1, 0.29, 1 / 3, 0.5, 0.57, 1 - 0.8, 0.85, 1.0)


@pytest.mark.parametrize("name", [method.name for method in vtprune.methods()])
def test_a_share_becomes_the_official_count(name: str) -> None:
    count = int if name in CUT_OFF else round
    for n in SIZES:
        for share in SHARES:
            expected = max(1, min(n, count(share * n)))
            assert Stage(2, vtprune.create(name), keep=share).budgets([n]) == [expected]
            assert Stage(2, vtprune.create(name), keep_total=share).budgets([n]) == [expected]
    assert Stage(2, vtprune.create(name), keep=7).budgets([5, 30]) == [5, 7]


def test_the_ways_to_round_differ_at_these_sizes() -> None:
    pairs = [(n, share) for n in SIZES for share in SHARES]
    assert any(int(n * share) != round(n * share) != ceil(n * share) - 1 for n, share in pairs)
    assert int(140 * (1 - 0.8)) == 27
    assert (int(100 * 0.29), int(100 * 0.57)) == (28, 56)
    assert (budget(0.29, 100), budget(0.29, 100, "down"), budget(0.01, 5, "down")) == (29, 28, 1)


@pytest.mark.parametrize("n", [9, 35, 143, 577, 729])
def test_schedules_count_as_published(n: int) -> None:
    """Also where a share is computed: keep=0.125 is the published list to the last bit."""
    counts = {
        "pyramiddrop": [int(n * r) for r in (0.5, 0.25, 0.125)],
        "transprune": [int(n * r) for r in (0.875, 0.625, 0.125)],
    }
    for name, expected in counts.items():
        for keep in (None, 0.125):
            stages = vtprune.create(name).stages(keep, 32)
            assert [stage.budgets([n])[0] for stage in stages] == expected
    eighths = [stage.budgets([n])[0] for stage in vtprune.create("aim_inllm").stages(None, 28)[:-1]]
    assert eighths == [int(n * (1 - step * 0.125)) for step in range(1, 8)]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("name", "options", "keeps"),
    [
        ("pyramiddrop", {"layers": (1, 2, 3), "ratios": (0.9, 0.63, 0.37)}, (0.9, 0.63, 0.37)),
        ("transprune", {"layers": (1, 2, 3), "ratios": (0.9, 0.63, 0.37)}, (0.9, 0.63, 0.37)),
        ("aim_inllm", {"rates": (0.9, 0.63, 0.37, 0.37)}, (0.9, 0.63, 0.37)),
    ],
)
def test_models_keep_that_many(family: str, name: str, options: Any, keeps: Any) -> None:
    model, batch = families.model(family), families.inputs(family)
    sizes = [len(unit) for unit in batch.units[0]]
    per_row = name == "aim_inllm"
    with torch.no_grad(), vtprune.patch(model, name, **options) as handle:
        model(**batch)
    kept = [len(unit.idx) for unit in handle.last.units]
    assert kept == [int(share * n) for share in keeps for n in ([sum(sizes)] if per_row else sizes)]
    assert kept != [round(share * n) for share in keeps for n in ([sum(sizes)] if per_row else sizes)]


def test_reducers_in_a_vision_transformer_follow_their_rounding() -> None:
    class Down(Reducer):
        name, rounding = "down", "down"

        def reduce(self, t: Any, left: int) -> Any:
            raise NotImplementedError

    assert [Down().goal(n, 0.5) for n in (7, 10)] == [3, 5]
    assert vtprune.create("topk_cls").goal(7, 0.5) == 4


# --- lists of the official codes --------------------------------------------------------------------------------------


def transitions(stage: Stage) -> list[int]:
    """How many layers back a stage of TransPrune reads."""
    return sorted(-need.layer for need in stage.method.needs if need.kind == "transition")  # type: ignore[operator]


def test_transprune_sums_over_the_layers_of_its_list() -> None:
    """Counted from 1: layer a is the one that runs just before a stage at a."""
    published = vtprune.create("transprune", layers=(7, 9, 12), accumulating=(7, 8, 9, 10, 11, 12)).stages(None, 32)
    default = vtprune.create("transprune").stages(None, 32)
    assert [transitions(s) for s in published] == [transitions(s) for s in default] == [[1], [1, 2, 3], [*range(1, 7)]]
    early = vtprune.create("transprune", layers=(3, 5), ratios=(0.8, 0.3), accumulating=(1, 3, 4)).stages(None, 8)
    assert [transitions(s) for s in early] == [[1, 3], [2, 3, 5]]
    assert [s.method.history for s in early] == [(3, 1), (5, 3, 2)]  # type: ignore[attr-defined]


def test_transprune_from_layers_before_the_first_stage() -> None:
    """Scores are the sum of what all layers of the list did, also those that ran on all tokens."""
    model, batch = families.model("llava"), families.inputs("llava")
    options = {"layers": (3,), "ratios": (0.5,)}
    seen = []
    for history in ((3,), (1,), (3, 1)):
        method = vtprune.create("transprune", history=history)
        with torch.no_grad(), vtprune.patch(model, Stage(3, method, keep=0.5)) as handle:
            model(**batch)
        seen.append(handle.last.units[0].scores)
    with torch.no_grad(), vtprune.patch(model, "transprune", accumulating=(1, 3), **options) as handle:
        model(**batch)
    assert torch.equal(handle.last.units[0].scores, seen[2])
    assert not torch.equal(seen[2], seen[0])
    assert not torch.equal(seen[2], seen[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"accumulating": (0, 3)}, ValueError, "count from 1"),
        ({"accumulating": (5, 3)}, ValueError, "accumulating=.*ascending"),
        ({"accumulating": 5}, TypeError, "accumulating=5"),
        ({"history": ()}, ValueError, "history"),
        ({"history": (2, 0)}, ValueError, "history"),
    ],
)
def test_transprune_names_bad_lists(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtprune.create("transprune", **options)


def test_transprune_needs_a_layer_before_its_first_stage() -> None:
    with pytest.raises(ValueError, match=r"accumulating=\(4, 5\).*from 1 to 3"):
        vtprune.create("transprune", layers=(3, 5), ratios=(0.5, 0.3), accumulating=(4, 5)).stages(None, 8)


def test_aim_follows_a_list_of_rates() -> None:
    """Behind layer l the share rates[l] is left; a layer that leaves no less has no stage."""
    rates = tuple(1.0 if layer < 14 else max(0.0, 1 - (layer - 13) / 8) for layer in range(28))
    listed, default = (vtprune.create("aim_inllm", rates=r).stages(None, 28) for r in (rates, None))
    assert [(s.where, s.keep, s.method.name) for s in listed] == [(s.where, s.keep, s.method.name) for s in default]
    some = vtprune.create("aim_inllm", rates=(1.0, 0.6, 0.6, 0.0)).stages(None, 4)
    assert [(s.where, s.keep) for s in some] == [(2, 0.6)], "nothing runs behind the last layer"
    gone = vtprune.create("aim_inllm", rates=(0.6, 0.0, 0.0)).stages(None, 3)
    assert (gone[-1].where, gone[-1].method) == (2, Withdraw(None))
    for bad in ((0.5, 0.6), (), (1.2, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="none above the one before"):
            vtprune.create("aim_inllm", rates=bad)
    with pytest.raises(ValueError, match="has 4 decoder layers"):
        vtprune.create("aim_inllm", rates=(1.0, 0.5)).stages(None, 4)
    with pytest.raises(TypeError, match=r"keep=0.5 and rates="):
        vtprune.create("aim_inllm", rates=(1.0, 0.5)).stages(0.5, 2)


def sparsevlm_unit(n: int, limit: int | None) -> Visual:
    g = torch.Generator().manual_seed(n)
    signals = {Signal("relevance"): torch.rand(6, generator=g), Signal("text_rows"): torch.rand(n, 6, generator=g)}
    return Visual(torch.randn(n, 8, generator=g), limit, signals=signals)


@pytest.mark.parametrize(("n", "count"), [(40, 10), (41, 11), (60, 20), (33, 4), (7, 9)])
def test_sparsevlm_keeps_the_counts_of_its_list(n: int, count: int) -> None:
    """Of the p others int(0.3 p) + 1 are recycled into int(that / 10) + 1 more; at least one token goes."""
    (stage,) = vtprune.create("sparsevlm", layers=(3,), counts=(count,)).stages(None, 8)
    assert (stage.where, stage.keep) == (4, None)
    kept = min(count, n - 1)
    recycled = int((int(0.3 * (n - kept)) + 1) / 10) + 1
    answer = stage.method(sparsevlm_unit(n, None))
    assert len(answer.idx) == kept + recycled
    (plus,) = vtprune.create("sparsevlm", layers=(3,), counts=(count,), version="plus", heads=2).stages(None, 8)
    assert plus.positions == "keep"


def test_sparsevlm_names_bad_counts() -> None:
    for bad in ({"counts": (5, 0, 3)}, {"counts": (5, 4, 3), "preset": 64}):
        with pytest.raises(ValueError, match="counts="):
            vtprune.create("sparsevlm", **bad)
    for counts, keep in (((5, 4), None), ((6, 5, 4), 0.5)):
        with pytest.raises(ValueError, match=r"takes 3 of them"):
            vtprune.create("sparsevlm", counts=counts).stages(keep, 32)


def test_aim_merges_what_each_round_of_its_list_says() -> None:
    x = torch.randn(2 * 63, 6)
    v = Visual(x, None, grid=(2, 7, 9), video=True)
    for rounds, left in ((3, 63 - 31 - 15 - 7), ((31, 15, 7), 10), ((20, 5), 38), ((100, 100), 16)):
        answer = vtprune.create("aim", rounds=rounds)(v)
        assert len(answer.idx) == 2 * left
    equal = [vtprune.create("aim", rounds=rounds)(v).apply(x) for rounds in (3, (31, 15, 7))]
    assert torch.equal(*equal)
    for bad in ((), (3, 0), (2.5,), True):
        with pytest.raises(ValueError, match="rounds="):
            vtprune.create("aim", rounds=bad)
    with pytest.raises(ValueError, match="inner=False"):
        vtprune.create("aim", rounds=(20, 5)).stages(None, 28)
    assert len(vtprune.create("aim", rounds=(20, 5), inner=False).stages(None, 28)) == 1


def test_flowcut_in_a_tower_of_crops_keeps_half_the_total_of_each() -> None:
    halves = vtprune.create("flowcut", llm_layer=2, tower=0.5)
    assert [[s.keep for s in halves.stages(keep, 28)] for keep in (161, 1, 0.3)] == [[80, 161], [1, 1], [0.15, 0.3]]
    twice = vtprune.create("flowcut", llm_layer=2)
    assert [[s.keep for s in twice.stages(keep, 28)] for keep in (161, 0.7)] == [[322, 161], [1.0, 0.7]]
    for bad in (0, -1.0, True):
        with pytest.raises(ValueError, match="tower="):
            vtprune.create("flowcut", tower=bad)


@pytest.mark.parametrize(("n", "found"), [(49, 4), (47, 6), (64, 4)])
def test_recoverable_cuts_off_a_share_of_outliers(n: int, found: int) -> None:
    """int(49 * (4 / 49)) is 3: faithful is the official arithmetic, otherwise all outliers stay."""
    plain = n - found
    scores = torch.cat([torch.linspace(0, 1, plain), 10.0 + 5 * torch.arange(found)])
    text = torch.linspace(0, 1, n).roll(5)
    keys = torch.randn(n, 4)
    kept = {}
    for faithful in (False, True):
        method = vtprune.create("recoverable", faithful=faithful, text_similarity=lambda _: text, nearest=4)
        signals = {Signal("cls_full", -1): scores, Signal("keys", -1): keys}
        kept[faithful] = len(method(Visual(torch.randn(n, 3), None, signals=signals)).idx)
    assert kept == {False: found, True: int(n * (found / n))}


@pytest.mark.parametrize("name", ["fastvid", "holitom", "prunevid"])
def test_numbers_of_neighbours_are_checked(name: str) -> None:
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match="neighbours="):
            vtprune.create(name, neighbours=bad)
