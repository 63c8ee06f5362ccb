"""VScan against a plain restatement, on whole and odd rasters, mosaics and unknown ones, and its second stage."""

from __future__ import annotations

import families
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Signal, Span, UnsupportedModel, Visual
from vtprune.evals import parity
from vtprune.methods.pre_llm.vscan import VScan

SHALLOW, DEEP = Signal("cls", 0.25), Signal("cls", None)
# A base view of 4 x 4, a separator, and a mosaic of 5 rows of 6 that end with a newline each.
MOSAIC = (Span(0, (1, 4, 4)), Span(17, (1, 5, 6), newline=True))


def unit(n: int, budget: int, seed: int = 0, levels: int = 0, cls: bool = True, **fields) -> Visual:
    """Random features and scores; with few levels, full of ties."""
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randint(levels, (n,), generator=g) / levels if levels else torch.rand(n, generator=g) for _ in "ab"]
    names = (SHALLOW, DEEP) if cls else [Signal("received", s.layer, without_cls=True) for s in (SHALLOW, DEEP)]
    return Visual(torch.randn(n, 5, generator=g), budget, signals=dict(zip(names, draw)), **fields)


# --- the oracle -------------------------------------------------------------------------------------------------------


def window_of(v: Visual, equal: bool) -> list[tuple[int, ...] | None]:
    """Which window each token is in; None outside the rasters."""
    found: list[tuple[int, ...] | None] = [None] * v.n
    for number, span in enumerate(v.spans or (Span(0, v.grid or (1, 1, v.n)),)):
        frames, rows, columns = span.grid
        at = span.start
        for t in range(frames):
            for r in range(rows):
                for c in range(columns):
                    found[at] = (number, t, part(r, rows, equal), part(c, columns, equal))
                    at += 1
                at += span.newline
    return found


