"""Methods inside vision transformers against float64 restatements, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Visual
from vtprune.evals.speed import bench_kernels
from vtprune.methods.in_vit import ssm_keep
from vtprune.methods.in_vit.schedule import stepwise
from vtprune.methods.in_vit.tome import match, per_block
from vtprune.reduction import Reduction, Tokens

EXACT = {"rtol": 1e-5, "atol": 1e-6}


# -- oracles: one image, plain loops -----------------------------------------------------------------------------------


def tome(metric: Tensor, prefix: int, r: int) -> list[list[int]]:
    """Groups of tokens in output order, the token that stands for each first."""
    places = range(prefix, len(metric))
    even, odd = [p for p in places if p % 2 == 0], [p for p in places if p % 2]
    rows = metric.double()
    best = {a: max((oracles.cosine(rows[a], rows[b]), -b) for b in odd) for a in even}
    order = sorted(even, key=lambda a: (-best[a][0], a))
    gone, left = order[:r], order[r:]
    left = sorted(left) if prefix else left
    groups = {p: [p] for p in (*range(prefix), *left, *odd)}
    for a in gone:
        groups[-best[a][1]].append(a)
    return list(groups.values())


def pairs_of(step: Reduction, b: int = 0) -> list[set[int]]:
    groups: list[set[int]] = [{int(i)} for i in step.index[b]]
    if step.src is not None and step.dst is not None:
        for s, d in zip(step.src[b].tolist(), step.dst[b].tolist()):
            groups[d].add(s)
    return groups


def page_rank(q: Tensor, k: Tensor, steps: int, start: Tensor) -> Tensor:
    """[H, N] float64, map by map."""
    a = oracles.attention(q[None], k[None], None, q.shape[-1] ** -0.5)[0]
    score = start.double().expand(a.shape[0], -1).clone()
    for _ in range(steps):
        score = torch.stack([s @ m for s, m in zip(score, a)])
    return score


def importance(score: Tensor, prefix: int, limits: tuple[float, float]) -> Tensor:
    n = score.shape[1]
    passed = []
    for head in score:
        x = head[prefix:] * n
        passed.append(limits[0] <= float(((x - x.mean()) ** 2).mean()) <= limits[1])
    heads = [head for head, good in zip(score, passed) if good or not any(passed)]
    return (torch.stack(heads) ** 2).mean(0).sqrt()


def zero_tprune(
    q: Tensor, k: Tensor, prefix: int, left: int, similar: int, start: Callable[[int], Tensor], steps: Any, limits: Any
):
    """Places kept by I'-S-I."""
    first, last = steps
    n = q.shape[1]
    rows = list(range(n))
    if similar:
        guide = importance(page_rank(q, k, first, start(n)), prefix, limits)
        order = sorted(range(prefix, n), key=lambda i: (-float(guide[i]), i))
        half = math.ceil(len(order) / 2)
        keys = k.double().mean(0)
        best = {a: max(oracles.cosine(keys[a], keys[b]) for b in order[:half]) for a in order[half:]}
        gone = sorted(best, key=lambda a: (-best[a], a))[:similar]
        rows = [i for i in rows if i not in gone]
    q, k = q[:, rows], k[:, rows]
    score = importance(page_rank(q, k, last, start(len(rows))), prefix, limits)
    best_rows = sorted(range(prefix, len(rows)), key=lambda i: (-float(score[i]), i))[:left]
    return [*range(prefix), *(rows[i] for i in sorted(best_rows))]


