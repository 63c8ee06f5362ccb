"""HiPrune against a plain restatement, on flat, tiled and unknown rasters, and on real towers."""

from __future__ import annotations

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Signal, Span, Visual
from vtprune.evals import parity
from vtprune.methods.pre_llm.hiprune import HiPrune

SHALLOW, DEEP = HiPrune().needs
# A base view of 4 x 4, a separator, and a mosaic of 5 rows of 6 that end with a newline each.
MOSAIC = (Span(0, (1, 4, 4)), Span(17, (1, 5, 6), newline=True))
SEPARATORS = [16, *range(17 + 6, 17 + 35, 7)]


def unit(n: int, budget: int, seed: int = 0, levels: int = 0, **fields) -> Visual:
    """Random scores; with few levels, full of ties."""
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randint(levels, (n,), generator=g) / levels if levels else torch.rand(n, generator=g) for _ in "ab"]
    return Visual(torch.zeros(n, 1), budget, signals=dict(zip((SHALLOW, DEEP), draw)), **fields)


# --- the oracle -------------------------------------------------------------------------------------------------------


def places(v: Visual) -> list[tuple[int, ...] | None]:
    """(span, frame, row, column) of every token; None outside the rasters."""
    found: list[tuple[int, ...] | None] = [None] * v.n
    for number, span in enumerate(v.spans or (Span(0, v.grid or (1, 1, v.n)),)):
        frames, rows, columns = span.grid
        at = span.start
        for t in range(frames):
            for r in range(rows):
                for c in range(columns):
                    found[at] = (number, t, r, c)
                    at += 1
                at += span.newline
    return found


def neighbours(v: Visual, j: int, edges: str) -> list[int]:
    if edges == "clamp_flat" and (v.spans or v.grid):
        width = (v.spans[0].grid if v.spans else v.grid)[2]
        return [min(max(j + step, 0), v.n - 1) for step in (-1, 1, -width, width)]
    at = places(v)
    if at[j] is None:
        return []
    s, t, r, c = at[j]
    wanted = [(s, t, r - 1, c), (s, t, r + 1, c), (s, t, r, c - 1), (s, t, r, c + 1)]
    return [at.index(place) for place in wanted if place in at]


def ranked(scores: list[float], among: list[int]) -> list[int]:
    return sorted(among, key=lambda i: (-scores[i], i))


def oracle(v: Visual, alpha: float = 0.1, edges: str = "grid", exact: bool = True) -> list[int]:
    """https://arxiv.org/abs/2508.00553: sets, as on paper."""
    shallow, deep = (v.signals[s].double().tolist() for s in (SHALLOW, DEEP))
    n, everyone = v.budget, list(range(v.n))
    anchors = ranked(shallow, everyone)[: round(n * alpha / 5)]
    buffers = {b for a in anchors for b in neighbours(v, a, edges)} - set(anchors)
    chosen = (anchors + ranked(deep, sorted(buffers)))[:n]
    if exact:
        registers = ranked(deep, [i for i in everyone if i not in chosen])[: n - len(chosen)]
    else:
        mean = sum(deep) / len(deep)
        registers = ranked([s / mean - (i in chosen) for i, s in enumerate(deep)], everyone)[: n - len(chosen)]
    return sorted({*chosen, *registers})