def part(at: int, length: int, equal: bool) -> int:
    if not equal:
        return min(at // 4, max(1, length // 4) - 1)
    count = min(4, length)
    return max(i for i in range(count) if i * length // count <= at)


def oracle(v: Visual, equal: bool, exact: bool = True) -> tuple[list[int], Tensor]:
    """https://arxiv.org/abs/2505.22654: tokens in the order they were picked, and the features of the sorted ones."""
    shallow, deep = (s.double().tolist() for s in v.signals.values())
    n, half, windows = v.budget, v.budget // 2, window_of(v, equal)
    everyone = [w for w in dict.fromkeys(windows) if w is not None]
    cap = half // len(everyone) if equal else -(-half // len(everyone))
    local: list[int] = []
    for i in sorted((i for i in range(v.n) if windows[i] is not None), key=lambda i: (-shallow[i], i)):
        if len(local) < half and sum(windows[j] == windows[i] for j in local) < cap:
            local.append(i)
    outside = [window is None for window in windows]
    others = [i for i in range(v.n) if i not in local]
    others.sort(key=lambda i: (outside[i], 0.0 if outside[i] else -deep[i], i))
    count = n - len(local) if exact or n == v.n else n - half
    order, x = local + others[:count], v.x.double()
    likeness = torch.cosine_similarity(x[:, None], x[None], dim=-1).tolist()
    flows: dict[int, list[int]] = {i: [i] for i in sorted(order)}
    for i in others[count:]:
        if windows[i] is not None:
            flows[max(flows, key=lambda j: (likeness[i][j], -j))].append(i)
    return order, torch.stack([x[some].mean(0) for some in flows.values()])


def agrees(method: VScan, v: Visual, equal: bool) -> None:
    answer, (order, rows) = method(v), oracle(v, equal, method.exact_budget)
    assert answer.order.tolist() == order
    assert answer.idx.tolist() == sorted(order)
    torch.testing.assert_close(answer.apply(v.x), rows.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("windows", ["auto", "4x4_windows", "4x4_tokens"])
def test_it_equals_the_oracle(windows, exact, cls):
    method = VScan(windows=windows, exact_budget=exact)
    equal = cls if windows == "auto" else windows == "4x4_windows"
    shapes = [
        (72, {"grid": (1, 8, 9)}),
        (60, {"grid": (4, 3, 5)}),
        (33, {"grid": (1, 11, 3)}),
        (MOSAIC[1].start + 35, {"spans": MOSAIC}),
        (20, {}),
        (1, {"grid": (1, 1, 1)}),
    ]
    for seed, (n, fields) in enumerate(shapes):
        for budget in {1, min(2, n), max(1, n // 3), max(1, n // 2), n - n // 5, n}:
            agrees(method, unit(n, budget, seed, levels=(0, 4)[budget % 2], cls=cls, **fields), equal)


def test_the_official_counts_of_tokens():
    for budget, kept in ((72, 68), (100, 98), (46, 39), (20, 10), (96, 96), (576, 576)):
        v = unit(576, budget, grid=(1, 24, 24))
        assert len(VScan(exact_budget=False)(v).idx) == kept
        assert len(VScan()(v).idx) == budget
    assert VScan().exact
    assert not VScan(exact_budget=False).exact


def test_every_patch_flows_somewhere_and_rows_are_means():
    v = unit(MOSAIC[1].start + 35, 12, spans=MOSAIC)
    answer = VScan()(v)
    outside = [i for i, window in enumerate(window_of(v, True)) if window is None]
    assert sorted(answer.src.tolist()) == [i for i in range(v.n) if i not in outside]
    torch.testing.assert_close(torch.zeros(12).index_add(0, answer.dst, answer.w), torch.ones(12))


def test_half_precision_is_compared_in_full():
    v = unit(72, 20, grid=(1, 8, 9))
    half = Visual(v.x.bfloat16(), 20, grid=v.grid, signals=v.signals)
    full = Visual(half.x.float(), 20, grid=v.grid, signals=v.signals)
    assert torch.equal(VScan()(half).dst, VScan()(full).dst)
    assert VScan()(half).apply(half.x).dtype == torch.bfloat16


def test_an_unknown_raster_is_noted():
    v = unit(20, 8)
    VScan()(v)
    assert "runs of the sequence" in v.state["note"]


def test_options_are_checked():
    for options in (
        {"windows": "6x6"},
        {"layer": 1.5},
        {"fallback": "mean"},
        {"inner_share": 0.0},
        {"inner_share": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            VScan(**options)


def test_broken_and_missing_input_is_refused():
    v = unit(20, 6)
    for broken in (Visual(v.x / 0, 6, signals=v.signals), Visual(v.x, 6, signals={**v.signals, DEEP: v.x[:, 0] / 0})):
        with pytest.raises(ValueError, match="attention rows and features"):
            VScan()(broken)
    with pytest.raises(ValueError, match="cls"):
        VScan()(Visual(v.x, 6))
    with pytest.raises(UnsupportedModel, match="fallback='received'"):
        VScan(fallback="error")(Visual(v.x, 6))


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "layer"), [(32, 16), (28, 14), (4, 2), (1, 0)])
def test_the_second_stage_stands_in_the_middle(depth, layer):
    first, second = VScan().stages(96, depth)
    assert (first.where, first.keep, first.per) == ("llm", 96, "crop")
    assert (second.where, second.keep, second.per, second.method.name) == (layer, 32, "crop", "pyramiddrop")
    _, second = VScan().stages(0.6, depth)
    assert (second.keep, second.per) == (0.2, "image")
    assert VScan(inner_share=0.5).stages(0.6, depth)[1].keep == 0.3
    assert VScan().stages(1, depth)[1].keep == 1


def test_where_nothing_goes_in_the_second_stage_there_is_none():
    for method, keep in ((VScan(inner=False), 96), (VScan(), 1.0), (VScan(inner=False), None)):
        assert [stage.where for stage in method.stages(keep, 32)] == ["llm"]


def test_where_the_second_stage_cannot_run_the_error_names_the_option():
    model = families.model("qwen3_5")
    with pytest.raises(UnsupportedModel, match=r"linear_attention.*leave this stage out of vscan: inner=False"):
        vtprune.patch(model, "vscan", keep=0.5)
    with vtprune.patch(model, "vscan", keep=0.5, inner=False), torch.inference_mode():
        model(**families.inputs("qwen3_5", rows=(1,)))


def test_no_budget_is_refused():
    with pytest.raises(ValueError, match=r"keep=\.\.\."):
        VScan()(Visual(torch.zeros(4, 2), None))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_both_stages_run_on_a_model(family):
    model, batch = families.model(family), families.inputs(family, rows=(1, 2))
    with vtprune.patch(model, "vscan", keep=0.6) as handle:
        model(**batch)
        left: dict[object, int] = {}
        for part in handle.last.units:
            left[part.where] = left.get(part.where, 0) + len(part.idx)
        notes = handle.last.notes
    assert len(left) == 2
    before, after = left.values()
    assert after < before
    assert any("no CLS token" in said for said in notes) == (family == "qwen2_5_vl")


def test_parity_with_the_official_code(shared):
    rows = parity.run(shared / "golden", ["leaders_vscan_"])
    assert len(rows) == 5
    assert [row.detail for row in rows if row.status != "passed"] == []
