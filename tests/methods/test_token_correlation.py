"""Token correlation against a slow restatement in float64; crops of every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from oracles import cosine, top
from torch import Tensor

import vtprune
from vtprune import Signal, Span, Visual
from vtprune.methods.crops import crops
from vtprune.methods.pre_llm import token_correlation

CLS, KEYS = Signal("cls", None), Signal("keys", None)
RECEIVED = Signal("received", None, without_cls=True)
# An overview of 3 x 4, one separator, and a mosaic of 2 x 3 tiles of unequal size with a newline after each row.
MOSAIC = (Span(0, (1, 3, 4)), Span(13, (1, 5, 7), newline=True, tiles=((3, 2), (3, 3, 1))))
SIZE = 13 + 5 * 8


def members(v: Visual) -> tuple[list[list[int]], list[int]]:
    """Tokens of every crop, and those of none, from the layout's own words."""
    found: list[list[int]] = []
    for span in v.spans or (Span(0, v.grid or (1, 1, v.n)),):
        t, h, w = span.grid
        heights, widths = span.tiles or ((h,), (w,))
        for frame in range(t):
            for i, height in enumerate(heights):
                for j, width in enumerate(widths):
                    top_left = sum(heights[:i]), sum(widths[:j])
                    found.append(
                        [
                            span.start + (frame * h + r) * (w + span.newline) + c
                            for r in range(top_left[0], top_left[0] + height)
                            for c in range(top_left[1], top_left[1] + width)
                        ]
                    )
    return found, sorted(set(range(v.n)) - {i for crop in found for i in crop})


def restated(v: Visual, theta: float, m: int, gamma: float = 1.0, n_min: int = 1) -> list[int]:
    """https://arxiv.org/abs/2407.14439 as we read it; kept tokens, ascending."""
    keys, scores = v.signals[KEYS].double(), v.signals[CLS].double()
    inside, outside = members(v)
    turns, own = {}, []
    for crop in inside:
        alike = [sum(cosine(keys[i], keys[j]) > theta for j in crop if j != i) for i in crop]
        distinct = sum(count < m for count in alike)
        best = [crop[i] for i in top(scores[crop], len(crop))]
        own += best[: min(max(round(distinct * gamma), n_min), len(crop))]
        for rank, i in enumerate(best):
            floor = rank < n_min
            turns[i] = (not floor, rank if floor else 0, -distinct if floor else (rank + 0.5) / max(distinct, 1e-9), i)
    if v.budget is None:
        return sorted(own)
    return sorted((sorted(turns, key=lambda i: turns[i]) + outside)[: v.budget])


def unit(n: int, seed: int = 0, budget: int | None = None, **fields: Any) -> Visual:
    """Keys in a few directions, so that some crops repeat themselves."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(6, 8, generator=g)
    keys = directions[torch.randint(6, (n,), generator=g)] + 0.3 * torch.randn(n, 8, generator=g)
    keys[: n // 4] = directions[0] + 0.1 * torch.randn(n // 4, 8, generator=g)
    signals = {CLS: torch.rand(n, generator=g), KEYS: keys}
    return Visual(torch.randn(n, 4, generator=g), budget, **{"signals": signals, **fields})


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "mosaic": (SIZE, {"spans": MOSAIC}),
    "video": (60, {"grid": (4, 3, 5), "spans": (Span(0, (4, 3, 5)),)}),
    "tiles": (27, {"spans": tuple(Span(i, (1, 3, 3)) for i in range(0, 27, 9))}),
    "line": (20, {}),
    "one": (1, {"grid": (1, 1, 1)}),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def laid_out(layout: str, budget: int | None, seed: int = 0) -> Visual:
    n, fields = LAYOUTS[layout]
    return unit(n, seed, budget, **fields)


@every_layout
def test_crops(layout: str) -> None:
    number, sizes = crops(laid_out(layout, None))
    inside, outside = members(laid_out(layout, None))
    assert [(number == i).nonzero().flatten().tolist() for i in range(len(sizes))] == [*inside, outside]
    assert sizes == [len(crop) for crop in (*inside, outside)]


@every_layout
@pytest.mark.parametrize("options", [{}, {"theta": 0.5, "m": 2}, {"theta": 0.0, "m": 1}, {"m": 3, "n_min": 2}])
def test_every_budget(layout: str, options: dict[str, Any]) -> None:
    method = vtprune.create("token_correlation", **options)
    for budget in {*range(1, LAYOUTS[layout][0], 4), LAYOUTS[layout][0]}:
        v = laid_out(layout, budget, seed=budget % 3)
        assert method(v).idx.tolist() == restated(v, method.theta, method.m, n_min=method.n_min)


@every_layout
@pytest.mark.parametrize("gamma", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("n_min", [1, 3])
def test_adaptive(layout: str, gamma: float, n_min: int) -> None:
    method = vtprune.create("token_correlation", m=3, gamma=gamma, n_min=n_min)
    for seed in range(3):
        v = laid_out(layout, None, seed)
        assert method(v).idx.tolist() == restated(v, 0.8, 3, gamma, n_min)


def test_dense_crops_keep_more() -> None:
    """Of two crops, one a flat colour: at any budget past the first tokens the other keeps the lion's share."""
    spans = (Span(0, (1, 8, 8)), Span(64, (1, 8, 8)))
    keys = torch.randn(128, 32)
    keys[:60] = keys[0] + 0.01 * keys[:60]
    v = Visual(torch.randn(128, 4), 34, spans=spans, signals={CLS: torch.rand(128), KEYS: keys})
    kept = vtprune.create("token_correlation")(v).idx
    assert int((kept < 64).sum()) == 2
    assert int((kept >= 64).sum()) == 32


