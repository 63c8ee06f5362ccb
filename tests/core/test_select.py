"""`vtprune.select` keeps of features what a patched model keeps of them before its LLM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Assignment, Method, Signal, Span, Stage, Visual


class Spy(Method):
    """Keeps everything, and remembers the images that a model shows, whole."""

    def __init__(self, reads: Sequence[Signal]) -> None:
        self.reads, self.seen = tuple(reads), []

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.reads

    @property
    def adaptive(self) -> bool:
        return True

    def __call__(self, v: Visual) -> Assignment:
        self.seen.append(v)  # type: ignore[attr-defined]
        return Assignment(torch.arange(v.n))


@dataclass
class Kept:
    """What a patched model kept of one image: positions in the image, and the embeddings that its LLM read there."""

    idx: list[int]
    features: Tensor


def shown(model: Any, batch: Any, reads: Sequence[Signal]) -> list[Visual]:
    """The images of a batch as a model shows them to a method."""
    spy = Spy(reads)
    with torch.no_grad(), vtprune.patch(model, Stage("llm", spy, per="image", newlines="compete")):
        model(**batch)
    return spy.seen


def kept(model: Any, batch: Any, *patch: Any, **options: Any) -> tuple[list[Kept], Any]:
    """What a patched model keeps of each image of a batch, and its `Last`."""
    read: list[Tensor] = []
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    try:
        with torch.no_grad(), vtprune.patch(model, *patch, **options) as handle:
            model(**batch)
            last = handle.last
    finally:
        hook.remove()
    found = []
    for row, images in enumerate(batch.units):
        valid = torch.ones_like(last.index[row], dtype=torch.bool) if last.valid is None else last.valid[row]
        slots = {int(p): i for i, p in enumerate(last.index[row]) if valid[i]}
        for image in images:
            left = [i for i, p in enumerate(image) if p in slots]
            found.append(Kept(left, read[-1][row, [slots[image[i]] for i in left]]))
    return found, last


def compare(name: str, rows: Sequence[int], method: str, options: dict[str, Any], stage: dict[str, Any]) -> Any:
    """Select on what the model shows, compare with what it keeps, and give what was selected."""
    model, batch = families.model(name), families.inputs(name, rows)
    made = vtprune.create(method, **options)
    seen = shown(model, batch, made.needs)
    expected, last = kept(model, batch, method, **options, **stage)
    owners = [row for row, count in enumerate(batch.units) for _ in count]
    assert len(seen) == len(owners) == len(expected)
    with torch.no_grad():
        found = vtprune.select(
            [v.x for v in seen],
            method,
            spans=[v.spans for v in seen],
            video=[v.video for v in seen],
            signals=[dict(v.signals) for v in seen],
            text=[seen[owners.index(row)].text for row in range(len(rows))],
            rows=owners,
            **options,
            **stage,
        )
    for image, want in zip(found, expected, strict=True):
        assert image.idx.tolist() == want.idx
        assert torch.equal(image.features, want.features)
    assert any(len(image.idx) < image.n for image in found)
    if stage.get("per") != "sample" or len(owners) == len(rows):
        counted = vtprune.count(
            method,
            spans=[v.spans for v in seen],
            sizes=[v.n for v in seen],
            video=[v.video for v in seen],
            rows=owners,
            **options,
            **stage,
        )
        assert counted == [len(want.idx) for want in expected]
    return found, last


CASES: list[tuple[str, Sequence[int], str, dict[str, Any], dict[str, Any]]] = [
    ("llava", (1, 2), "divprune", {}, {"keep": 0.25}),
    ("llava", (1, 2), "divprune", {}, {"keep": 0.5, "per": "sample"}),
    ("llava", (2, 1), "divprune", {}, {"keep_total": 9}),
    ("llava", (1, 2), "uniform", {}, {"keep": 3}),
    ("llava", (1, 2), "random", {"seed": 3}, {"keep": 0.5}),
    ("llava", (1, 2), "hiprune", {}, {"keep": 0.5}),
    ("llava", (1, 2), "todre", {"threshold": None}, {"keep": 0.5}),
    ("llava", (1, 2), "visionzip", {}, {"keep": 0.5}),
    ("llava_next", (1, 2), "visionzip", {}, {"keep": 0.5}),  # per crop, newlines dropped
    ("llava_next", (1, 1), "visionzip", {"contextual": 2}, {"keep": 6, "newlines": "keep"}),
    ("llava_next", (1, 2), "divprune", {}, {"keep": 0.25, "per": "crop", "newlines": "compete"}),
    ("llava_next", (1, 2), "divprune", {}, {"keep": 0.25, "per": "crop", "newlines": "keep"}),
    ("llava_next", (1, 2), "divprune", {}, {"keep": 0.25, "per": "crop", "newlines": "drop"}),
    ("llava_next", (1, 2), "divprune", {}, {"keep_total": 0.5, "per": "crop", "newlines": "drop"}),
    ("llava_next", (1, 2), "divprune", {}, {"keep": 0.25, "newlines": "drop"}),
    ("llava_next", (2, 1), "random", {}, {"keep": 0.5, "per": "sample", "newlines": "keep"}),
    ("qwen2_5_vl", (1, 2), "divprune", {}, {"keep": 0.5}),
]


@pytest.mark.parametrize(("name", "rows", "method", "options", "stage"), CASES)
def test_it_keeps_what_a_patched_model_keeps(
    name: str, rows: Sequence[int], method: str, options: dict[str, Any], stage: dict[str, Any]
) -> None:
    compare(name, rows, method, options, stage)


BEFORE = [cls.name for cls in vtprune.methods() if cls.seam == "pre_llm"]


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("method", BEFORE)
def test_every_method_before_the_llm(method: str, name: str) -> None:
    """One stage of each method that the registry holds, as the same stage of a patched model answers."""
    model, batch = families.model(name), families.inputs(name, (1, 2))
    made = vtprune.create(method)
    for keep in [0.5, None] if made.adaptive else [0.5]:
        stage = Stage("pre_llm", made, keep=keep)
        seen = shown(model, batch, made.needs)
        expected, _ = kept(model, batch, stage)
        owners = [row for row, count in enumerate(batch.units) for _ in count]
        with torch.no_grad():
            found = vtprune.select(
                [v.x for v in seen],
                stage,
                spans=[v.spans for v in seen],
                video=[v.video for v in seen],
                signals=[dict(v.signals) for v in seen],
                text=[seen[owners.index(row)].text for row in range(2)],
                rows=owners,
            )
        for image, want in zip(found, expected, strict=True):
            assert image.idx.tolist() == want.idx
            assert torch.equal(image.features, want.features)


@pytest.mark.parametrize("newlines", ["compete", "keep", "drop"])
@pytest.mark.parametrize("per", ["image", "crop", "frame"])
@pytest.mark.parametrize(
    "name",
    ["llava_next", "llava_onevision", "llava_onevision-video", "llava_next_video", "video_llava-video", "internvl"],
)
def test_crops_and_newlines_of_every_layout(name: str, per: str, newlines: str) -> None:
    """Mosaics with newlines, tiles side by side, frames with a newline behind them or separators between."""
    policy = {"per": per, "newlines": newlines}
    compare(name, (1, 2), "divprune", {}, {"keep": 0.25, **policy})
    compare(name, (2, 1), "divprune", {}, {"keep_total": 0.4, **policy})
    compare(name, (1, 2), "visionzip", {}, {"keep": 0.5, **policy})


VIDEOS = [name for name in families.FAMILIES if "video" in name]


@pytest.mark.parametrize("stage", [{"keep": 0.5}, {"keep": 2, "per": "frame"}, {"keep": 3, "per": "sample"}])
@pytest.mark.parametrize("name", VIDEOS)
def test_videos(name: str, stage: dict[str, Any]) -> None:
    """EVS compares frames, so it must see which rasters follow each other."""
    compare(name, (1, 1), "evs", {}, stage)


def test_order_and_scores_are_those_of_the_model() -> None:
    (image, *_), last = compare("llava", (1, 2), "hiprune", {}, {"keep": 0.5})
    unit = last.units[0]
    assert image.order.tolist() == unit.order.tolist()
    assert torch.equal(image.scores, unit.scores)
    (image, *_), last = compare("llava_next", (1,), "divprune", {}, {"keep": 0.25, "per": "crop", "newlines": "keep"})
    at = {p: i for i, p in enumerate(families.inputs("llava_next", (1,)).units[0][0])}
    by_unit = [at[int(u.seen[i])] for u in last.units for i in u.order]
    assert image.order[: len(by_unit)].tolist() == by_unit
    assert sorted(image.order.tolist()) == image.idx.tolist()


def test_stages_and_recipes_run_one_after_the_other() -> None:
    x = torch.randn(2, 36, 8, generator=torch.Generator().manual_seed(0))
    stages = [
        Stage("pre_llm", vtprune.create("random", seed=1), keep=18),
        Stage("llm", vtprune.create("divprune"), keep=6),
    ]
    found = vtprune.select(list(x), stages, grid=(1, 6, 6))
    again = vtprune.select(list(x), vtprune.Recipe.of(stages), grid=[(1, 6, 6)] * 2)
    for one, image, other in zip(x, found, again, strict=True):
        (first,) = vtprune.select(one, "random", seed=1, keep=18)
        (second,) = vtprune.select(first.features, vtprune.create("divprune"), keep=6)
        assert torch.equal(image.idx, first.idx[second.idx])
        assert torch.equal(image.features, one[image.idx])
        assert torch.equal(image.idx, other.idx)


def test_everything_stays() -> None:
    x = torch.randn(9, 4)
    (image,) = vtprune.select(x, "divprune", keep=1.0)
    assert image.idx.tolist() == list(range(9))
    assert torch.equal(image.features, x)
    assert (image.order, image.scores, image.n) == (None, None, 9)


@pytest.mark.parametrize("method", [name for name in BEFORE if name != "random"])
def test_many_images_at_once_are_each_as_if_alone(method: str) -> None:
    """Merged rows too; `random` draws for one image after the other."""
    g = torch.Generator().manual_seed(0)
    grids = [(1, 1, 1), (1, 5, 6), (1, 4, 4), (3, 4, 5), (1, 9, 2), (2, 3, 3), (1, 4, 4)]
    features = [torch.randn(t * h * w, 8, generator=g) for t, h, w in grids]
    wide = {"hidden": 8, "keys": 8, "mean_keys": 8}
    signals = [
        {n.kind: torch.rand((len(x), wide[n.kind]) if n.kind in wide else (len(x),), generator=g) for n in needs}
        for x in features
        for needs in [vtprune.create(method).needs]
    ]
    text = torch.randn(5, 8, generator=g)
    many = vtprune.select(features, method, keep=0.5, grid=grids, signals=signals, text=text)
    rows = list(range(len(grids)))
    apart = vtprune.select(features, method, keep=0.5, grid=grids, signals=signals, text=[text] * len(rows), rows=rows)
    for i, x in enumerate(features):
        (alone,) = vtprune.select(x, method, keep=0.5, grid=grids[i], signals=signals[i], text=text)
        assert len(alone.idx) == max(1, len(x) // 2)
        for other in (many[i], apart[i]):
            assert torch.equal(other.idx, alone.idx)
            assert torch.allclose(other.features, alone.features, atol=1e-6)


def test_clips_divide_a_row_of_frames() -> None:
    x = list(torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(0)))
    found = vtprune.select(x, "evs", keep=0.5, grid=(1, 3, 3), per="sample", clips=(1, 3))
    still = vtprune.select(x[:1], "evs", keep=0.5, grid=(1, 3, 3), per="sample")
    clip = vtprune.select(torch.cat(x[1:]), "evs", keep=0.5, grid=(3, 3, 3))
    assert found[0].idx.tolist() == still[0].idx.tolist()
    joined = torch.cat([image.idx + 9 * i for i, image in enumerate(found[1:])])
    assert joined.tolist() == clip[0].idx.tolist()
    together = vtprune.select(x, "evs", keep=0.5, grid=(1, 3, 3), per="sample")
    whole = vtprune.select(torch.cat(x), "evs", keep=0.5, grid=(4, 3, 3))
    assert torch.cat([image.idx + 9 * i for i, image in enumerate(together)]).tolist() == whole[0].idx.tolist()
    with pytest.raises(vtprune.UnsupportedCall, match=r"clips=\(2, 3\) counts 5 frames.*\[4\] images"):
        vtprune.select(x, "evs", keep=0.5, per="sample", clips=(2, 3))


def test_signals_by_kind_and_by_layer_and_gradients() -> None:
    x = torch.randn(16, 4, requires_grad=True)
    cls, keys = torch.rand(16), torch.randn(16, 6)
    (a,) = vtprune.select(x, "visionzip", keep=8, contextual=3, signals={"cls": cls, "mean_keys": keys})
    exact = {Signal("cls", None): cls, Signal("mean_keys", None): keys}
    (b,) = vtprune.select(x, "visionzip", keep=8, contextual=3, signals=[exact])
    assert torch.equal(a.idx, b.idx)
    assert not torch.equal(a.features, x[a.idx])
    a.features.sum().backward()
    assert x.grad is not None
    assert int((x.grad != 0).any(1).sum()) == 16


X = torch.zeros(9, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(9)}, ValueError, r"features of image 0 are \[9\] float32.*\[N, D\]"),
    ({"features": [X, torch.zeros(9, 5)]}, ValueError, r"image 1 are \[9, 5\].*image 0 \[9, 4\]"),
    ({"features": []}, TypeError, "a tensor \\[N, D\\] of one image, or a list"),
    ({"features": X.long()}, ValueError, "int64.*floating"),
    ({"grid": (1, 2, 4)}, ValueError, r"grid=\(1, 2, 4\) of image 0 has 8 tokens, but the image has 9"),
    ({"grid": [(1, 3, 3)] * 2}, ValueError, "grid holds 2 entries for 1 images"),
    ({"grid": "square"}, TypeError, "grid='square': pass"),
    ({"grid": (1, 3, 3), "spans": (Span(0, (1, 3, 3)),)}, TypeError, "grid and spans: give one"),
    (
        {"spans": (Span(0, (1, 3, 3)), Span(8, (1, 1, 1)))},
        ValueError,
        "tokens 8..8: spans .* must not overlap",
    ),
    ({"spans": (Span(1, (1, 3, 3)),)}, ValueError, "tokens 1..9.*within its 9 tokens"),
    ({"signals": {"clss": torch.rand(9)}}, ValueError, "name 'clss': use a Signal or one of cls, "),
    ({"signals": {"cls": torch.rand(8)}}, ValueError, r"signal 'cls' of image 0 is \[8\] float32.*not \[9, \.\.\.\]"),
    ({"text": torch.zeros(3, 5)}, ValueError, r"text is \[3, 5\].*\[M, 4\]"),
    ({"rows": [1]}, ValueError, "rows=\\[1\\]"),
    ({"method": "fastv"}, ValueError, r"fastv acts inside a model \(seam 'in_llm'\).*seam 'pre_llm'"),
    ({"method": "sparsevlm"}, ValueError, r"sparsevlm acts inside a model \(seam 'in_llm'\)"),
    ({"method": "tome"}, ValueError, r"tome acts inside a model \(seam 'in_vit'\)"),
    ({"method": Stage("llm", vtprune.create("fastv"), keep=3), "keep": None}, ValueError, "needs the signal last_row"),
    ({"method": "divprun"}, ValueError, "did you mean 'divprune'"),
    ({"seed": 1}, TypeError, "divprune has no option 'seed'"),
    ({"keep": None}, TypeError, "divprune: keep is missing"),
    ({"keep": 0.0}, ValueError, "keep=0.0 is outside the valid range"),
    ({"per": "tile"}, ValueError, "per='tile': choose"),
    ({"method": "cls_topk"}, ValueError, r"cls_topk needs the signal cls \(layer .*the unit carries none"),
    ({"method": Stage(3, vtprune.create("divprune"), keep=2), "keep": None}, ValueError, "divprune at 3 acts inside"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    call: dict[str, Any] = {"features": X, "method": "divprune", "keep": 0.5, **change}
    with pytest.raises(error, match=match):
        vtprune.select(call.pop("features"), call.pop("method"), **call)


def test_it_needs_torch_alone() -> None:
    """An engine that holds its own features needs neither transformers nor an adapter."""
    code = """
import sys
for name in ("transformers", "PIL", "typer", "rich", "tqdm", "numpy.random", "vtprune.model_adapters"):
    sys.modules[name] = None
import torch, vtprune
(image,) = vtprune.select(torch.randn(16, 4), "divprune", keep=0.25, grid=(1, 4, 4))
print(len(image.idx), len(vtprune.methods()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", str(len(vtprune.methods()))]