# --- against it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("edges", ["grid", "clamp_flat"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("n", "fields"),
    [
        (48, {"grid": (1, 6, 8)}),
        (48, {"grid": (3, 4, 4)}),
        (52, {"spans": MOSAIC}),
        (30, {}),
        (7, {"grid": (1, 7, 1)}),
        (1, {"grid": (1, 1, 1)}),
    ],
)
def test_it_equals_the_oracle(n, fields, alpha, edges, exact):
    method = HiPrune(alpha=alpha, edges=edges, exact_budget=exact)
    for seed in range(4):
        for budget in sorted({1, min(2, n), max(1, n // 5), max(1, n // 2), n}):
            v = unit(n, budget, seed, levels=(0, 5)[seed % 2], **fields)
            answer = method(v)
            assert answer.idx.tolist() == oracle(v, alpha, edges, exact)
            if exact:
                assert answer.order.sort().values.tolist() == answer.idx.tolist()
                assert len(answer.idx) == budget


def test_neighbours_stay_in_the_raster_unless_the_official_edges_are_asked_for():
    """One anchor at the end of the first row: its right neighbour does not exist, officially it is the next row."""
    shallow, deep = torch.zeros(24), torch.zeros(24)
    shallow[5] = 1.0
    v = Visual(torch.zeros(24, 1), 4, grid=(1, 4, 6), signals={SHALLOW: shallow, DEEP: deep})
    assert HiPrune(alpha=1.0)(v).idx.tolist() == [0, 4, 5, 11]  # 0 is a register: all deep scores are equal
    v = Visual(v.x, 4, grid=(1, 4, 6), signals={SHALLOW: shallow, DEEP: torch.arange(24.0)})
    assert HiPrune(alpha=1.0)(v).idx.tolist() == [4, 5, 11, 23]
    assert HiPrune(alpha=1.0, edges="clamp_flat")(v).idx.tolist() == [4, 5, 6, 11]  # 0, from above, has no place left


def test_newlines_and_separators_are_no_buffers():
    """Every token of the mosaic's right column is an anchor; its newline is never taken for its neighbour."""
    shallow, deep = torch.zeros(52), torch.zeros(52)
    shallow[[17 + 7 * row + 5 for row in range(5)]] = 1.0
    deep[SEPARATORS] = -1.0
    v = Visual(torch.zeros(52, 1), 25, spans=MOSAIC, signals={SHALLOW: shallow, DEEP: deep})
    assert not set(HiPrune(alpha=1.0)(v).idx.tolist()) & set(SEPARATORS)


def test_an_unknown_raster_is_noted():
    v = unit(20, 5)
    HiPrune()(v)
    assert "neighbours along the sequence" in v.state["note"]
    v = unit(20, 5, grid=(1, 4, 5))
    HiPrune()(v)
    assert not v.state


def test_a_batch_equals_its_units():
    units = [unit(48, 12, 0, grid=(1, 6, 8)), unit(52, 20, 1, spans=MOSAIC), unit(30, 30, 2)]
    method = HiPrune(alpha=0.4)
    for together, v in zip(method.batch(units), units, strict=True):
        assert torch.equal(together.idx, method(v).idx)


def test_half_precision_scores_do_not_change_the_arithmetic():
    v = unit(48, 12, grid=(1, 6, 8))
    half = {k: s.to(torch.bfloat16) for k, s in v.signals.items()}
    full = {k: s.float() for k, s in half.items()}
    picks = [HiPrune()(Visual(v.x, 12, grid=v.grid, signals=s)).idx for s in (half, full)]
    assert torch.equal(*picks)


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_are_checked():
    for options, error in (
        ({"alpha": 1.1}, ValueError),
        ({"alpha": float("nan")}, ValueError),
        ({"edges": "wrap"}, ValueError),
        ({"object_layer": 1.0}, ValueError),
        ({"object_layer": True}, TypeError),
        ({"object_layer": None}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))[:5]):
            vtprune.create("hiprune", **options)
    assert vtprune.create("hiprune", object_layer=8).needs == (Signal("received", 8), Signal("received", None))


def test_missing_and_broken_signals_are_refused():
    v = unit(20, 5)
    with pytest.raises(ValueError, match=r"received \(layer that feeds the projector\)"):
        HiPrune()(Visual(v.x, 5, signals={SHALLOW: v.signals[SHALLOW]}))
    broken = v.signals[DEEP].clone()
    broken[3] = torch.nan
    with pytest.raises(ValueError, match="attention maps"):
        HiPrune()(Visual(v.x, 5, signals={SHALLOW: v.signals[SHALLOW], DEEP: broken}))
    with pytest.raises(ValueError, match="keep="):
        HiPrune()(Visual(v.x, None, signals=v.signals))


# --- on models --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run(name: str, method: vtprune.Method, keep: float, rows: tuple[int, ...] = (1,)) -> vtprune.Handle:
    model = families.model(name)
    with vtprune.patch(model, method, keep=keep) as handle:
        model(**families.inputs(name, rows=rows))
    return handle


def test_the_short_count_runs_on_a_model():
    """One anchor of the first image ranks as a register too, and takes up two places."""
    short = run("llava_onevision", HiPrune(alpha=0.5, object_layer=0, exact_budget=False), 0.6, rows=(2, 0, 1)).last
    whole = run("llava_onevision", HiPrune(alpha=0.5, object_layer=0), 0.6, rows=(2, 0, 1)).last
    for ours, full in zip(short.units, whole.units, strict=True):
        assert len(ours.idx) <= len(full.idx) == round(0.6 * ours.n)
        assert set(ours.idx.tolist()) <= set(full.idx.tolist())
    assert sum(len(u.idx) for u in short.units) == sum(len(u.idx) for u in whole.units) - 1


def test_scores_of_a_model_are_the_attention_that_its_tokens_receive():
    """Both layers from eager maps: hidden_states[-2] is the output of the last layer but one."""
    model, inputs = families.model("llava", "eager"), families.inputs("llava", rows=(1,))
    maps: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1]))
        for layer in model.base_model.vision_tower.encoder.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    received = [m.mean((1, 2))[0, 1:] for m in maps]
    v = Visual(torch.zeros(25, 1), 10, grid=(1, 5, 5), signals={SHALLOW: received[0], DEEP: received[1]})
    (ours,) = run("llava", HiPrune(alpha=0.5), 10).last.units
    torch.testing.assert_close(ours.scores, received[1])
    assert ours.idx.tolist() == oracle(v, 0.5)


