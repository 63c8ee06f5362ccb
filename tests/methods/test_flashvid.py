"""FlashVID against a slow restatement in Python lists, both ways of every official defect, and degenerate clips."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import pytest
import torch
from oracles import cosine
from torch import Tensor

import vtprune
from vtprune import Visual
from vtprune.core.method import spread
from vtprune.methods.in_llm.flashvid_inner import LAST_ROW
from vtprune.methods.video.flashvid import RECEIVED

DIGITS = 6  # of a cosine that float32 knows


def clip(t: int, p: int, seed: int = 0, d: int = 6) -> tuple[Tensor, Tensor]:
    """x [T, P, D]: a scene that stands still but for noise and changes in the middle; attention received [T, P]."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, p, d, generator=g) + 0.5
    x = scenes[torch.arange(t) * 2 // max(2, t)] + 0.25 * torch.randn(t, p, d, generator=g)
    return x, torch.rand(t, p, generator=g) + 0.05


def unit(x: Tensor, seen: Tensor, budget: int | None) -> Visual:
    t, p, _ = x.shape
    return Visual(x.flatten(0, 1), budget, grid=(t, 1, p), signals={RECEIVED: seen.flatten()})


def segments(x: Tensor, threshold: float, least: int | None) -> list[list[int]]:
    """Frames of each segment: cut where the means of neighbours are unlike, then at the lowest of the others."""
    frames = x.double().mean(1)
    like = [cosine(a, b) for a, b in zip(frames[1:], frames)]
    cuts = {i for i, c in enumerate(like) if c < threshold} if least else set()
    rest = sorted((i for i in range(len(like)) if i not in cuts), key=lambda i: (round(like[i], DIGITS), i))
    cuts |= set(rest[: max(0, (least or 0) - 1 - len(cuts))])
    number, numbers = 0, [0]
    for i in range(len(like)):
        number += i in cuts
        numbers.append(number)
    return [[i for i, _ in group] for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1])]


def salient(x: Tensor, seen: Tensor, frames: list[int], f: int, k: int, rule: str) -> list[int]:
    """The k picks of frame f, in its segment."""
    rows, p = x[f].double(), x.shape[1]
    weight = seen[f].double().tolist()
    if rule == "attn":
        return sorted(sorted(range(p), key=lambda j: (-weight[j], j))[:k])
    if rule == "div":
        weight = [1.0] * p
    if rule == "attn_div_v2":
        means = [x[c].double().mean(0) for c in frames]
        weight = [w * sum(float(row @ mean) for mean in means) / len(means) for w, row in zip(weight, rows)]
    far = [[(1 - cosine(a, b)) * weight[j] for j, b in enumerate(rows)] for a in rows]
    alone = [min((far[i][j] for i in range(p) if i != j), default=0) for j in range(p)]
    picks = [max(range(p), key=lambda j: (alone[j], -j))] if k else []
    while len(picks) < k:
        picks.append(max(set(range(p)) - set(picks), key=lambda j: (min(far[i][j] for i in picks), -j)))
    return sorted(picks)


def peaks(rows: list[Tensor], count: int) -> tuple[list[int], list[int]]:
    """Centres, and the centre of every row; the lower index wins among equals."""
    n, k = len(rows), min(count, 7)
    far = [[float((a - b).square().mean().sqrt()) for b in rows] for a in rows]
    near = [sum(sorted(round(d, 9) ** 2 for d in row)[:k]) / k for row in far]  # the density is exp(-this)
    density = [(-round(d, 9), -i) for i, d in enumerate(near)]
    most = max(map(max, far))
    reach = [min([far[i][j] for j in range(n) if density[j] > density[i]] or [most]) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-math.exp(-near[i]) * reach[i], i))[:count]
    return centres, [i if i in centres else min(sorted(centres), key=lambda c: (far[i][c], c)) for i in range(n)]


