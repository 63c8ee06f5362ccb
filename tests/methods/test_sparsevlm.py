"""SparseVLM against its rules restated in float64: raters, rows, recycling, the rank rule, whole models, bad input."""

from __future__ import annotations

import math
from typing import Any

import families
import oracles
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Visual
from vtprune.methods.density_peaks import density_peaks
from vtprune.methods.in_llm.sparsevlm import HEADS, PRESETS, RELEVANCE, ROWS, WEIGHT


def raters_of(relevance: Tensor) -> list[int]:
    mean = math.fsum(relevance.tolist()) / len(relevance)
    return [t for t, r in enumerate(relevance.tolist()) if r > mean] or list(range(len(relevance)))


def clusters_of(x: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Centres in order of score, and the nearest of them for each row; densities without noise."""
    n, far = len(x), (torch.cdist(x.double(), x.double()) / x.shape[1] ** 0.5).tolist()
    density = [math.exp(-sum(d * d for d in sorted(far[i])[:count]) / count) for i in range(n)]
    most = max(max(row) for row in far)
    rank = sorted(range(n), key=lambda i: (-density[i], i))
    reach = [min((far[i][j] for j in rank[: rank.index(i)]), default=most) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-density[i] * reach[i], i))[:count]
    nearest = [min(range(count), key=lambda c: (far[i][centres[c]], c)) for i in range(n)]
    return centres, [centres.index(i) if i in centres else nearest[i] for i in range(n)]


def recycled(x: Tensor, scores: Tensor, kept: int) -> tuple[list[int], list[int], Tensor]:
    """Positions kept, positions of the centres, states: the kept ones ascending, then the merged ones."""
    order, dropped = oracles.top(scores, len(x)), len(x) - kept
    pool = order[kept:][: int(0.3 * dropped) + 1]
    centres, member = clusters_of(x[pool], len(pool) // 10 + 1)
    stay = sorted(order[:kept])
    means = [x[[p for p, m in zip(pool, member) if m == c]].double().mean(0) for c in range(len(centres))]
    return stay, [pool[c] for c in centres], torch.cat([x[stay].double(), torch.stack(means)])


def unit(n: int, budget: int | None, seed: int = 0, text: int = 9, heads: int = 6) -> Visual:
    g = torch.Generator().manual_seed(seed)
    by_head = torch.rand(n, heads, text, generator=g)
    signals = {
        RELEVANCE: torch.rand(text, generator=g).softmax(0),
        HEADS: by_head,
        ROWS: by_head.mean(1),
        WEIGHT: torch.rand(n, text, generator=g) - 0.3,
    }
    return Visual(torch.randn(n, 8, generator=g), budget, signals=signals)


@pytest.mark.parametrize("order", ["positional", "official"])
@pytest.mark.parametrize(("n", "kept"), [(60, 20), (200, 110), (113, 45), (30, 29), (700, 1)])
def test_recycling_equals_the_rule(n: int, kept: int, order: str) -> None:
    scored = unit(n, 1)
    raters = raters_of(scored.signals[RELEVANCE])
    scores = scored.signals[ROWS][:, raters].double().mean(1)
    stay, places, states = recycled(scored.x, scores, kept)
    answer = vtprune.create("sparsevlm", order=order)(unit(n, kept + len(places)))
    assert answer.scores is not None
    torch.testing.assert_close(answer.scores.double(), scores, rtol=0, atol=1e-6)
    assert answer.idx.tolist() == sorted(stay + places)
    assert answer.order is not None
    assert answer.order.tolist() == oracles.top(scores, kept) + places
    if order == "positional":
        states = states[sorted(range(len(states)), key=(stay + places).__getitem__)]
    torch.testing.assert_close(answer.apply(scored.x).double(), states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", range(1, 40))
def test_every_budget_is_met(budget: int) -> None:
    answer = vtprune.create("sparsevlm")(unit(40, budget))
    assert len(answer.idx.unique()) == budget


def test_plus_equals_the_rule() -> None:
    v = unit(50, 12)
    raters, heads = raters_of(v.signals[RELEVANCE]), 4
    sharp = (v.signals[HEADS].double() / v.signals[WEIGHT].double()[:, None])[:, :, raters]
    best = oracles.top(sharp.sum((0, 2)), heads)
    scores = sharp[:, best].mean((1, 2))
    answer = vtprune.create("sparsevlm", version="plus", heads=heads)(v)
    assert answer.scores is not None
    torch.testing.assert_close(answer.scores.double(), scores, rtol=1e-4, atol=1e-4)
    assert answer.idx.tolist() == sorted(oracles.top(scores, 12))
    assert not answer.merges


def test_rank_rule_counts_by_the_raters_rows() -> None:
    v = unit(90, None)
    raters = raters_of(v.signals[RELEVANCE])
    kept = int(3.5 * len(raters) + 2)  # random rows have full rank
    answer = vtprune.create("sparsevlm", scale=3.5, bias=2)(v)
    assert len(answer.idx) == kept + (int(0.3 * (90 - kept)) + 1) // 10 + 1
    assert len(vtprune.create("sparsevlm", scale=3.5, bias=2, version="plus")(v).idx) == kept
    assert len(vtprune.create("sparsevlm", scale=1e6, version="plus")(v).idx) == 89, "never all of them"


def test_no_rater_stands_out() -> None:
    v = unit(20, 5)
    flat = {**v.signals, RELEVANCE: torch.full((9,), 1 / 9)}
    answer = vtprune.create("sparsevlm")(Visual(v.x, 5, signals=flat))
    assert answer.scores is not None
    torch.testing.assert_close(answer.scores, v.signals[ROWS].mean(1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_density_peaks(count: int) -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(count))
    centres, member = density_peaks(x, count)
    expected = clusters_of(x, count)
    assert centres.tolist() == expected[0]
    assert member.tolist() == expected[1]


def test_equal_densities_fall_back_on_the_order() -> None:
    """One cluster: every density is 1, where the official code lets noise choose; and far rows, where it is 0."""
    assert density_peaks(torch.randn(9, 3), 1)[0].tolist() == [0]
    far = torch.randn(30, 3) * 1e3
    centres, member = density_peaks(far, 3)
    assert len(set(centres.tolist())) == 3
    assert member[centres].tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_signals_are_those_of_the_whole_map(family: str) -> None:
    """Rows of the text behind the first image against the eager map; relevance against the embeddings."""
    batch, layer = families.inputs(family, rows=(1,)), 2
    method = vtprune.create("sparsevlm", layers=(layer,))
    stages, log = reference.spy(method.stages(0.5, 4))
    model = families.model(family)
    with torch.no_grad(), vtprune.patch(model, stages):
        model(**batch)
    (view,) = log[0].units
    eager = families.model(family, "eager")
    maps: list[Tensor] = []
    attention = eager.get_decoder().layers[layer].self_attn
    hook = attention.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    full = reference.dense(eager, batch)
    hook.remove()
    visual = batch.units[0][0]
    text = [p for p in range(visual[0], len(full.hidden)) if p not in set(visual)]
    expected = maps[0][0].double().mean(0)[text][:, visual].T
    torch.testing.assert_close(view.signals[ROWS].double(), expected, rtol=0, atol=1e-6)
    words = full.hidden[text].double()
    relevance = (full.hidden[visual].double() @ words.T).softmax(1).mean(0)
    torch.testing.assert_close(view.signals[RELEVANCE].double(), relevance, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_by_head_and_rotary_weights(family: str) -> None:
    """Multi-axis positions work where the model mixes the axes before its layers, else they are refused by name."""
    batch, layer = families.inputs(family, rows=(2, 1)), 1
    method = vtprune.create("sparsevlm", layers=(layer,), version="plus")
    stages, log = reference.spy(method.stages(0.5, 4))
    model = families.model(family)
    alone = families.inputs(family, rows=(2, 1), only=1)
    full, visual = reference.dense(model, alone), alone.units[0][0]
    rope = full.layers[layer]["position_embeddings"]
    with torch.no_grad(), vtprune.patch(model, stages):
        if rope[0].dim() != 3:
            with pytest.raises(vtprune.UnsupportedModel, match="single axis"):
                model(**batch)
            return
        model(**batch)
    view = log[0].units[-1]  # the only image of the padded row
    text = [p for p in range(visual[0], len(full.hidden)) if p not in set(visual)]
    cos, sin = (part[0].double() for part in rope)
    half = cos.shape[1] // 2
    ones = cos + sin * torch.cat([-torch.ones(half), torch.ones(half)])
    expected = (ones @ ones.T)[visual][:, text] / math.sqrt(2 * half)
    torch.testing.assert_close(view.signals[WEIGHT].double(), expected, rtol=0, atol=1e-5)
    stages, log = reference.spy(vtprune.create("sparsevlm", layers=(layer,)).stages(0.5, 4))
    with torch.no_grad(), vtprune.patch(model, stages):
        model(**batch)
    torch.testing.assert_close(view.signals[HEADS].mean(1), log[0].units[-1].signals[ROWS])


def test_an_image_that_ends_the_prompt_is_rated_by_its_last_token() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    end = batch.units[0][0][-1] + 1
    short: dict[str, Any] = {k: v[:, :end] if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    stages, log = reference.spy(vtprune.create("sparsevlm").stages(0.5, 4))
    with torch.no_grad(), vtprune.patch(model, stages):
        model(**short)
    assert log[0].units[0].signals[ROWS].shape[1] == 1


def test_schedule() -> None:
    method = vtprune.create("sparsevlm")
    assert [s.where for s in method.stages(0.2, 32)] == [3, 7, 16]
    assert [s.where for s in method.stages(0.2, 28)] == [3, 6, 14]
    assert [s.where for s in method.stages(0.2, 4)] == [2, 3], "a shallow model: from the middle on"
    assert [s.keep for s in method.stages(0.125, 32)] == pytest.approx([0.5, 0.25, 0.125])
    assert [s.keep for s in method.stages(10, 32)] == [40, 20, 10]
    assert [s.keep for s in method.stages(1.0, 32)] == [1.0] * 3, "keep=1.0 changes nothing"
    assert [s.keep for s in method.stages(None, 32)] == [None] * 3
    assert [s.where for s in vtprune.create("sparsevlm", layers=(1, 4)).stages(0.5, 8)] == [2, 5]


def test_presets_are_the_published_lists() -> None:
    for version, lists in (
        ("v1", {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}),
        ("plus", {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}),
    ):
        for average, counts in lists.items():
            method, alive = vtprune.create("sparsevlm", version=version, preset=average), 576
            for stage, kept in zip(method.stages(None, 32), counts, strict=True):
                merged = (int(0.3 * (alive - kept)) + 1) // 10 + 1 if version == "v1" else 0
                (alive,) = stage.budgets([576])
                assert alive == kept + merged
            assert average in PRESETS[version]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v3"}, "version="),
        ({"order": "random"}, "order="),
        ({"preset": 100}, "preset=100"),
        ({"layers": ()}, "layers="),
        ({"layers": (4, 2)}, "ascending"),
        ({"layers": (-1, 2)}, "layers="),
        ({"layers": (1, 2), "preset": 64}, "preset=64"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 1.5}, "heads=1.5"),
        ({"scale": -1.0}, "scale=-1"),
    ],
)
def test_options_outside_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        vtprune.create("sparsevlm", **options)


def test_bad_values_and_missing_parts() -> None:
    v = unit(12, 4)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        vtprune.create("sparsevlm")(Visual(v.x, 4, signals={**v.signals, ROWS: v.signals[ROWS] * torch.nan}))
    with pytest.raises(ValueError, match="relevance"):
        vtprune.create("sparsevlm")(Visual(v.x, 4))
    with pytest.raises(TypeError, match="give one of them"):
        vtprune.create("sparsevlm", preset=64).stages(0.5, 32)
