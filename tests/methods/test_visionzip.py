"""VisionZip and plain CLS attention against plain restatements, and on towers with and without a CLS token."""

from __future__ import annotations

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Assignment, Signal, Span, UnsupportedModel, Visual
from vtprune.evals import parity
from vtprune.methods.pre_llm.cls_topk import ClsTopK
from vtprune.methods.pre_llm.visionzip import KEYS, VisionZip

CLS = Signal("cls", None)
# A base view of 3 x 3, a separator, and a mosaic of 4 rows of 5 that end with a newline each.
MOSAIC = (Span(0, (1, 3, 3)), Span(10, (1, 4, 5), newline=True))
MOSAIC_SIZE = 34


def unit(n: int, budget: int, seed: int = 0, levels: int = 0, **fields) -> Visual:
    """Random tokens, keys and scores; with few levels, scores full of ties."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (n,), generator=g) / levels if levels else torch.rand(n, generator=g)
    keys, x = torch.randn(n, 6, generator=g), torch.randn(n, 5, generator=g)
    return Visual(x, budget, signals={CLS: scores, KEYS: keys}, **fields)


# --- the oracle -------------------------------------------------------------------------------------------------------


def separators(v: Visual) -> list[int]:
    inside: set[int] = set(range(v.n)) if not v.spans else set()
    for span in v.spans:
        _, rows, columns = span.grid
        for row in range(rows):
            start = span.start + row * (columns + span.newline)
            inside |= set(range(start, start + columns))
    return [i for i in range(v.n) if i not in inside]


def oracle(v: Visual, share: int, mode: str = "add_mean", cls: bool = False) -> tuple[list[int], list[int], Tensor]:
    """https://arxiv.org/abs/2412.04467: (dominant best first, contextual places, their rows in that order).

    Separators come last, the first of them first, and are not merged; with cls the first token always stays.
    """
    scores, keys, x = v.signals[CLS].double().tolist(), v.signals[KEYS].double(), v.x.double()
    outside = [i for i in separators(v) if not (cls and i == 0)]
    ranked = sorted(range(v.n), key=lambda i: (i in outside, not (cls and i == 0), (i not in outside) * -scores[i], i))
    patches = v.n - len(outside)
    c = min(share, v.budget - 1) if v.budget < patches else 0
    dominant, left = ranked[: v.budget - c], sorted(ranked[v.budget - c : patches])
    if not c:
        return dominant, [], x[dominant]
    targets = left[:: max(1, len(left) // c)][:c]
    taken: dict[int, list[int]] = {t: [] for t in targets}
    for i in left:
        if i not in targets:
            likeness = [float(keys[i] @ keys[t]) / float(keys[i].norm() * keys[t].norm()) for t in targets]
            taken[targets[likeness.index(max(likeness))]].append(i)
    rows = [x[i] for i in dominant]
    for t, others in taken.items():
        if mode == "average":
            rows.append(x[[t, *others]].mean(0))
        else:
            rows.append(x[t] + x[others].mean(0) if others else x[t])
    return dominant, targets, torch.stack(rows)


def agrees(method: VisionZip, v: Visual) -> None:
    answer, share = method(v), method.contextual
    share = share if isinstance(share, int) else round(share * v.budget)
    dominant, targets, rows = oracle(v, share, method.merge_mode, method.cls == "keep")
    order = dominant + targets
    assert answer.order.tolist() == order
    assert answer.idx.tolist() == sorted(order)
    if method.order == "official":
        shown = [order.index(i) for i in (*sorted(dominant), *targets)]
    else:
        shown = [order.index(i) for i in sorted(order)]
    torch.testing.assert_close(answer.apply(v.x), rows[shown].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", ["absent", "keep"])
@pytest.mark.parametrize("order", ["positional", "official"])
@pytest.mark.parametrize("mode", ["add_mean", "average"])
@pytest.mark.parametrize("contextual", [0, 1, 4, 0.25, 100])
def test_it_equals_the_oracle(contextual, mode, order, cls):
    method = VisionZip(contextual=contextual, merge_mode=mode, order=order, cls=cls)
    apart = (Span(1, (1, 4, 5)), Span(21, (1, 3, 3)))  # and a CLS token before them
    for seed, budget in enumerate((1, 2, 5, 9, 15, 29, 30)):
        agrees(method, unit(30, budget, seed, levels=(0, 4)[seed % 2], grid=(1, 5, 6)))
        agrees(method, unit(30, budget, seed))
        agrees(method, unit(30, budget, seed, spans=apart))
    for seed, budget in enumerate((1, 8, 20, 28, 29, 30, MOSAIC_SIZE)):
        agrees(method, unit(MOSAIC_SIZE, budget, seed, spans=MOSAIC))


def test_the_default_share_is_that_of_the_paper():
    for budget, contextual in ((64, 10), (128, 20), (192, 30), (32, 5)):
        answer = VisionZip()(unit(576, budget, grid=(1, 24, 24)))
        merged = answer.dst.bincount(minlength=budget) > 1
        assert (int(merged.sum()), len(answer.idx)) == (contextual, budget)


def test_every_token_flows_somewhere_and_the_two_modes_weigh_it_as_they_say():
    v = unit(40, 10)
    for mode, total in (("average", 1.0), ("add_mean", 2.0)):
        answer = VisionZip(contextual=3, merge_mode=mode)(v)
        assert sorted(answer.src.tolist()) == list(range(40))
        sums = torch.zeros(10).index_add(0, answer.dst, answer.w)
        contextual = answer.dst.bincount(minlength=10) > 1
        torch.testing.assert_close(sums[contextual], torch.full((3,), total))
        assert (sums[~contextual] == 1).all()


def test_newlines_are_never_merged():
    v = unit(MOSAIC_SIZE, 12, spans=MOSAIC)
    answer = VisionZip(contextual=4)(v)
    assert not set(answer.src.tolist()) & set(separators(v))
    assert len(set(answer.src.tolist())) == MOSAIC_SIZE - len(separators(v))


def test_nothing_to_merge_is_a_plain_selection():
    for v, contextual in ((unit(20, 8), 0), (unit(20, 20), 5), (unit(20, 1), 5), (unit(20, 19), 19)):
        answer = VisionZip(contextual=contextual)(v)
        assert answer.merges is (v.budget == 19)
        assert len(answer.idx) == v.budget


def test_keys_of_length_zero_and_equal_keys_do_no_harm():
    v = unit(20, 6)
    for keys in (torch.zeros(20, 6), torch.ones(20, 6)):
        answer = VisionZip(contextual=2)(Visual(v.x, 6, signals={CLS: v.signals[CLS], KEYS: keys}))
        assert answer.apply(v.x).isfinite().all()
        taken = answer.dst.bincount(minlength=6) - 1
        assert sorted(taken.tolist()) == [0, 0, 0, 0, 0, 14]  # ties go to the first contextual token


@pytest.mark.parametrize("method", [VisionZip(contextual=0.3), ClsTopK(layer=None)])
def test_a_batch_equals_its_units(method):
    units = [unit(30, 12, 0, grid=(1, 5, 6)), unit(MOSAIC_SIZE, 20, 1, spans=MOSAIC), unit(17, 17, 2)]
    for together, v in zip(method.batch(units), units, strict=True):
        alone = method(v)
        assert torch.equal(together.idx, alone.idx)
        assert torch.equal(together.apply(v.x), alone.apply(v.x))


def test_half_precision_is_scored_in_full():
    v = unit(30, 10, grid=(1, 5, 6))
    half = {k: s.to(torch.bfloat16) for k, s in v.signals.items()}
    answers: list[Assignment] = []
    for signals in (half, {k: s.float() for k, s in half.items()}):
        answers.append(VisionZip()(Visual(v.x.to(torch.bfloat16), 10, grid=v.grid, signals=signals)))
    assert torch.equal(answers[0].idx, answers[1].idx)
    assert torch.equal(answers[0].dst, answers[1].dst)
    assert answers[0].apply(v.x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_cls_topk_equals_a_sort():
    for seed in range(5):
        v = unit(40, 9, seed, levels=(0, 5)[seed % 2])
        scores = v.signals[CLS].tolist()
        order = sorted(range(40), key=lambda i: (-scores[i], i))[:9]
        answer = ClsTopK(layer=None)(v)
        assert answer.order.tolist() == order
        assert answer.idx.tolist() == sorted(order)
        assert not answer.merges


# --- options and towers -----------------------------------------------------------------------------------------------


def test_options_are_checked():
    for name, options, error in (
        ("visionzip", {"contextual": -1}, ValueError),
        ("visionzip", {"contextual": 1.0}, ValueError),
        ("visionzip", {"contextual": float("nan")}, ValueError),
        ("visionzip", {"contextual": True}, TypeError),
        ("visionzip", {"merge_mode": "sum"}, ValueError),
        ("visionzip", {"order": "random"}, ValueError),
        ("visionzip", {"cls": "drop"}, ValueError),
        ("visionzip", {"fallback": "mean"}, ValueError),
        ("cls_topk", {"fallback": "mean"}, ValueError),
        ("cls_topk", {"layer": 1.5}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            vtprune.create(name, **options)


def test_broken_scores_and_keys_are_refused():
    v = unit(20, 6)
    for signal in (CLS, KEYS):
        broken = {k: s.clone() for k, s in v.signals.items()}
        broken[signal][2] = torch.inf
        with pytest.raises(ValueError, match="attention rows and keys"):
            VisionZip()(Visual(v.x, 6, signals=broken))
    with pytest.raises(ValueError, match="mean_keys"):
        VisionZip()(Visual(v.x, 6, signals={CLS: v.signals[CLS]}))


@torch.no_grad()
def last(name: str, method: vtprune.Method, rows: tuple[int, ...] = (2, 0, 1)) -> vtprune.handle.Last:
    model = families.model(name)
    with vtprune.patch(model, method, keep=0.4) as handle:
        model(**families.inputs(name, rows=rows))
    return handle.last


@pytest.mark.parametrize("method", [VisionZip, ClsTopK])
def test_a_tower_without_cls_falls_back_and_says_so_or_refuses(method):
    report = last("qwen2_vl", method())
    assert [note for note in report.notes if "no CLS token" in note]
    assert all((u.scores > 0).all() for u in report.units)
    with pytest.raises(UnsupportedModel, match="fallback='received'"):
        last("qwen2_vl", method(fallback="error"))
    report = last("llava", method(fallback="error"))
    assert not report.notes


def test_scores_of_a_model_are_its_cls_row_and_merged_rows_reach_the_llm():
    """Layer -2 of a CLIP tower, eager; the text model receives A x in place of the kept tokens."""
    model, inputs = families.model("llava", "eager"), families.inputs("llava", rows=(1,))
    maps: list[Tensor] = []
    layer = model.base_model.vision_tower.encoder.layers[-2].self_attn
    hook = layer.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    with torch.no_grad():
        features = model.base_model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    hook.remove()
    fed: list[Tensor] = []
    hook = (
        families.model("llava")
        .get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda m, args, kwargs: fed.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    report = last("llava", VisionZip(contextual=3), rows=(1,))
    hook.remove()
    (ours,) = report.units
    torch.testing.assert_close(ours.scores, maps[0].mean(1)[0, 0, 1:])
    at = (report.index[0][:, None] == ours.positions).any(1)
    torch.testing.assert_close(fed[0][0][at], ours.assignment.apply(features), atol=1e-5, rtol=1e-5)
    assert ours.assignment.merges


@pytest.mark.parametrize(("per", "newlines"), [("image", "compete"), ("image", "keep"), ("crop", "drop")])
@pytest.mark.parametrize("name", ["llava_next", "internvl", "video_llava-video"])
def test_units_of_a_model_equal_the_oracle(name, per, newlines):
    """Mosaics, tiles and frames; each unit merges within itself."""
    model, inputs = families.model(name), families.inputs(name, rows=(2, 0, 1))
    stages, log = reference.spy([vtprune.Stage("llm", VisionZip(contextual=0.3), keep=0.4, per=per, newlines=newlines)])
    with vtprune.patch(model, stages), torch.no_grad():
        model(**inputs)
    (call,) = log
    for v, answer in zip(call.units, call.answers, strict=True):
        dominant, targets, rows = oracle(v, round(0.3 * v.budget))
        assert answer.order.tolist() == dominant + targets
        shown = torch.tensor(dominant + targets).argsort()
        torch.testing.assert_close(answer.apply(v.x), rows[shown].float(), atol=1e-5, rtol=1e-4)


def test_parity_with_the_official_code(shared):
    rows = parity.run(shared / "golden", ["visionzip_"])
    assert len(rows) == 5
    assert [row.detail for row in rows if row.status != "passed"] == []
