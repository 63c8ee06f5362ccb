"""GlobalCom2 against a restatement with Python lists, and its shares of crops in the hands of other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import vtprune
from vtprune import Signal, Span, UnsupportedModel, Visual
from vtprune.evals import parity

LOGITS, RECEIVED = Signal("cls_logits", -1), Signal("received", -1, without_cls=True)
SIDE, CELLS = 6, ((4, 4), (6, 6))  # two rows of crops with four rows of tokens left each, two columns of six
SPANS = (Span(0, (1, SIDE, SIDE)), Span(SIDE**2, (1, sum(CELLS[0]), sum(CELLS[1])), tiles=CELLS))
N = SIDE**2 + sum(CELLS[0]) * sum(CELLS[1])


def mosaic(budget: int | None, seed: int = 0, newline: bool = False, overview: int = 0) -> Visual:
    """An overview and 2 x 2 crops; a newline behind every row of the mosaic; the overview first or last."""
    g = torch.Generator().manual_seed(seed)
    h, w = sum(CELLS[0]), sum(CELLS[1])
    spans = SPANS if not newline else (SPANS[0], Span(SIDE**2, (1, h, w), newline=True, tiles=CELLS))
    n = N + h * newline
    if overview:
        spans = (Span(0, spans[1].grid, newline, CELLS), Span(n - SIDE**2, (1, SIDE, SIDE)))
    return Visual(
        torch.randn(n, 8, generator=g), budget, spans=spans, signals={LOGITS: torch.randn(n, generator=g) * 2 + 1}
    )


def crops_of(v: Visual) -> list[list[int]]:
    """Positions of the overview, then of every crop in raster order."""
    (one,) = (span for span in v.spans if not span.tiles)
    (many,) = (span for span in v.spans if span.tiles)
    stride = many.grid[2] + many.newline
    found = [list(range(one.start, one.start + SIDE**2))]
    for top, h in zip((0, CELLS[0][0]), CELLS[0]):
        for left, w in zip((0, CELLS[1][0]), CELLS[1]):
            found.append([many.start + (top + y) * stride + left + x for y in range(h) for x in range(w)])
    return found


def shares(row: Tensor, temperature: float) -> list[float]:
    raster = row.double().view(SIDE, SIDE)
    half = SIDE // 2
    sums = torch.stack([raster[a : a + half, b : b + half].sum() for a in (0, half) for b in (0, half)])
    return (1 + (sums / temperature).softmax(0) - 0.25).tolist()


def restated(v: Visual, ratio: float, temperature: float = 10.0) -> tuple[list[int], list[list[int]]]:
    """https://arxiv.org/abs/2501.05179: the overview by score, and every crop by position."""
    row, (own, *crops) = v.signals[LOGITS].double(), crops_of(v)
    overview = sorted(own, key=lambda i: (-float(row[i]), i))[: int(len(own) * ratio)]
    size = (sum(CELLS[0]), sum(CELLS[1]))
    seen = interpolate(row[own].view(1, 1, SIDE, SIDE), size, mode="bilinear", align_corners=False)[0, 0]
    cells = [cell.flatten() for band in seen.split(CELLS[0]) for cell in band.split(CELLS[1], 1)]
    kept = []
    for at, cell, share in zip(crops, cells, shares(row[own], temperature)):
        score = row[at] / row[at].norm() + cell / cell.norm()
        best = sorted(range(len(at)), key=lambda i: (-float(score[i]), i))
        kept.append(sorted(at[i] for i in best[: int(len(at) * min(1.0, ratio * share))]))
    return overview, kept


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("temperature", [10.0, 1.0])
@pytest.mark.parametrize("overview", [0, 1], ids=["overview first", "overview last"])
def test_equals_the_restatement(ratio: float, temperature: float, overview: int) -> None:
    v = mosaic(None, overview=overview)
    first, crops = restated(v, ratio, temperature)
    answer = vtprune.create("globalcom2", ratio=ratio, temperature=temperature)(v)
    assert answer.idx.tolist() == sorted([*first, *(i for crop in crops for i in crop)])
    assert answer.order is not None
    assert answer.order[: len(first)].tolist() == first


def test_a_budget_is_met_and_shared_like_the_ratio() -> None:
    for budget in (1, 5, 33, 90, N - 1):
        v = mosaic(budget)
        answer = vtprune.create("globalcom2")(v)
        assert len(answer.idx) == budget
    v = mosaic(60)
    answer = vtprune.create("globalcom2")(v)
    first, crops = restated(v, 60 / N)
    counts = [sum(i in set(part) for i in answer.idx.tolist()) for part in crops_of(v)]
    assert all(abs(count - len(part)) <= 1 for count, part in zip(counts, [first, *crops]))
    assert sum(counts) == 60