# -- ToMe --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [9, 24])
def test_tome_equals_its_oracle(prefix: int, n: int) -> None:
    metric, x, size = torch.randn(3, n + prefix, 6), torch.randn(3, n + prefix, 4), torch.rand(3, n + prefix) + 0.5
    method = vtprune.create("tome", r=1)
    for r in range(1, n // 2 + 1):
        step = method.reduce(Tokens(x, prefix, size, {"mean_keys": metric}), n - r)
        out, sizes = step.apply(x), step.resize(size)
        for b in range(3):
            groups = tome(metric[b], prefix, r)
            assert step.index[b].tolist() == [g[0] for g in groups]
            assert pairs_of(step, b) == [set(g) for g in groups]
            for m, group in enumerate(groups):
                weight = size[b, group].double()
                expected = (x[b, group].double() * weight[:, None]).sum(0) / weight.sum()
                torch.testing.assert_close(out[b, m].double(), expected, **EXACT)
                torch.testing.assert_close(sizes[b, m].double(), weight.sum(), **EXACT)
            slots = step.slots(n + prefix)[b]
            assert all(slots[i] == m for m, group in enumerate(groups) for i in group)


@pytest.mark.parametrize("left", [1, 2, 5, 9])
def test_tome_in_several_rounds(left: int) -> None:
    """More than half at once: every round on the weighted means of the round before."""
    n, prefix = 20, 1
    metric, x, size = torch.randn(2, n + prefix, 6), torch.randn(2, n + prefix, 4), torch.rand(2, n + prefix) + 0.5
    step = vtprune.create("tome", r=1).reduce(Tokens(x, prefix, size, {"mean_keys": metric}), left)
    m, s, groups = metric, size, [[{i} for i in range(n + prefix)] for _ in range(2)]
    while m.shape[1] - prefix > left:
        now = m.shape[1] - prefix
        one = match(m, s, prefix, min(now - left, now // 2))
        groups = [[set().union(*(g[i] for i in part)) for part in pairs_of(one, b)] for b, g in enumerate(groups)]
        m, s = one.apply(m), one.resize(s)
    assert [pairs_of(step, b) for b in range(2)] == groups
    torch.testing.assert_close(step.resize(size), s)
    for b in range(2):
        for row, group in enumerate(groups[b]):
            at = sorted(group)
            expected = (x[b, at] * size[b, at, None]).sum(0) / size[b, at].sum()
            torch.testing.assert_close(step.apply(x)[b, row], expected, **EXACT)


def test_equal_similarities_go_to_the_lower_place() -> None:
    metric = torch.ones(1, 9, 3)
    step = match(metric, torch.ones(1, 9), 1, 2)
    assert step.src.tolist() == [[2, 4]]
    assert step.index.tolist() == [[0, 6, 8, 1, 3, 5, 7]]
    assert step.dst.tolist() == [[3, 3]]
    zero = match(torch.zeros(1, 6, 3), torch.ones(1, 6), 0, 1)
    assert zero.apply(torch.randn(1, 6, 2)).isfinite().all(), "a zero vector is similar to nothing"


def test_schedules_of_r() -> None:
    assert per_block(13, 3) == [13, 13, 13]
    assert per_block((16, -1.0), 6) == [32, 25, 19, 12, 6, 0]
    assert per_block((10, 1.0), 6) == [0, 4, 8, 12, 16, 20]
    assert per_block((5, -1.0), 1) == [10]
    assert per_block([5, 0, 3], 5) == [5, 0, 3, 0, 0]
    method = vtprune.create("tome", r=(16, -1))
    assert method.counts(196, 6, None)[0] == 164
    assert vtprune.create("tome", r=[16, 1]).counts(196, 3, None) == [180, 179, 179], "a list of two is no slope"
    assert vtprune.create("tome", r=99).counts(49, 2, None) == [25, 13], "at most half of the patches in a block"
    for bad in (-1, [3, -1], (4, 2.0), True):
        with pytest.raises(ValueError, match=r"r="):
            vtprune.create("tome", r=bad)
    with pytest.raises(ValueError, match="choose 'weighted' or 'plain'"):
        vtprune.create("tome", r=3, pooling="max")


@pytest.mark.no_cover
@pytest.mark.slow
def test_a_merge_step_is_four_times_as_fast_as_the_scatter_form() -> None:
    """B = 16, N = 197, C = 384, one thread; the row of matching and merging together stands beside it."""
    merging, whole = bench_kernels.tome_against_scatter()
    print(f"merging {merging['speedup']:.1f}x, with matching {whole['speedup']:.1f}x")
    assert merging["same"]
    assert whole["same"]
    assert merging["speedup"] >= 4


# -- DiffRate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_diffrate_equals_its_oracle(prefix: int) -> None:
    n, left = 15, 6
    x, size, row = torch.randn(2, n + prefix, 5), torch.rand(2, n + prefix) + 0.5, torch.rand(2, n + prefix)
    method = vtprune.create("diffrate")
    step = method.reduce(Tokens(x, prefix, size, {"attention": row}), left)
    out, sizes = step.apply(x), step.resize(size)
    for b in range(2):
        order = [prefix + i for i in oracles.top(row[b, prefix:], n)]
        pruned_to = n - (n - left) // 2
        kept, sources = sorted(order[:left]), order[left:pruned_to]
        rows = x[b].double()
        groups = {p: [(p, 1.0)] for p in (*range(prefix), *kept)}
        for s in sources:
            g, to = max((oracles.cosine(rows[s], rows[d]), -d) for d in kept)
            groups[-to].append((s, g))
        assert step.index[b].tolist() == list(groups)
        for m, members in enumerate(groups.values()):
            torch.testing.assert_close(out[b, m].double(), torch.stack([rows[i] for i, _ in members]).mean(0), **EXACT)
            total = sum(g * float(size[b, i]) for i, g in members)
            assert float(sizes[b, m]) == pytest.approx(max(total, 1e-3), rel=1e-4)


def test_diffrate_sizes_stay_positive() -> None:
    """A source that points away takes from its destination's size, but log of it must exist."""
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.01], [-1.0, 0.0]]])
    size = torch.tensor([[1.0, 2.0, 1.0]])
    row = torch.tensor([[3.0, 2.0, 1.0]])
    method = vtprune.create("diffrate")
    step = method.reduce(Tokens(x, 0, size, {"attention": row}), 1)
    assert step.src.tolist() == [[1]]
    torch.testing.assert_close(step.resize(size), torch.tensor([[1e-3]]))


