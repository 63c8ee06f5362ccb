"""PruMerge against a plain restatement: counts of its own and given ones, both variants, features of every row."""

from __future__ import annotations

import families
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Signal, UnsupportedModel, Visual
from vtprune.evals import parity
from vtprune.methods.pre_llm.prumerge import CLS, KEYS, RECEIVED, PruMerge


def unit(n: int, budget: int | None, seed: int = 0, levels: int = 0, sharp: int = 6) -> Visual:
    """Random features, keys and scores, a few of these large; with few levels, full of ties."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(levels, (n,), generator=g) / levels if levels else torch.rand(n, generator=g) ** sharp
    return Visual(torch.randn(n, 5, generator=g), budget, signals={CLS: a, KEYS: torch.randn(n, 6, generator=g)})


def quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    at = q * (len(values) - 1)
    low = int(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def centres_of(a: list[float], budget: int | None, variant: str) -> list[int]:
    n = len(a)
    ranked = sorted(range(n), key=lambda i: (-a[i], i))
    if budget is None:
        low, high = quantile(a, 0.25), quantile(a, 0.75)
        ratio = max(1, sum(value > high + 1.5 * (high - low) for value in a)) / n
        best = ranked[: max(1, int(n * ratio))]
        spaced = range(0, n - 1, max(1, int(int(1 / ratio) / 3)))
    else:
        count = max(1, budget - 1)
        best = ranked[: (count + 1) // 2 if variant == "plus" else count]
        left, few = sorted(set(range(n)) - set(best)), count - len(best)
        spaced = [left[(2 * i + 1) * len(left) // (2 * few)] for i in range(few)]
    return best + [i for i in spaced if i not in best] if variant == "plus" else best


def oracle(v: Visual, variant: str, nearest: int = 32) -> tuple[list[int], Tensor]:
    """https://arxiv.org/abs/2403.15388: tokens in official order and their features."""
    a, keys, x = v.signals[CLS].double().tolist(), v.signals[KEYS].double(), v.x.double()
    centres = centres_of(a, v.budget, variant)
    ranked = sorted(range(v.n), key=lambda i: (-a[i], i))
    rest = [i for i in ranked if i not in centres]
    order = centres + rest[:1] if v.budget is None else (centres + rest)[: v.budget]
    if len(order) == v.n:
        return order, x[order]
    likeness = torch.cosine_similarity(keys[:, None], keys[None], dim=-1).tolist()
    rows = []
    for i in centres:
        others = sorted((j for j in range(v.n) if j != i), key=lambda j: (-likeness[i][j], j))[:nearest]
        rows.append(x[i] + sum(a[j] * x[j] for j in others))
    if len(order) > len(centres):
        rows.append(sum(a[j] * x[j] for j in rest))
    return order, torch.stack(rows)


