"""PyramidDrop, signals of the layer a stage stands at, and positions renumbered inside the LLM."""

from __future__ import annotations

from typing import Any, ClassVar

import families
import pytest
import reference
import test_seam_calls as calls
import torch
from torch import Tensor

import vtprune
from vtprune import Assignment, Method, Signal, Stage, Visual

ROW, TEXT = Signal("last_row", 0), Signal("from_text", 0)
STEPS, ROWS = 5, (2, 0, 1)


class Looking(Method):
    """Keeps the first tokens and remembers what the layer itself said."""

    name = "looking"
    seen: ClassVar[list[dict[Signal, Tensor]]] = []

    @property
    def needs(self) -> tuple[Signal, ...]:
        return ROW, TEXT

    def __call__(self, v: Visual) -> Assignment:
        self.seen.append(dict(v.signals))
        return Assignment(torch.arange(v.budget))


def pyramid_by_hand(row: list[float], budget: int) -> list[int]:
    """The `budget` largest entries, an equal one to the lower index; ascending."""
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return sorted(ranked[:budget])


@pytest.mark.parametrize(("n", "budget", "ties"), [(1, 1, False), (7, 3, False), (40, 20, True), (144, 18, False)])
def test_selection_equals_the_oracle(n: int, budget: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    row = torch.rand(n, generator=generator)
    row = (row * 4).round() / 4 if ties else row
    method: Any = vtprune.create("pyramiddrop")
    answer = method(Visual(torch.zeros(n, 2), budget, signals={ROW: row}))
    assert answer.idx.tolist() == pyramid_by_hand(row.double().tolist(), budget)
    assert answer.scores is not None


def test_published_schedule() -> None:
    method = vtprune.create("pyramiddrop")
    for keep in (None, 0.125):
        stages = method.stages(keep, 32)
        assert [s.where for s in stages] == [8, 16, 24]
        assert [s.keep for s in stages] == pytest.approx([0.5, 0.25, 0.125])
        assert [s.budgets([576])[0] for s in stages] == [288, 144, 72]
    assert [s.where for s in method.stages(0.5, 28)] == [7, 14, 21]
    assert [s.keep for s in method.stages(5, 32)] == [20, 10, 5]
    assert [s.keep for s in method.stages(1.0, 32)] == [1.0] * 3
    mine = vtprune.create("pyramiddrop", layers=(2, 9), ratios=(0.9, 0.4))
    assert [(s.where, s.keep) for s in mine.stages(None, 32)] == [(2, 0.9), (9, 0.4)]
    assert not any(s.compact for s in mine.stages(None, 32))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": ()}, TypeError, "tuple of decoder layers"),
        ({"layers": (3, 2)}, ValueError, "ascending"),
        ({"layers": (-1, 2)}, ValueError, "ascending layers >= 0"),
        ({"layers": (2.5,)}, TypeError, "tuple of decoder layers"),
        ({"ratios": (0.5,)}, ValueError, "3 stages"),
        ({"ratios": (0.5, 0.6, 0.1)}, ValueError, "none above the one before"),
        ({"ratios": (0.5, 0.25, 0.0)}, ValueError, r"floats in \(0, 1\]"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtprune.create("pyramiddrop", **options)


def test_keep_and_ratios_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="give one of them"):
        vtprune.patch(families.model("llava"), "pyramiddrop", keep=0.5, ratios=(0.5, 0.25, 0.125))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma", "internvl", "glm4v", "smolvlm"])
def test_own_layer_equals_the_eager_map_of_the_unpruned_model(family: str, attention: str) -> None:
    """Rows of layer 2 on what enters it, although on the tokens that stay it gives others; layer 0 as well."""
    model, batch = families.model(family, attention), families.inputs(family)
    (units,) = batch.units
    with torch.no_grad():
        maps = families.model(family, "eager")(**batch, output_attentions=True).attentions
    text = [p for p in range(batch["input_ids"].shape[1]) if p > units[0][0] and not any(p in u for u in units)]
    text = text or [batch["input_ids"].shape[1] - 1]
    for layer in (0, 2):
        method = Looking()
        method.seen.clear()
        with vtprune.patch(model, Stage(layer, method, keep=1, per="sample")), torch.no_grad():
            model(**batch)
        tokens = sorted(p for unit in units for p in unit)
        mean = maps[layer][0].mean(0)
        (seen,) = method.seen
        torch.testing.assert_close(seen[ROW], mean[-1, tokens], rtol=0, atol=1e-6)
        torch.testing.assert_close(seen[TEXT], mean[text][:, tokens].mean(0), rtol=0, atol=1e-6)


def test_looking_ahead_stores_nothing_and_leaves_no_trace() -> None:
    model, batch = families.model("llava"), families.inputs("llava")
    with reference.untouched(model), vtprune.patch(model, Stage(2, Looking(), keep=3)), torch.no_grad():
        out = model(**batch, use_cache=True)
        cache = out.past_key_values
    length, visual = batch["input_ids"].shape[1], sum(map(len, batch.units[0]))
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert stored == [length, length, length - visual + 3, length - visual + 3]


def test_a_layer_that_has_not_run_is_refused() -> None:
    class Early(Looking):
        @property
        def needs(self) -> tuple[Signal, ...]:
            return (Signal("last_row", 1),)

    with pytest.raises(ValueError, match="has not run yet"):
        vtprune.patch(families.model("llava"), Stage(1, Early(), keep=3))


@pytest.mark.parametrize("family", ["llava", "llava_next", "mistral3", "paligemma"])
def test_compact_fastv_equals_the_oracle(family: str) -> None:
    """Renumbered behind layer 2: prefill and decode of a ragged, left-padded batch against the layer walk."""
    model, batch = families.model(family), families.inputs(family, rows=ROWS)
    fastv = vtprune.create("fastv")
    chosen = [Stage(k, fastv, keep=keep, positions="compact") for k, keep in ((1, 0.6), (2, 3))]
    stages, log = reference.spy(chosen)
    with vtprune.patch(model, stages):
        tokens, ours = reference.greedy(model, batch, STEPS)
    for row in range(len(ROWS)):
        calls.close(ours[row], calls.oracle(family, log, tokens[row], ROWS, row))


def test_positions_differ_only_where_they_should() -> None:
    """The same tokens, positions kept and renumbered: other logits; an unknown word of the cache is the last id."""
    model, batch = families.model("llava"), families.inputs("llava")
    with vtprune.patch(model, "pyramiddrop", keep=0.2, positions="compact"):
        _, compact = reference.greedy(model, batch, 3)
    with vtprune.patch(model, "pyramiddrop", keep=0.2):
        _, kept = reference.greedy(model, batch, 3)
    assert (compact - kept).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_ids_equal_the_length_of_each_layers_cache(family: str) -> None:
    """What the official code does: a new token's id at a layer is the number of tokens the layer holds."""
    model, batch = families.fresh(family), families.inputs(family)
    seen: list[list[int]] = []
    renumbered = vtprune.patch(model, "pyramiddrop", keep=0.2, layers=(1, 2, 3), positions="compact")
    with renumbered, torch.no_grad():
        out = model(**batch, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        stored = [layer.keys.shape[2] for layer in cache.layers]
        for layer in model.get_decoder().layers:
            layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"].tolist()), with_kwargs=True)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert seen == [[[n]] for n in stored]
    assert len(set(stored)) == 4


@pytest.mark.parametrize(
    "check",
    [
        calls.test_beams,
        calls.test_static_cache_equals_dynamic,
        calls.test_compiled_decode_is_one_graph,
        calls.test_manual_loop_without_positions_or_mask,
        calls.test_no_cache_equals_cache,
    ],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_way_of_calling(family: str, check: Any) -> None:
    check(family, "pyramiddrop")


def test_multi_axis_positions_are_never_renumbered() -> None:
    model = families.model("qwen3_vl")
    with pytest.raises(vtprune.UnsupportedModel, match="M-RoPE"):
        vtprune.patch(model, "pyramiddrop", keep=0.3, layers=(2, 3), positions="compact")


def test_a_renumbered_cache_needs_its_patch() -> None:
    """Neither an unpatched model nor another patch may go on with it."""
    model, batch = families.model("llava"), families.inputs("llava")
    with vtprune.patch(model, "pyramiddrop", keep=0.3), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    word: dict[str, Any] = {"input_ids": torch.tensor([[families.FIRST_TEXT]]), "past_key_values": cache}
    with pytest.raises(vtprune.UnsupportedCall, match="unpatched model"):
        model(**word)
    with (
        vtprune.patch(model, "fastv", keep=0.3, layer=3),
        pytest.raises(vtprune.UnsupportedCall, match="at layers where this patch has no stage"),
    ):
        model(**word)