def test_diffrate_counts() -> None:
    lists = {"prune": [197, 150, 120], "merge": [190, 160, 110]}
    method = vtprune.create("diffrate", **lists)
    assert method.counts(196, 3, None) == [189, 149, 109], "a count above what is there does nothing"
    assert method.counts(49, 3, None) == [47, 37, 27], "in proportion"
    for bad in ({"prune": [5]}, {"prune": [5], "merge": [4, 3]}, {"prune": [5, 1], "merge": [4, 3]}):
        with pytest.raises(ValueError, match="diffrate: prune"):
            vtprune.create("diffrate", **bad)
    with pytest.raises(ValueError, match=r"leave out keep=0\.5"):
        method.counts(196, 3, 0.5)


# -- Zero-TPrune -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("similar", [0, 3])
@pytest.mark.parametrize("cls_start", ["uniform", "sqrt_n"])
@pytest.mark.parametrize("limits", [None, (0.01, 0.7)])
def test_zero_tprune_equals_its_oracle(prefix: int, similar: int, cls_start: str, limits: Any) -> None:
    """By default all heads count; with the published limits those that vary neither too little nor too much."""
    n, left, heads, d = 17, 8, 3, 4
    q, k = 2 * torch.randn(2, heads, n + prefix, d), 2 * torch.randn(2, heads, n + prefix, d)
    options: dict[str, Any] = {} if limits is None else dict(zip(("v_min", "v_max"), limits))
    options |= {"similar": similar / (n - left) + 1e-6, "cls_start": cls_start, "steps": (7, 7, 7)}
    method = vtprune.create("zero_tprune", **options)
    x = torch.zeros(2, n + prefix, 1)
    tokens = Tokens(x, prefix, None, {"queries": q, "keys": k}, has_cls=prefix > 0, scaling=d**-0.5)
    step = method.reduce(tokens, left)

    def start(count: int) -> Tensor:
        score = torch.ones(count, dtype=torch.float64)
        if prefix and cls_start == "sqrt_n":
            score[0] = math.sqrt(count)
        return score / score.sum()

    for b in range(2):
        wanted = zero_tprune(q[b], k[b], prefix, left, similar, start, (1, 7), limits or (0.0, math.inf))
        assert step.index[b].tolist() == wanted
    assert "heads_passed" in step.stats