def test_fewer_tokens_than_crops_go_to_the_densest() -> None:
    keys = torch.randn(27, 16)
    keys[:9] = keys[0]
    keys[9:15] = keys[9]
    v = unit(27, spans=LAYOUTS["tiles"][1]["spans"])
    v = replace(v, budget=2, signals={**v.signals, KEYS: keys})
    assert [int(i) // 9 for i in vtprune.create("token_correlation", m=3)(v).idx] == [1, 2]


def test_newlines_stay_last() -> None:
    _, outside = members(laid_out("mosaic", None))
    method = vtprune.create("token_correlation")
    assert not set(method(laid_out("mosaic", None)).idx.tolist()) & set(outside)
    assert not set(method(laid_out("mosaic", SIZE - len(outside))).idx.tolist()) & set(outside)
    assert set(method(laid_out("mosaic", SIZE - 1)).idx.tolist()) > set(outside[:-1])


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_blocks_of_rows_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    v = laid_out("mosaic", 20)
    whole = vtprune.create("token_correlation", m=3)(v).idx
    monkeypatch.setattr(token_correlation, "ROWS", rows)
    assert torch.equal(vtprune.create("token_correlation", m=3)(v).idx, whole)


def test_equal_and_zero_keys() -> None:
    """All equal: every token redundant; all zero: none is like another. Every budget is still met."""
    for keys in (torch.ones(30, 4), torch.zeros(30, 4)):
        for budget in (1, 2, 15, 29):
            v = Visual(torch.randn(30, 4), budget, grid=(1, 5, 6), signals={CLS: torch.rand(30), KEYS: keys})
            assert vtprune.create("token_correlation")(v).idx.tolist() == sorted(top(v.signals[CLS], budget))


def test_samples_follow_the_attention_and_the_seed() -> None:
    scores = torch.cat([torch.full((10,), 0.09), torch.full((90,), 0.1 / 90)])
    v = Visual(torch.randn(100, 4), 5, signals={CLS: scores, KEYS: torch.randn(100, 64)})

    def kept(seed: int) -> Tensor:
        return vtprune.create("token_correlation", sample=seed)(v).idx

    assert torch.equal(kept(1), kept(1))
    draws = [kept(seed) for seed in range(200)]
    assert len({tuple(d.tolist()) for d in draws}) > 50
    assert all(len(d.unique()) == 5 for d in draws)
    share = float(torch.cat(draws).lt(10).float().mean())
    assert 0.75 < share < 0.95  # 5 draws without replacement: 0.85 (0.9 for the first, less for each further one)


def test_without_cls_token() -> None:
    v = laid_out("mosaic", 12)
    bare = replace(v, signals={RECEIVED: v.signals[CLS], KEYS: v.signals[KEYS]}, state={})
    method = vtprune.create("token_correlation")
    assert torch.equal(method(bare).idx, method(v).idx)
    assert "no CLS token" in bare.state["note"]
    with pytest.raises(vtprune.UnsupportedModel, match="fallback='received'"):
        vtprune.create("token_correlation", fallback="error")(bare)


@pytest.mark.parametrize(
    ("option", "value"),
    [("theta", 1.0), ("theta", -0.1), ("m", 0), ("n_min", 0), ("gamma", 0.0), ("gamma", float("nan")), ("layer", 1.5)],
)
def test_options(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option}={value}"):
        vtprune.create("token_correlation", **{option: value})


def test_says_whose_parameters_they_are() -> None:
    text = type(vtprune.create("token_correlation")).__doc__ or ""
    assert "Our parameterisation" in text
    assert "no official" in text


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_next_video-video"])
def test_in_a_model(family: str) -> None:
    """Tiles and frames reach the method as crops; the adaptive count of a batch equals that of its rows."""
    rows = (2, 1)
    model, batch = families.model(family), families.inputs(family, rows=rows)
    with vtprune.patch(model, "token_correlation", theta=0.3, m=2) as handle:
        model(**batch)
        last = handle.last
        assert last is not None
        kept = [u.idx.tolist() for u in last.units]
        crop_counts = [len(members(Visual(torch.empty(u.n, 1), None, spans=u.spans))[0]) for u in last.units]
        alone = []
        for row in range(2):
            model(**families.inputs(family, rows=rows, only=row))
            assert handle.last is not None
            alone += [u.idx.tolist() for u in handle.last.units]
    assert kept == alone
    assert min(crop_counts) > 2
