"""HoloV against a restatement with Python loops, and the shares of a budget that it and GlobalCom2 deal out."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtprune
from vtprune import Signal, Visual
from vtprune.evals import parity
from vtprune.methods.shared.quota import quota, shares_of_cells

CLS = Signal("cls", None)


def image(n: int, budget: int, seed: int = 0, power: float = 1.0) -> Visual:
    """Attention with a few peaks; a larger power makes it more peaked."""
    g = torch.Generator().manual_seed(seed)
    a = (3 * torch.rand(n, generator=g)).exp() ** power
    a[: n // 4] *= 3
    return Visual(torch.randn(n, 12, generator=g) + 1, budget, signals={CLS: a / a.sum()})


def restated(v: Visual, runs: int, alpha: float, inside: str = "attention") -> list[list[int]]:
    """https://arxiv.org/abs/2510.02912: the tokens of every run in official order, the overflow cut off."""
    n, a, k = v.n, v.signals[CLS].double(), v.budget or 0
    x = v.x.double()
    x = x / (x.norm(dim=1, keepdim=True) + 1e-6)
    parts = [list(part) for part in np.array_split(np.arange(n), runs)]
    token, mean = [], []
    for part in parts:
        s = (x[part] @ x[part].T).fill_diagonal_(0)
        m = s.sum(1) / max(1, len(part) - 1)
        v_i = ((s - m[:, None]) ** 2).sum(1) / max(1, len(part) - 1)
        score = 1000 * a[part]
        score = score + alpha * v_i * score.mean() / (v_i.mean() + 1e-6)
        token.append(score.tolist())
        mean.append(float(score.mean()))
    share = [m / (sum(mean) + 1e-6) * k for m in mean]
    counts = [int(s) for s in share]
    for i in sorted(range(runs), key=lambda i: (-mean[i], i))[: k - sum(counts)]:
        counts[i] += 1
    kept = []
    for part, score, count in zip(parts, token, counts):
        rank = a[part].tolist() if inside == "attention" else score
        best = sorted(range(len(part)), key=lambda i: (-rank[i], i))[:count]
        kept.append([part[i] for i in best] if count < len(part) else part)
    return kept


@pytest.mark.parametrize(("n", "k", "runs"), [(100, 24, 16), (100, 33, 7), (37, 9, 5), (20, 5, 20), (8, 3, 1)])
@pytest.mark.parametrize("inside", ["attention", "score"])
def test_equals_the_restatement(n: int, k: int, runs: int, inside: str) -> None:
    v = image(n, k)
    kept = list(itertools.chain(*restated(v, runs, 0.09, inside)))
    answer = vtprune.create("holov", runs=runs, inside=inside, redistribute=False)(v)
    assert answer.order is not None
    assert answer.order.tolist() == kept
    if len(kept) == k:
        assert vtprune.create("holov", runs=runs, inside=inside)(v).order.tolist() == kept


@pytest.mark.parametrize("power", [1.5, 3.0])
def test_overflow_is_redistributed_or_lost(power: float) -> None:
    v = image(144, 72, power=power)
    lossy, whole = vtprune.create("holov", redistribute=False), vtprune.create("holov")
    kept = restated(v, 16, 0.09)
    assert sum(map(len, kept)) < 72
    assert lossy(v).order.tolist() == list(itertools.chain(*kept))
    assert (lossy.exact, whole.exact) == (False, True)
    answer = whole(v)
    assert len(set(answer.idx.tolist())) == 72
    assert {i for run in kept if len(run) == 9 for i in run} <= set(answer.idx.tolist())  # runs of 9 that stay whole


def test_diversity_changes_no_share_but_may_change_what_stays() -> None:
    v = image(200, 50)
    answers = [vtprune.create("holov", alpha=alpha)(v) for alpha in (0.0, 0.09, 5.0)]
    assert all(torch.equal(answer.order, answers[0].order) for answer in answers)
    inside = [vtprune.create("holov", alpha=alpha, inside="score")(v) for alpha in (0.0, 5.0)]
    assert torch.equal(inside[0].idx, answers[0].idx)
    assert not torch.equal(inside[1].idx, answers[0].idx)


def test_orders_and_the_number_of_runs() -> None:
    v = image(60, 20)
    official, plain = vtprune.create("holov", order="official")(v), vtprune.create("holov")(v)
    assert torch.equal(official.apply(v.x), v.x[plain.order])
    assert torch.equal(plain.apply(v.x), v.x[plain.idx])
    assert official.order.tolist() != sorted(official.order.tolist())
    qwen = vtprune.create("holov", runs=None)(v)
    assert torch.equal(qwen.idx, vtprune.create("holov", runs=int(1024 / 576 * 60 / 20))(v).idx)


