"""VisPruner against a plain restatement, at all budgets, and FasterVLM as its attention part."""

from __future__ import annotations

import families
import pytest
import torch

import vtprune
from vtprune import Signal, UnsupportedModel, Visual
from vtprune.evals import parity
from vtprune.methods.pre_llm.cls_topk import ClsTopK
from vtprune.methods.pre_llm.vispruner import HIDDEN, VisPruner

CLS = Signal("cls", None)


def unit(n: int, budget: int, seed: int = 0, ties: bool = False) -> Visual:
    """Random scores and features; with ties, few different ones, whose likeness is exactly 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    scores, hidden = torch.rand(n, generator=g), torch.randn(n, 6, generator=g)
    if ties:
        scores, hidden = (scores * 4).round() / 4, torch.eye(6)[torch.randint(6, (n,), generator=g)]
    return Visual(torch.zeros(n, 3), budget, signals={CLS: scores, HIDDEN: hidden})


def oracle(v: Visual, important: float, step: int = 8) -> list[int]:
    """https://arxiv.org/abs/2412.01818, where a row may have any number of tokens."""
    scores, x = v.signals[CLS].tolist(), v.signals[HIDDEN].double()
    likeness = torch.cosine_similarity(x[:, None], x[None], dim=-1).tolist()
    ranked = sorted(range(v.n), key=lambda i: (-scores[i], i))
    count = int(important * v.budget)
    chosen, row = ranked[:count], ranked[count:]
    left = v.budget - count
    while left and len(row) > left:
        even, odd = row[0::2], row[1::2]
        most = {i: max(likeness[i][j] for j in odd) for i in even}
        order = sorted(even, key=lambda i: (-most[i], even.index(i)))
        row = order[min(step, len(row) - left, len(even)) :] + odd
    return chosen + row * bool(left)


@pytest.mark.parametrize("important", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_it_equals_the_oracle(important):
    for seed, n in enumerate((1, 2, 3, 10, 31, 40)):
        for budget in range(1, n + 1, 1 + n // 12):
            for step, ties in ((8, False), (1, False), (5, n == 31)):
                v = unit(n, budget, seed, ties)
                answer = VisPruner(important=important, step=step)(v)
                expected = oracle(v, important, step)
                assert answer.order.tolist() == expected
                assert answer.idx.tolist() == sorted(expected)
                assert not answer.merges


def test_all_important_is_fastervlm():
    for budget in (1, 7, 30):
        v = unit(30, budget)
        assert torch.equal(VisPruner(important=1.0)(v).idx, ClsTopK(layer=None)(v).idx)


def test_budgets_that_the_official_code_fails_at():
    for budget in (8, 10, 11, 14, 15, 18, 19):
        assert len(VisPruner()(unit(64, budget)).idx.unique()) == budget


def test_features_are_compared_in_full_precision():
    v = unit(40, 12)
    half = Visual(v.x, 12, signals={k: s.bfloat16() for k, s in v.signals.items()})
    full = Visual(v.x, 12, signals={k: s.bfloat16().double() for k, s in v.signals.items()})
    assert torch.equal(VisPruner()(half).order, VisPruner()(full).order)


def test_a_share_of_important_tokens_is_cut_off():
    v = unit(40, 15)
    best = ClsTopK(layer=None)(Visual(v.x, 7, signals=v.signals)).idx
    assert torch.equal(VisPruner()(v).order[:7].sort().values, best)


def test_options_are_checked():
    for options in ({"important": 1.5}, {"important": float("nan")}, {"step": 0}, {"step": 2.0}, {"fallback": "mean"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            VisPruner(**options)


def test_broken_and_missing_input_is_refused():
    v = unit(20, 6)
    for signal in (CLS, HIDDEN):
        broken = {k: s.clone() for k, s in v.signals.items()}
        broken[signal][2] = torch.inf
        with pytest.raises(ValueError, match="attention rows and features"):
            VisPruner()(Visual(v.x, 6, signals=broken))
    with pytest.raises(ValueError, match="hidden"):
        VisPruner()(Visual(v.x, 6, signals={CLS: v.signals[CLS]}))
    with pytest.raises(UnsupportedModel, match="fallback='received'"):
        VisPruner(fallback="error")(Visual(v.x, 6, signals={HIDDEN: v.signals[HIDDEN]}))


@torch.no_grad()
def test_towers_with_and_without_cls():
    for name, noted in (("llava", False), ("qwen2_vl", True)):
        with vtprune.patch(families.model(name), "vispruner", keep=0.4) as handle:
            families.model(name)(**families.inputs(name, rows=(1, 2)))
            assert any("no CLS token" in said for said in handle.last.notes) == noted


def test_parity_with_the_official_code(shared):
    rows = parity.run(shared / "golden", ["leaders_vispruner_"])
    assert len(rows) == 3
    assert [row.detail for row in rows if row.status != "passed"] == []