def by_hand(
    x: Tensor, seen: Tensor, budget: int | None, **options: Any
) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]]:
    """(place, token) of the salient tokens, and of the means of clusters, which may share places as officially."""
    o = {"ratio": 0.1, "expansion": 1.25, "alpha": 0.7, "tau": 0.8, "threshold": 0.9, "segments": 8}
    o |= {"salient": "attn_div_v2", "counts": "all", "single": "rest", **options}
    t, p, rows = len(x), x.shape[1], x.double()
    found = segments(x, o["threshold"], o["segments"])
    if budget is None:
        kept = min(p, math.ceil(p * o["ratio"] * o["expansion"] - 1e-9))
        each = [math.ceil(kept * o["alpha"] - 1e-9)] * t
        others = [(kept - each[0]) * len(frames) for frames in found]
    else:
        whole = math.ceil(budget * o["alpha"] - 1e-9)
        each = [(f + 1) * whole // t - f * whole // t for f in range(t)]
        others = list(spread(budget - whole, [len(frames) * p - sum(each[f] for f in frames) for frames in found]))
    stay, merged = [], []
    for frames, other in zip(found, others):
        picked = {f: salient(x, seen, frames, f, each[f], o["salient"]) for f in frames}
        stay += [(f * p + i, rows[f, i]) for f in frames for i in picked[f]]
        best: dict[tuple[int, int], tuple[float, int]] = {}
        for f in frames[1:]:
            for i in range(p):
                like = [-1.0 if j in picked[f - 1] else cosine(rows[f, i], rows[f - 1, j]) for j in range(p)]
                j = max(range(p), key=lambda j: (like[j], -j))
                best[f, i] = (-1.0 if i in picked[f] else like[j], j)
        want = sum(each[f] for f in frames) + other
        bar = o["tau"]
        if len(frames) * p - sum(c > bar for c, _ in best.values()) < want:
            ranked = sorted([c for c, _ in best.values()] + [-1.0] * p, reverse=True)
            most = len(frames) * p - want
            bar = ranked[most - 1] if most else math.inf
        links = {place: j for place, (c, j) in best.items() if c > bar}
        total = {(f, i): rows[f, i].clone() for f in frames for i in range(p)}
        size, children = dict.fromkeys(total, 1), dict.fromkeys(total, 1)
        for f, i in sorted(links, reverse=True):  # from the last frame to the first
            above = (f - 1, links[f, i])
            total[above] += total[f, i]
            size[above] += size[f, i]
            children[above] += 1
        count = size if o["counts"] == "all" else children
        begins = {f: [i for i in range(p) if (f, i) not in links and i not in picked[f]] for f in frames}
        if o["single"] == "whole" and len(frames) == 1:
            begins[frames[0]] = list(range(p))
        sizes = [len(begins[f]) for f in frames]
        if budget is None:
            number = [math.ceil(s * min(1.0, other / max(1, sum(sizes)))) for s in sizes]
        else:
            number = list(spread(other, sizes))
        for f, clusters in zip(frames, number):
            if not clusters:
                continue
            trees = [total[f, i] / count[f, i] for i in begins[f]]
            centres, member = peaks(trees, clusters)
            for c in centres:
                mean = torch.stack([tree for tree, m in zip(trees, member) if m == c]).mean(0)
                merged.append((f * p + begins[f][c], mean))
    return stay, merged


def compare(x: Tensor, seen: Tensor, budget: int | None, **options: Any) -> int:
    """Same places and tokens; how many clusters stand where a salient token stands officially."""
    method: Any = vtprune.create("flashvid", **options)
    answer = method(unit(x, seen, budget))
    idx, features = answer.idx.tolist(), answer.apply(x.flatten(0, 1)).double()
    assert idx == sorted(set(idx))
    stay, merged = by_hand(x, seen, budget, **options)
    assert len(idx) == len(stay) + len(merged) == (budget or len(idx))
    taken = {place for place, _ in stay}
    clashes = [(place, row) for place, row in merged if place in taken]
    ours = dict(zip(idx, features))
    for place, row in [*stay, *((place, row) for place, row in merged if place not in taken)]:
        torch.testing.assert_close(ours.pop(place), row, rtol=1e-4, atol=1e-5)
    for place, row in clashes:  # moved within their frame
        near = [
            i
            for i, x in ours.items()
            if i // len(seen[0]) == place // len(seen[0]) and torch.allclose(x, row, atol=1e-5)
        ]
        ours.pop(near[0])
    assert not ours
    return len(clashes)


@pytest.mark.parametrize("rule", ["attn_div", "attn_div_v2", "div", "attn"])
@pytest.mark.parametrize(("t", "p"), [(6, 9), (5, 13)])
def test_official_counts(t: int, p: int, rule: str) -> None:
    for seed, ratio in enumerate((0.2, 0.45)):
        x, seen = clip(t, p, seed)
        for segments, counts in ((2, "all"), (None, "direct"), (3, "direct")):
            compare(x, seen, None, ratio=ratio, salient=rule, segments=segments, counts=counts)


@pytest.mark.parametrize(("t", "p"), [(1, 7), (2, 5), (5, 9), (7, 4)])
def test_exact_budgets(t: int, p: int) -> None:
    """Also fewer tokens than frames, and all but one."""
    x, seen = clip(t, p, t)
    for budget in sorted({1, 2, max(1, t - 1), t, t * p // 3, t * p // 2, t * p - 1}):
        for segments in (1, 2, 8):
            compare(x, seen, budget, segments=segments)


def test_segments_of_one_frame_both_ways() -> None:
    """Officially the whole frame is clustered again, so that a place may come out twice."""
    x, seen = clip(6, 12, 3)
    assert compare(x, seen, None, ratio=0.4, alpha=0.5, segments=6) == 0
    assert compare(x, seen, None, ratio=0.4, alpha=0.5, segments=6, single="whole") > 0
    compare(x, seen, 30, segments=6, single="whole")


def test_a_chain_of_equal_tokens_both_ways() -> None:
    """The official count is of direct children, so that a place that stands still for 3 frames grows by one half."""
    x, seen = clip(1, 6, 1)
    x, seen = x.expand(3, -1, -1).contiguous(), seen.expand(3, -1).contiguous()
    for counts, growth in (("all", 1.0), ("direct", 1.5)):
        method: Any = vtprune.create("flashvid", segments=None, alpha=0.0, tau=0.9999, counts=counts)
        answer = method(unit(x, seen, 6))
        torch.testing.assert_close(answer.apply(x.flatten(0, 1)), growth * x[0])


def test_degenerate_clips() -> None:
    """One frame, one token a frame, equal tokens, zero tokens and attention: the budget stays, and nothing twice."""
    for t, p in ((1, 1), (1, 6), (6, 1), (3, 4)):
        x, seen = clip(t, p)
        for tokens, looks in (
            (x, seen),
            (torch.ones_like(x), seen),
            (torch.zeros_like(x), torch.zeros_like(seen)),
            (-x, seen),
        ):
            for options in ({}, {"single": "whole", "counts": "direct"}, {"alpha": 0.0}, {"alpha": 1.0}, {"tau": 1.0}):
                method: Any = vtprune.create("flashvid", **options)
                for budget in range(1, t * p + 1):
                    answer = method(unit(tokens, looks, budget))
                    assert len(answer.idx.unique()) == len(answer.idx) == budget
                    assert bool(answer.apply(tokens.flatten(0, 1)).isfinite().all())
                assert len(method(unit(tokens, looks, None)).idx) >= t


def test_merged_tokens_are_means() -> None:
    """The weights of every token that stays add up to one."""
    x, seen = clip(6, 10, 2)
    answer = vtprune.create("flashvid", segments=2)(unit(x, seen, 20))
    assert answer.dst is not None
    assert answer.w is not None
    total = torch.zeros(20).index_add(0, answer.dst, answer.w)
    torch.testing.assert_close(total, torch.ones(20))


def test_both_stages() -> None:
    first, second = vtprune.create("flashvid").stages(0.2, 28)
    assert (first.where, first.keep, first.newlines) == ("llm", 0.2, "keep")
    assert (second.where, second.method.name, second.keep) == (20, "flashvid_inner", None)
    assert len(vtprune.create("flashvid").stages(1.0, 28)) == 1
    assert len(vtprune.create("flashvid", inner=False).stages(0.2, 28)) == 1


@pytest.mark.parametrize(("n", "count"), [(1, 1), (10, 3), (11, 4), (64, 20)])
def test_the_second_stage(n: int, count: int) -> None:
    """The ceil(0.3 n) tokens that the last one looks at most; ties go to the lower index."""
    row = (torch.arange(n) * 7 % 5).float()
    inner: Any = vtprune.create("flashvid_inner")
    for budget, kept in ((None, count), (n, n), (1, 1)):
        answer = inner(Visual(torch.zeros(n, 2), budget, signals={LAST_ROW: row}))
        assert answer.idx.tolist() == sorted(sorted(range(n), key=lambda i: (-row[i].item(), i))[:kept])
    assert [s.where for s in vtprune.create("flashvid_inner", layer=5).stages(None, 8)] == [5]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("flashvid", {"ratio": 0.0}, ValueError, "ratio=0.0"),
        ("flashvid", {"alpha": 1.5}, ValueError, "alpha=1.5"),
        ("flashvid", {"tau": 2.0}, ValueError, "tau=2.0"),
        ("flashvid", {"segments": 0}, ValueError, "segments=0"),
        ("flashvid", {"expansion": 0.0}, ValueError, "expansion=0.0"),
        ("flashvid", {"salient": "v1"}, ValueError, "salient='v1': choose 'attn_div'"),
        ("flashvid", {"counts": "none"}, ValueError, "counts='none'"),
        ("flashvid", {"single": "twice"}, ValueError, "single='twice'"),
        ("flashvid_inner", {"share": 0.0}, ValueError, "share=0.0"),
        ("flashvid_inner", {"layer": 0}, ValueError, "layer=0"),
        ("flashvid_inner", {"layer": "20"}, TypeError, "layer='20'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtprune.create(name, **options)
