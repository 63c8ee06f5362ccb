"""PruneSID against a plain restatement of both rules, and its random directions against torch's own."""

from __future__ import annotations

import math

import families
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import UnsupportedModel, Visual
from vtprune.evals import parity
from vtprune.methods.pre_llm.prunesid import CLS, HIDDEN, PruneSID
from vtprune.methods.shared.principal import principal_parts


def unit(n: int, budget: int, seed: int = 0, width: int = 12, offset: float = 0.0) -> Visual:
    g = torch.Generator().manual_seed(seed)
    x, hidden = (torch.randn(n, width, generator=g) + offset for _ in "ab")
    return Visual(x, budget, signals={CLS: torch.rand(n, generator=g), HIDDEN: hidden})


def parts_of(x: Tensor, count: int) -> Tensor:
    """|V| by the singular value decomposition of the matrix [C, N] with centred columns."""
    matrix = x.double().sigmoid().T
    _, s, right = torch.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    count = min(count, len(s))
    return right[:count].T.abs() * (s[:count] > 1e-6 * s[0])


def oracle(v: Visual, rule: str, cls: str = "absent") -> list[int]:
    """https://arxiv.org/abs/2603.09480: tokens group by group, as on paper."""
    first, budget = int(cls == "keep"), v.budget
    if budget == v.n:
        return list(range(v.n))
    x = (v.signals[HIDDEN] if rule == "cls" else v.x).double()[first:]
    total, n = budget - first, len(x)
    if not total:
        return [0]
    parts = parts_of(x, max(1, budget // 4) if rule == "cls" else max(4, budget // 4))
    label = parts.argmax(1).tolist()
    groups = [[i for i in range(n) if label[i] == g] for g in range(parts.shape[1])]
    alike = torch.cosine_similarity(x[:, None], x[None], dim=-1).tolist()
    upper = [alike[i][j] for i in range(n) for j in range(i + 1, n)]
    if rule == "cls":
        score = v.signals[CLS].tolist()[first:]
        theta = budget / 32 * sum(upper) / len(upper)
    else:
        score = [float(parts[i, label[i]]) for i in range(n)]
        theta = max(budget / (n / 18), 1) * (sum(upper) + n) / n**2
    lists, alive = [], []
    for group in groups:
        left, survivors = sorted(group, key=lambda i: (-score[i], i)), []
        while left:
            survivors.append(left[0])
            left = [j for j in left[1:] if not alike[survivors[-1]][j] > theta]
        suppressed = sorted(set(group) - set(survivors), key=lambda i: (-score[i], i))
        lists.append(survivors + suppressed)
        alive.append(len(survivors))
    counts = quotas(alive, [len(group) for group in groups], budget, total)
    picked = [i for ranked, count in zip(lists, counts) for i in ranked[:count]][:total]
    return list(range(first)) + [i + first for i in picked]


def quotas(alive: list[int], size: list[int], budget: int, total: int) -> list[int]:
    least = [min(1, s) for s in size]
    most = [min(5 * math.ceil(budget / 64), s, a) for s, a in zip(size, alive)]
    while sum(most) < budget:
        most = [min(m + 1, s) for m, s in zip(most, size)]
    extra = max(0, total - sum(least))
    share, before, given = 0.0, 0, []
    for lo, up, a in zip(least, most, alive):
        share += a / sum(alive)
        given.append(min(lo + round(extra * share) - before, up))
        before = round(extra * share)
    for g in sorted(range(len(alive)), key=lambda g: (-alive[g], g)):
        given[g] += min(most[g] - given[g], extra + sum(least) - sum(given))
    return given


@pytest.mark.parametrize("cls", ["absent", "keep"])
@pytest.mark.parametrize("rule", ["cls", "component"])
def test_it_equals_the_oracle(rule, cls):
    for seed, (n, width, offset) in enumerate(((30, 12, 0.0), (41, 12, 0.7), (20, 30, 0.4), (3, 5, 0.0), (1, 4, 0.0))):
        for budget in sorted({1, min(2, n), min(3, n), max(1, n // 4), max(1, n // 2), max(1, n - 1), n}):
            v = unit(n, budget, seed, width, offset)
            answer, expected = PruneSID(rule=rule, cls=cls)(v), oracle(v, rule, cls)
            assert answer.order.tolist() == expected
            assert answer.idx.tolist() == sorted(set(expected))
            assert len(answer.idx) == budget
            shown = PruneSID(rule=rule, cls=cls, order="official")(v)
            assert torch.equal(shown.idx, answer.idx)
            torch.testing.assert_close(shown.apply(v.x), v.x[expected])


def test_the_rule_follows_the_tower():
    v = unit(30, 9)
    assert torch.equal(PruneSID()(v).order, PruneSID(rule="cls")(v).order)
    plain = Visual(v.x, 9)
    assert torch.equal(PruneSID()(plain).order, PruneSID(rule="component")(v).order)
    assert "no CLS token" in plain.state["note"]
    with pytest.raises(UnsupportedModel, match="rule='component'"):
        PruneSID(rule="cls")(plain)


def test_limits_are_raised_until_the_budget_fits():
    """Almost all tokens are doubles of a few: no group has survivors enough."""
    g = torch.Generator().manual_seed(0)
    few = torch.randn(4, 12, generator=g) + 1
    hidden = few[torch.arange(40) % 4] + 1e-3 * torch.randn(40, 12, generator=g)
    v = Visual(torch.zeros(40, 3), 30, signals={CLS: torch.rand(40, generator=g), HIDDEN: hidden})
    answer = PruneSID()(v)
    assert len(answer.idx.unique()) == 30
    assert answer.order.tolist() == oracle(v, "cls")


@pytest.mark.parametrize("rule", ["cls", "component"])
def test_tokens_that_are_all_alike_are_one_group(rule):
    same = torch.ones(12, 6)
    v = Visual(same, 5, signals={CLS: torch.zeros(12), HIDDEN: same})
    assert PruneSID(rule=rule)(v).order.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("n", "width"), [(40, 12), (20, 30)])
def test_directions(n, width):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(1))
    exact = principal_parts(x.double(), 5)
    torch.testing.assert_close(exact, parts_of(x, 5))
    torch.manual_seed(7)
    theirs = torch.pca_lowrank(x.sigmoid().T, q=5)[2].abs()
    ours = principal_parts(x.double(), 5, seed=7)
    torch.testing.assert_close(ours.float(), theirs, atol=1e-3, rtol=1e-2)
    assert not torch.allclose(ours, exact, atol=1e-3)


def test_random_directions_repeat_by_their_seed():
    v = unit(60, 24, width=30)
    orders = [PruneSID(directions="random", seed=seed)(v).order.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert len(set(orders[2])) == 24


def test_half_precision_is_compared_in_full():
    v = unit(40, 12)
    half = Visual(v.x, 12, signals={k: s.bfloat16() for k, s in v.signals.items()})
    full = Visual(v.x, 12, signals={k: s.bfloat16().float() for k, s in v.signals.items()})
    assert torch.equal(PruneSID()(half).order, PruneSID()(full).order)


def test_options_are_checked():
    for options in ({"rule": "llava"}, {"directions": "svd"}, {"order": "random"}, {"cls": "drop"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PruneSID(**options)
    assert PruneSID(rule="component").needs == ()


def test_broken_and_missing_input_is_refused():
    v = unit(20, 6)
    for signal in (CLS, HIDDEN):
        broken = {k: s.clone() for k, s in v.signals.items()}
        broken[signal][2] = torch.inf
        with pytest.raises(ValueError, match="attention rows and features"):
            PruneSID()(Visual(v.x, 6, signals=broken))
    with pytest.raises(ValueError, match="hidden"):
        PruneSID()(Visual(v.x, 6, signals={CLS: v.signals[CLS]}))


@torch.no_grad()
def test_towers_with_and_without_cls():
    for name, noted in (("llava", False), ("qwen2_vl", True)):
        with vtprune.patch(families.model(name), "prunesid", keep=0.4) as handle:
            families.model(name)(**families.inputs(name, rows=(1, 2)))
            assert any("no CLS token" in said for said in handle.last.notes) == noted


def test_parity_with_the_official_code(shared):
    rows = parity.run(shared / "golden", ["leaders_prunesid_"])
    assert len(rows) == 4
    assert [row.detail for row in rows if row.status != "passed"] == []