@pytest.mark.parametrize("order", ["positional", "official"])
@pytest.mark.parametrize("variant", ["plus", "base"])
def test_it_equals_the_oracle(variant, order):
    for seed, n in enumerate((1, 2, 3, 7, 40, 61)):
        for budget in {None, 1, min(n, 2), max(1, n // 4), max(1, n // 2), max(1, n - 1), n}:
            for nearest, levels in ((32, 0), (3, 0), (4, 5)):
                v = unit(n, budget, seed, levels)
                answer = PruMerge(variant=variant, nearest=nearest, order=order)(v)
                picked, rows = oracle(v, variant, nearest)
                assert answer.order.tolist() == picked
                assert answer.idx.tolist() == sorted(picked)
                shown = (
                    range(len(picked)) if order == "official" else sorted(range(len(picked)), key=picked.__getitem__)
                )
                if len(picked) == n:  # all stay as they are
                    shown = sorted(range(n), key=picked.__getitem__)
                torch.testing.assert_close(answer.apply(v.x), rows[list(shown)].float(), atol=1e-5, rtol=1e-4)


def test_own_counts_are_read_together_and_equal_single_ones():
    units = [unit(61, None, 1), unit(61, 20, 2), unit(30, None, 3, sharp=1)]
    for variant in ("plus", "base"):
        method = PruMerge(variant=variant)
        for v, answer in zip(units, method.batch(units)):
            assert torch.equal(answer.idx, method(v).idx)


def test_a_share_of_outliers_is_cut_off_as_officially():
    """int(n * (c / n)) is c - 1 for some c, and that is how many the official code keeps."""
    n, c = next((n, c) for n in range(40, 200) for c in range(2, n // 5) if int(n * (c / n)) == c - 1)
    v = Visual(torch.randn(n, 5), None, signals={CLS: torch.linspace(0, 1, n), KEYS: torch.randn(n, 6)})
    v.signals[CLS][:c] += 10
    assert len(PruMerge(variant="base")(v).idx) == c - 1 + 1


def test_scores_without_outliers_leave_one_centre():
    v = unit(40, None)
    flat = Visual(v.x, None, signals={CLS: torch.full((40,), 0.025), KEYS: v.signals[KEYS]})
    assert PruMerge(variant="base")(flat).order.tolist() == [0, 1]
    assert len(PruMerge()(flat).idx) == 1 + len(range(13, 39, 13)) + 1


def test_the_token_of_the_rest_is_their_weighted_sum():
    v = unit(30, 9)
    answer = PruMerge(order="official")(v)
    rest = [i for i in range(30) if i not in answer.order[:-1].tolist()]
    expected = (v.signals[CLS][rest, None] * v.x[rest]).sum(0)
    torch.testing.assert_close(answer.apply(v.x)[-1], expected, atol=1e-5, rtol=1e-5)


def test_likenesses_in_blocks_equal_those_at_once(monkeypatch):
    import vtprune.methods.shared.nearest as module

    v = unit(40, 15)
    at_once = PruMerge()(v)
    monkeypatch.setattr(module, "CELLS", 100)
    assert torch.equal(PruMerge()(v).src, at_once.src)


def test_half_precision_is_scored_in_full():
    v = unit(50, 12)
    half = Visual(v.x.bfloat16(), 12, signals={k: s.bfloat16() for k, s in v.signals.items()})
    full = Visual(half.x.float(), 12, signals={k: s.float() for k, s in half.signals.items()})
    assert torch.equal(PruMerge()(half).src, PruMerge()(full).src)
    assert PruMerge()(half).apply(half.x).dtype == torch.bfloat16


def test_options_are_checked():
    for options in ({"variant": "max"}, {"order": "random"}, {"nearest": 0}, {"nearest": True}, {"fallback": "mean"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PruMerge(**options)
    assert PruMerge().rounding == "down"
    assert PruMerge(fallback="error").needs == (CLS, KEYS)


def test_broken_and_missing_input_is_refused():
    v = unit(20, 6)
    for signal in (CLS, KEYS):
        broken = {k: s.clone() for k, s in v.signals.items()}
        broken[signal][2] = torch.nan
        with pytest.raises(ValueError, match="attention rows and keys"):
            PruMerge()(Visual(v.x, 6, signals=broken))
    with pytest.raises(ValueError, match="keys"):
        PruMerge()(Visual(v.x, 6, signals={CLS: v.signals[CLS]}))
    with pytest.raises(UnsupportedModel, match="fallback='received'"):
        PruMerge(fallback="error")(Visual(v.x, 6, signals={KEYS: v.signals[KEYS]}))


@torch.no_grad()
def test_towers_with_and_without_cls():
    for name, noted in (("llava", False), ("qwen2_vl", True)):
        for keep in (None, 0.4):
            with vtprune.patch(families.model(name), "prumerge", keep=keep) as handle:
                families.model(name)(**families.inputs(name, rows=(1, 2)))
                assert any("no CLS token" in said for said in handle.last.notes) == noted
                assert all(1 <= len(part.idx) < 30 for part in handle.last.units)
    assert Signal("received", -1, without_cls=True) == RECEIVED


def test_parity_with_the_official_code(shared):
    rows = parity.run(shared / "golden", ["leaders_prumerge_"])
    assert len(rows) == 3
    assert [row.detail for row in rows if row.status != "passed"] == []