def test_zero_tprune_steps_by_depth() -> None:
    method = vtprune.create("zero_tprune", steps=(30, 5, 1))
    x = torch.zeros(1, 3, 1)
    assert [method._steps(Tokens(x, block=(k, 12))) for k in (0, 2, 3, 8, 9, 11)] == [30, 30, 5, 5, 1, 1]
    for bad in ({"similar": 2.0}, {"scale": "x"}, {"cls_start": "x"}, {"at": ()}, {"at": (1.5,)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            vtprune.create("zero_tprune", **bad)


@pytest.mark.parametrize("name", ["topk_cls", "zero_tprune"])
@pytest.mark.parametrize("at", [(0.5,), (0.25, 0.5, 0.75), (0.0, 0.3, 0.3, 0.9)])
def test_places_mean_the_same_inside_a_vlm(name: str, at: tuple[float, ...]) -> None:
    """A stage is asked block by block and sees what is left; it drops where a plain ViT drops."""
    method: Any = vtprune.create(name, at=at)
    for n, goal, depth in ((196, 49, 12), (64, 7, 5), (10, 10, 4), (9, 1, 1)):
        now, left = n, []
        for k in range(depth):
            now = method.due(Visual(torch.zeros(now, 1), min(goal, now), block=(k, depth - 1)))
            left.append(now)
        whole = method.counts(n, depth, goal)
        assert [a == b for a, b in zip([n, *left], left)][:-1] == [a == b for a, b in zip([n, *whole], whole)][:-1]
        assert all(abs(a - b) <= 1 for a, b in zip(left[:-1], whole)), "a share of what is left is rounded each time"
        assert left[-1] == goal


def test_counts_for_plain_vits_are_refused_inside_a_vlm() -> None:
    unit = Visual(torch.zeros(8, 2), 4, block=(1, 3))
    with pytest.raises(ValueError, match=r"r=2 and a budget of 4"):
        vtprune.create("tome", r=2).due(unit)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="give keep in a VLM's tower"):
        vtprune.create("diffrate", prune=(9, 9), merge=(8, 8)).due(unit)  # type: ignore[attr-defined]


def test_steps_along_the_depth() -> None:
    assert stepwise(196, 67, 12, (0.25, 0.5, 0.75)) == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3
    assert stepwise(10, 10, 3, (0.5,)) == [10, 10, 10]
    assert stepwise(7, 1, 1, (0.0, 0.5, 1.0)) == [1]
    for n, goal, depth in ((5, 1, 4), (100, 3, 24), (2, 2, 1)):
        left = stepwise(n, goal, depth, (0.1, 0.4, 0.4, 1.0))
        assert left == sorted(left, reverse=True)
        assert left[-1] == goal


# -- Token Transforming ------------------------------------------------------------------------------------------------


def test_token_transforming_equals_its_oracle() -> None:
    n, prefix, left = 12, 1, 5
    x, keys, row = torch.randn(1, n + prefix, 4), torch.randn(1, n + prefix, 6), torch.rand(1, n + prefix)
    size = torch.rand(1, n + prefix) + 0.5
    method = vtprune.create("token_transforming", temperature=0.3, threshold=0.4)
    step = method.reduce(Tokens(x, prefix, size, {"attention": row, "mean_keys": keys}), left)
    anchors = sorted(prefix + i for i in oracles.top(row[0, prefix:], left))
    assert step.index[0].tolist() == [0, *anchors]
    w = torch.zeros(1 + left, n + prefix, dtype=torch.float64)
    for j in range(n + prefix):
        if j == 0 or j in anchors:
            w[[0, *anchors].index(j), j] = 1
            continue
        share = [math.exp(oracles.cosine(keys[0, a].double(), keys[0, j].double()) / 0.3) for a in anchors]
        share = [s if s >= 0.4 * max(share) else 0.0 for s in share]
        w[1:, j] = torch.tensor(share, dtype=torch.float64) / sum(share)
    assert int((w > 0).sum()) > n + prefix, "some token feeds several"
    mass = (w * size[0]).sum(1)
    expected = (w * size[0] / mass[:, None]) @ x[0].double()
    torch.testing.assert_close(step.apply(x)[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.resize(size)[0].double(), mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.resize(size).sum(), size.sum())


def test_merging_and_pruning_are_special_cases() -> None:
    x, keys, row = torch.randn(2, 11, 4), torch.randn(2, 11, 6), torch.rand(2, 11)
    size = torch.rand(2, 11) + 0.5
    tokens = Tokens(x, 1, size, {"attention": row, "mean_keys": keys})
    for name, one_hot in (("topk_cls", True), ("tome", False)):
        step = vtprune.create(name).reduce(tokens, 6)
        w = step.dense(11)
        torch.testing.assert_close(w @ x, step.apply(x))
        torch.testing.assert_close(w.sum(-1), torch.ones(2, 7))
        assert int((w > 0).sum(1).max()) == 1, "no token feeds two"
        assert bool(((w > 0).sum(2) == 1).all()) == one_hot
    nearest = vtprune.create("token_transforming", threshold=1.0).reduce(tokens, 6)
    assert int((nearest.matrix > 0).sum(1).max()) == 1, "threshold 1 is merging into the nearest anchor"


# -- as methods of one unit --------------------------------------------------------------------------------------------


def test_a_unit_in_a_tower_shrinks_block_by_block_with_its_sizes() -> None:
    method = vtprune.create("tome")
    state: dict[str, Any] = {}
    x, n = torch.randn(16, 4), 16
    counts = []
    for k in (1, 2, 3):
        signals = {method.needs[0]: torch.randn(len(x), 6)}
        answer = method(Visual(x, 4, signals=signals, state=state, block=(k, 3)))
        x = answer.apply(x)
        counts.append(len(x))
        if k < 3:
            assert float(state["size"].sum()) == pytest.approx(n)
            assert state["size"].shape == (len(x),)
    assert counts == [12, 8, 4]
    assert vtprune.create("tome", r=3).due(Visual(x, None, block=(1, 3))) == 4 - 2


# -- state-space models ------------------------------------------------------------------------------------------------


def test_scans_equal_the_recurrence() -> None:
    u, delta, a = torch.randn(2, 3, 9), torch.randn(2, 3, 9), -torch.rand(3, 4)
    b, c, d, bias = torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.randn(3), torch.randn(3)
    kept = torch.tensor([[1, 2, 5, 8], [0, 3, 4, 6]])
    for aligned in (True, False):
        y, last = ssm_keep.scan(u, delta, a, b, c, d, bias, kept, aligned=aligned)
        for i in range(2):
            state = torch.zeros(3, 4, dtype=torch.float64)
            out = []
            for t in range(9):
                here = t in kept[i].tolist()
                if not here and not aligned:
                    continue
                step = torch.nn.functional.softplus(delta[i, :, t].double() + bias.double())
                state = (step[:, None] * a.double()).exp() * state
                if here:
                    state = state + (step * u[i, :, t].double())[:, None] * b[i, :, t].double()
                    out.append(state @ c[i, :, t].double() + d.double() * u[i, :, t].double())
            torch.testing.assert_close(y[i].double(), torch.stack(out, 1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(last[i].double(), state, rtol=1e-4, atol=1e-5)


def test_kept_tokens_of_a_scan() -> None:
    scores = torch.randn(3, 21)
    kept = ssm_keep.keep(scores, 0.6, cls=10)
    for b in range(3):
        best = [i for i in oracles.top(scores[b], 21) if i != 10][:12]
        assert kept[b].tolist() == [*sorted(best)[:6], 10, *sorted(best)[6:]]
    assert ssm_keep.keep(scores, 0.6)[0].tolist() == sorted(oracles.top(scores[0], 13))
    assert ssm_keep.keep(scores, 1.0, cls=10)[0].sort().values.tolist() == list(range(21))
    rank = torch.arange(20, -1, -1)
    assert ssm_keep.in_direction(kept, rank)[0].tolist() == sorted(kept[0].tolist(), reverse=True)
    for bad in ({"ratio": 0.0}, {"ratio": 0.5, "cls": 21}):
        with pytest.raises(ValueError, match=f"{list(bad)[-1]}="):
            ssm_keep.keep(scores, **bad)