def test_degenerate_units_and_bad_options() -> None:
    flat = Visual(torch.zeros(9, 3), 4, signals={CLS: torch.zeros(9)})
    for runs in (1, 4, 16, None):
        assert len(set(vtprune.create("holov", runs=runs)(flat).idx.tolist())) == 4
    with pytest.raises(ValueError, match="runs=0: use an int >= 1, or None"):
        vtprune.create("holov", runs=0)
    with pytest.raises(ValueError, match=r"alpha=-1.*use a finite number >= 0"):
        vtprune.create("holov", alpha=-1.0)
    with pytest.raises(ValueError, match="inside='best': choose 'attention' or 'score'"):
        vtprune.create("holov", inside="best")


# quota


def dealt(weights: list[float], total: int, caps: list[int], leftover: str) -> list[int]:
    """Fill up who is over the cap, share out the rest again, round down, one more each for those with room."""
    total, most = min(total, sum(caps)), max(weights) or 1.0
    weights = [max(w / most, 1e-12) for w in weights]
    full: set[int] = set()
    while True:
        rest, whole = total - sum(caps[i] for i in full), sum(w for i, w in enumerate(weights) if i not in full)
        share = [caps[i] if i in full else rest * w / whole for i, w in enumerate(weights)]
        over = {i for i, s in enumerate(share) if s > caps[i] + 1e-12}
        if not over:
            break
        full |= over
    counts = [int(s + 1e-9) for s in share]
    room = [i for i in range(len(caps)) if counts[i] < caps[i]]
    key = [s - c for s, c in zip(share, counts)] if leftover == "remainder" else weights
    for i in sorted(room, key=lambda i: (-round(key[i], 9), i))[: total - sum(counts)]:
        counts[i] += 1
    return counts


@pytest.mark.parametrize("leftover", ["remainder", "weight"])
@pytest.mark.parametrize("seed", range(60))
def test_quota(seed: int, leftover: Any) -> None:
    rng = random.Random(seed)
    caps = [rng.randint(0, 6) for _ in range(rng.randint(1, 9))]
    weights = [rng.choice([0.0, rng.random(), rng.random() ** 4]) for _ in caps]
    total = rng.randint(0, sum(caps) + 2)
    counts = quota(torch.tensor(weights, dtype=torch.float64), total, torch.tensor(caps), leftover=leftover)
    assert counts.tolist() == dealt(weights, total, caps, leftover)
    assert counts.sum() == min(total, sum(caps))


def test_quota_of_ties_and_of_what_exceeds_a_cap() -> None:
    caps = torch.tensor([9, 9, 9])
    assert quota(torch.ones(3), 4, caps).tolist() == [2, 1, 1]
    assert quota(torch.zeros(3), 5, caps).tolist() == [2, 2, 1]
    assert quota(torch.tensor([5.0, 3.0, 2.0]), 9, caps, leftover="weight").tolist() == [5, 3, 1]
    assert quota(torch.tensor([5.0, 3.0, 2.0]), 9, caps).tolist() == [4, 3, 2]
    assert quota(torch.tensor([8.0, 1.0, 1.0]), 20, caps).tolist() == [9, 6, 5]
    assert quota(torch.tensor([8.0, 1.0, 1.0]), 20, caps, redistribute=False).tolist() == [9, 2, 2]


def test_shares_of_cells() -> None:
    """Cells of side // parts tokens, the last ones with what remains; the mean share is 1."""
    scores = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    share = shares_of_cells(scores.double(), (2, 3), 10.0)
    rows, columns = (slice(0, 3), slice(3, 7)), (slice(0, 2), slice(2, 4), slice(4, 8))
    sums = torch.tensor([float(scores[r, c].sum()) for r in rows for c in columns])
    p = (sums / 10).exp() / (sums / 10).exp().sum()
    assert torch.allclose(share.float(), 1 + p - 1 / 6)
    assert float(share.mean()) == pytest.approx(1)
    assert shares_of_cells(scores, (1, 1), 10.0).tolist() == [1.0]


def stored(path: Path, v: Visual, positions: list[int]) -> None:
    budget = v.budget or 0
    row = np.array([positions + [-1] * (budget - len(positions))])
    features = np.zeros((1, budget, v.x.shape[1]), dtype=np.float32)
    features[0, : len(positions)] = v.x[positions].numpy()
    arrays: dict[str, Any] = {"features": v.x[None].numpy(), "attention": v.signals[CLS][None].numpy()}
    arrays |= {"num_crops": np.array([16]), "budgets": np.array([budget]), "positions_0": row, "features_0": features}
    np.savez(path / "leaders_holov_small.npz", **arrays)


@pytest.mark.parametrize(("power", "rule"), [(1.0, ""), (3.0, "rows of zeros repeated by redistribute=False")])
def test_the_parity_case(tmp_path: Path, power: float, rule: str) -> None:
    v = image(144, 24 if power == 1 else 72, power=power)
    kept = list(itertools.chain(*restated(v, 16, 0.09)))
    stored(tmp_path, v, kept)
    (row,) = parity.run(tmp_path)
    assert row.status == "passed", row.detail
    assert rule in row.detail
    assert ("zeros" in row.detail) == bool(rule)
    stored(tmp_path, v, kept[1:] + kept[:1])
    (row,) = parity.run(tmp_path)
    assert row.status == "failed"
    assert "positions of run 0" in row.detail
