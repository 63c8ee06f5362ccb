"""What a recipe means for an engine that encodes every image by itself: counts, refusals, positions; no vLLM needed."""

from __future__ import annotations

import sys
from typing import Any

import families
import pytest
import torch

import vtprune
from vtprune.core.errors import UnsupportedModel
from vtprune.integrations.vllm import positions, register
from vtprune.integrations.vllm.plan import EnginePlan, plan_of
from vtprune.integrations.vllm.signals import EngineSignals


def recipe(method: str, keep: Any = 0.4, where: Any = "pre_llm", options: Any = (), **policy: Any) -> vtprune.Recipe:
    return vtprune.Recipe.of(vtprune.Stage(where, vtprune.create(method, **dict(options)), keep=keep, **policy))


def config(name: str) -> Any:
    return families.FAMILIES[name].config()


@pytest.mark.parametrize(
    ("name", "call", "n"),
    [
        ("llava", {}, 25),
        ("qwen2_5_vl", {"image_grid_thw": torch.tensor([[1, 6, 8]])}, 12),
        ("llava_next", {"image_sizes": torch.tensor([[11, 22]])}, None),
    ],
)
@pytest.mark.parametrize("method", ["divprune", "visionzip", "hiprune", "uniform"])
def test_the_count_is_what_is_kept(name: str, call: dict[str, Any], n: int | None, method: str) -> None:
    plan = EnginePlan(recipe(method), config(name))
    if n is None:
        (n,) = plan.family.sizes_told(plan.base, "image", call) or ()
    torch.manual_seed(0)
    x = torch.randn(n, 8)
    signals = {need: torch.rand(n, 4) if "keys" in need.kind else torch.rand(n) for need in plan.needs}
    for keep in (None, 0.7, 3, 1.0):
        (kept,) = plan.select(keep, "image", [x], [call], [signals])
        assert plan.count(keep, "image", call, n) == len(kept.idx) == len(kept.features)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (recipe("fastv", where=2), "inside the model"),
        (recipe("flowcut", where=("vit", 1)), "inside the model"),
        (recipe("recoverable"), "reads the question"),
        (recipe("divprune", per="sample"), "per='sample'"),
        (recipe("divprune", None, keep_total=0.5), "keep_total"),
        (recipe("prunevid", None), "prunevid"),
        (recipe("dycoke", None), "dycoke"),
    ],
)
def test_what_the_engine_cannot_honour_is_refused_by_name(given: vtprune.Recipe, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EnginePlan(given, config("qwen2_5_vl"))


def test_layers_that_an_engine_does_not_load_are_refused() -> None:
    plan = EnginePlan(recipe("cls_topk", options={"layer": -1}), config("llava"))
    depth = plan.base.config.vision_config.num_hidden_layers
    EngineSignals(plan.base, "image", plan.needs, [torch.nn.Identity()] * depth)
    with pytest.raises(UnsupportedModel, match=f"first {depth - 1} of the {depth}"):
        EngineSignals(plan.base, "image", plan.needs, [torch.nn.Identity()] * (depth - 1))


def test_digests_differ_by_method_budget_and_option() -> None:
    plans = [EnginePlan(r, config("llava")) for r in (recipe("divprune"), recipe("uniform"), recipe("divprune", 0.5))]
    marks = {plan.digest(None) for plan in plans} | {plans[0].digest(keep) for keep in (1, 1.0, 0.3)}
    assert len(marks) == 6
    assert plans[0].digest(0.5) == plans[2].digest(None)


def test_a_vllm_without_what_is_needed_goes_on_without_the_plug_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "vtprune.integrations.vllm.architectures", raising=False)
    register()
    assert "cannot prune in this vLLM" in caplog.text


def test_one_plan_for_one_content() -> None:
    text = recipe("divprune").to_json()
    assert plan_of(text, config("llava")) is plan_of(text, config("llava"))
    assert plan_of(text, config("llava")) is not plan_of(text, config("qwen2_vl"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_places_survive_in_every_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(5, 3).to(dtype)
    places = torch.tensor([[0, 255, 256, 257, 65535], [1, 2, 3, 4, 5], [60000, 0, 1, 999, 65280]])
    back, found = positions.without_places(positions.with_places(features, places))
    assert torch.equal(back, features)
    assert torch.equal(found, places)


def _prompt(one_row: bool) -> tuple[torch.Tensor, list[tuple[int, int, int]], list[torch.Tensor], torch.Tensor]:
    """Two words, an image of 4 of 9 tokens, (three words), one of 2 of 6, two words: unpruned positions and choices."""
    between = 0 if one_row else 3
    own = [torch.arange(9).expand(3, -1), torch.arange(6).expand(3, -1)]
    if not one_row:
        own = [
            torch.stack([torch.zeros(n).long(), torch.arange(n) // w, torch.arange(n) % w]) for n, w in ((9, 3), (6, 3))
        ]
    parts, first = [], 0
    for words, image in ((2, own[0]), (between, own[1]), (2, None)):
        parts.append(torch.arange(words).expand(3, -1) + first)
        first += words
        if image is not None:
            parts.append(image + first)
            first += int(image.max()) + 1
    kept = [torch.tensor([0, 3, 4, 8]), torch.tensor([1, 5])]
    lengths = [(2, 4, 9), (6 + between, 2, 6)]
    places = torch.cat([image[:, idx] for image, idx in zip(own, kept)], 1)
    return torch.cat(parts, 1), lengths, kept, places


@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_positions_chunk_by_chunk(one_row: bool, step: int) -> None:
    """Whatever the chunks, whether one is computed again or not: a gather of the unpruned positions."""
    whole, lengths, kept, places = _prompt(one_row)
    stays = torch.ones(whole.shape[1], dtype=torch.bool)
    full_start, visual = [], torch.zeros(0, dtype=torch.bool)
    taken = done = 0
    for (start, k, n), idx in zip(lengths, kept):
        at = taken + start - done
        stays[at : at + n] = False
        stays[at + idx] = True
        visual = torch.cat([visual, torch.zeros(start - done, dtype=torch.bool), torch.ones(k, dtype=torch.bool)])
        full_start.append(at)
        taken, done = at + n, start + k
    wanted = whole[:, stays]
    length = wanted.shape[1]
    visual = torch.cat([visual, torch.zeros(length - len(visual), dtype=torch.bool)])
    found, delta = positions.begin(whole, lengths, length, one_row)
    rows = 1 if one_row else 3
    assert torch.equal(found[:rows, ~visual], wanted[:rows, ~visual])
    for start in [*range(0, length, step), 0, *range(0, length, step)]:  # the second time as after a preemption
        window = visual.nonzero().flatten()
        inside = (window >= start) & (window < start + step)
        if inside.any():
            found, again = positions.arrive(found, visual, places[:, inside], start, one_row)
            assert again == delta
    assert torch.equal(found[:rows], wanted[:rows])
    assert length + delta == int(whole.max()) + 1