@pytest.mark.parametrize(("per", "newlines"), [("image", "compete"), ("image", "keep"), ("crop", "drop")])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "smolvlm"])
def test_units_of_a_model_equal_the_oracle(name, per, newlines):
    """Mosaics, tiles and windows; each unit with its own raster and its own share of the budget."""
    model, inputs = families.model(name), families.inputs(name, rows=(2, 0, 1))
    stages, log = reference.spy([vtprune.Stage("llm", HiPrune(alpha=0.8), keep=0.4, per=per, newlines=newlines)])
    with vtprune.patch(model, stages), torch.no_grad():
        model(**inputs)
    (call,) = log
    for v, answer in zip(call.units, call.answers, strict=True):
        assert v.spans or v.grid
        assert "note" not in v.state
        assert answer.idx.tolist() == oracle(v, 0.8)


@pytest.mark.parametrize("method", ["hiprune", "visionzip", "cls_topk"])
@pytest.mark.parametrize("name", families.IMAGES)
def test_the_order_of_two_images_does_not_matter(name, method):
    """Two sizes where the family has them; the same tokens of each stay, whichever comes first."""
    kind, kept = families.FAMILIES[name], {}
    sizes = (kind.sizes[0], kind.sizes[-1])
    images = [kind.visual(size, torch.Generator().manual_seed(i), True) for i, size in enumerate(sizes)]
    for order in ((0, 1), (1, 0)):
        pieces = [images[i] for i in order]
        words = [families.Piece([families.BOS]), families.text(0)]
        row = [*pieces, *words] if kind.visual_first else [words[0], pieces[0], families.text(1), pieces[1], words[1]]
        with vtprune.patch(families.model(name), method, keep=0.4) as handle, torch.no_grad():
            families.model(name)(**families.build(name, [row]))
        units = handle.last.units
        counts = [len(families.build(name, [[images[i]]]).units[0]) for i in order]
        assert {unit.image for unit in units} == set(range(sum(counts)))
        first = [unit for unit in units if unit.image < counts[0]]
        kept[order] = dict(zip(order, (first, units[len(first) :])))
    for i in (0, 1):
        for one, other in zip(kept[0, 1][i], kept[1, 0][i], strict=True):
            assert torch.equal(one.idx, other.idx)


@pytest.mark.parametrize("name", families.NAMES)
def test_a_prompt_without_images_passes_through(name):
    model, words = families.model(name), families.inputs(name, rows=(0, 0))
    with torch.no_grad():
        dense = model(**words).logits
        for method in ("hiprune", "visionzip", "cls_topk"):
            with vtprune.patch(model, method, keep=0.3):
                assert torch.equal(model(**words).logits, dense)


def test_parity_with_the_official_code(shared):
    rows = parity.run(shared / "golden", ["hiprune_"])
    assert len(rows) == 6
    assert [row.detail for row in rows if row.status != "passed"] == []