def test_what_a_crop_cannot_take_goes_to_the_others() -> None:
    """Nearly all of the softmax in one cell: its crop is full."""
    v = mosaic(80)
    row = v.signals[LOGITS].clone()
    row[: SIDE**2].view(SIDE, SIDE)[:3, :3] += 40
    v = Visual(v.x, 80, spans=v.spans, signals={LOGITS: row})
    answer = vtprune.create("globalcom2")(v)
    assert len(set(answer.idx.tolist())) == 80
    assert sum(i in set(crops_of(v)[1]) for i in answer.idx.tolist()) == 24


def test_the_official_order_counts_without_padding() -> None:
    """Crops are 6 wide, so nothing moves here; with 4 columns left of 6, the fifth token counts as in the first row."""
    v = mosaic(None)
    plain, official = (vtprune.create("globalcom2", order=order)(v) for order in ("positional", "official"))
    first, crops = restated(v, 0.25)
    assert official.order.tolist() == [*first, *sorted(i for crop in crops for i in crop)]
    assert torch.equal(official.apply(v.x), v.x[official.order])
    assert torch.equal(plain.apply(v.x), v.x[plain.idx])
    cells = ((6,), (4, 4))
    spans = (SPANS[0], Span(SIDE**2, (1, 6, 8), tiles=cells))
    n = SIDE**2 + 48
    narrow = Visual(torch.randn(n, 4), n, spans=spans, signals={LOGITS: torch.rand(n)})
    order = (vtprune.create("globalcom2", order="official")(narrow).order - SIDE**2).tolist()[SIDE**2 :]
    assert order[:8] == [0, 1, 2, 3, 8, 9, 4, 5]  # row 0 of the official grid: tokens 0..5 of both crops


def test_newlines_are_kept_beside_the_budget_or_come_last() -> None:
    v = mosaic(N, newline=True)
    assert vtprune.create("globalcom2").newlines == "keep"
    assert vtprune.create("globalcom2")(v).idx.tolist() == sorted(i for part in crops_of(v) for i in part)


@pytest.mark.parametrize("fields", [{}, {"grid": (1, 5, 6)}, {"spans": (Span(0, (3, 2, 5)),), "video": True}])
def test_without_crops_it_is_an_overview_alone(fields: dict[str, Any]) -> None:
    row = torch.rand(30, generator=torch.Generator().manual_seed(1))
    v = Visual(torch.randn(30, 4), 7, signals={LOGITS: row}, **fields)
    assert vtprune.create("globalcom2")(v).order.tolist() == row.argsort(descending=True)[:7].tolist()
    adaptive = Visual(v.x, None, signals={LOGITS: row}, **fields)
    assert len(vtprune.create("globalcom2", ratio=0.3)(adaptive).idx) == 9
    assert len(vtprune.create("globalcom2", ratio=0.001)(adaptive).idx) == 1


@pytest.mark.parametrize("budget", [None, 60])
def test_another_method_inside_the_crops(budget: int | None) -> None:
    v = mosaic(budget)
    answer = vtprune.create("globalcom2", inside="divprune")(v)
    counts = [sum(i in set(part) for i in vtprune.create("globalcom2")(v).idx.tolist()) for part in crops_of(v)]
    kept: list[int] = []
    for part, count in zip(crops_of(v), counts):
        kept += [part[i] for i in vtprune.create("divprune")(Visual(v.x[part], count)).idx.tolist()]
    assert answer.idx.tolist() == sorted(kept)
    assert sorted(answer.order.tolist()) == answer.idx.tolist()


def test_a_method_that_merges_inside_the_crops() -> None:
    v = mosaic(60)
    g = torch.Generator().manual_seed(3)
    signals = {need: torch.rand(*(N, 8)[: 1 + (need.kind == "mean_keys")], generator=g) for need in visionzip_needs()}
    v = Visual(v.x, 60, spans=v.spans, signals={**v.signals, **signals})
    answer = vtprune.create("globalcom2", inside="visionzip")(v)
    assert answer.merges
    out = answer.apply(v.x)
    for part in crops_of(v):
        own = {need: signal[part] for need, signal in signals.items()}
        at = torch.tensor([i for i, position in enumerate(answer.idx.tolist()) if position in set(part)])
        alone = vtprune.create("visionzip")(Visual(v.x[part], len(at), spans=grid_of(len(part)), signals=own))
        assert torch.allclose(out[at], alone.apply(v.x[part]))


def visionzip_needs() -> tuple[Signal, ...]:
    return vtprune.create("visionzip").needs


def grid_of(n: int) -> tuple[Span, ...]:
    return (Span(0, (1, n // 6, 6)),)


def test_what_the_method_inside_needs_and_reads() -> None:
    plain, text = vtprune.create("globalcom2"), vtprune.create("globalcom2", inside="cdpruner")
    assert (plain.reads_text, text.reads_text) == (False, True)
    assert set(vtprune.create("globalcom2", inside="visionzip").needs) >= {*plain.needs, *visionzip_needs()}
    assert plain.exact
    assert plain.trusted
    for name in ("fastv", "globalcom2"):
        with pytest.raises(ValueError, match=f"inside='{name}': name another method"):
            vtprune.create("globalcom2", inside=name)
    with pytest.raises(ValueError, match="nothing"):
        vtprune.create("globalcom2", inside="nothing")


def test_a_tower_without_a_cls_token() -> None:
    v = mosaic(50)
    received = v.signals[LOGITS].softmax(0)
    other = Visual(v.x, 50, spans=v.spans, signals={RECEIVED: received})
    centred = Visual(v.x, 50, spans=v.spans, signals={LOGITS: received.log() - received.log().mean()})
    assert torch.equal(vtprune.create("globalcom2")(other).idx, vtprune.create("globalcom2")(centred).idx)
    assert "no CLS token" in other.state["note"]
    with pytest.raises(UnsupportedModel):
        vtprune.create("globalcom2", fallback="error")(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio=0.0: use a share in \(0, 1\]"),
        ({"temperature": 0.0}, "temperature=0.0: use a finite number > 0"),
        ({"order": "raster"}, "order='raster': choose 'positional' or 'official'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create("globalcom2", **options)


def test_the_parity_case(tmp_path: Path) -> None:
    """Crops of 6 x 6 of which padding takes the outer two rows, as for an image of 300 x 200."""
    g = torch.Generator().manual_seed(2)
    x, row = torch.randn(5, 36, 4, generator=g).half().float(), torch.randn(5, 36, generator=g)
    valid = [slice(12, 36), slice(12, 36), slice(0, 24), slice(0, 24)]
    flat = [x[1 + i][part] for i, part in enumerate(valid)]
    logits = [row[1 + i][part] for i, part in enumerate(valid)]
    raster = [torch.cat([a.view(4, 6, -1), b.view(4, 6, -1)], 1) for a, b in ((flat[0], flat[1]), (flat[2], flat[3]))]
    tokens = torch.cat([x[0], torch.cat(raster).flatten(0, 1)])
    scores = [torch.cat([a.view(4, 6), b.view(4, 6)], 1) for a, b in ((logits[0], logits[1]), (logits[2], logits[3]))]
    v = Visual(tokens, None, spans=SPANS, signals={LOGITS: torch.cat([row[0], torch.cat(scores).flatten()])})
    first, crops = restated(v, 0.25)
    newline, features = torch.ones(4), [tokens[i] for i in first]
    for band in range(12):
        # Numbers among the valid tokens start at row 0 of each crop, so the last two rows of each are empty.
        y = band % 6 + 4 * (band // 6)
        if band % 6 < 4:
            here = sorted(i for crop in crops for i in crop if (i - 36) // 12 == y)
            features += [tokens[i] for i in here]
        features.append(newline)
    arrays = {"features": x.numpy(), "cls_logits": row.numpy(), "newline": newline.numpy()}
    arrays |= {"crops_wh": np.array([2, 2]), "image_size_wh": np.array([300, 200]), "retention": np.float32([0.25])}
    arrays |= {"scales_0": 0.25 * np.float32(shares(row[0], 10.0)), "thumb_index_0": np.array(first)}
    np.savez(tmp_path / "leaders_globalcom2_small.npz", **arrays, features_0=torch.stack(features).numpy())
    (found,) = parity.run(tmp_path)
    assert found.status == "passed", found.detail
    assert "2 x 2 crops" in found.detail
    np.savez(tmp_path / "leaders_globalcom2_small.npz", **arrays, features_0=torch.stack(features[::-1]).numpy())
    (found,) = parity.run(tmp_path)
    assert found.status == "failed"
    assert "features of run 0 differ" in found.detail
