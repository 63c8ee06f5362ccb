"""HoliTom's inner merge: the sequential rule restated in float64, whole models, bad input."""

from __future__ import annotations

import families
import oracles
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Visual
from vtprune.methods.in_llm.holitom_inner import LAST_ROW

LAYER = 3


def oracle(x: Tensor, row: Tensor, k: int) -> tuple[list[int], Tensor]:
    """One dropped token after the other, as https://arxiv.org/abs/2505.21334's code runs."""
    kept = sorted(oracles.top(row, k))
    before, after = x.double(), x.double().clone()
    for i in range(len(x)):
        if i not in kept:
            likeness = [oracles.cosine(before[i], before[j]) for j in kept]
            target = kept[likeness.index(max(likeness))]
            after[target] = (after[target] + before[i]) / 2
    return kept, after[kept]


def unit(n: int, k: int, seed: int = 0, width: int = 8) -> Visual:
    g = torch.Generator().manual_seed(seed)
    row = torch.rand(n, generator=g).softmax(0)
    return Visual(torch.randn(n, width, generator=g), k, signals={LAST_ROW: row})


@pytest.mark.parametrize(("n", "k"), [(40, 7), (40, 39), (40, 1), (40, 40), (700, 30), (1, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_sequential_rule(n: int, k: int, seed: int) -> None:
    v = unit(n, k, seed)
    answer = vtprune.create("holitom_inner")(v)
    kept, states = oracle(v.x, v.signals[LAST_ROW], k)
    assert answer.idx.tolist() == kept
    assert answer.order is not None
    assert answer.order.tolist() == oracles.top(v.signals[LAST_ROW], k)
    torch.testing.assert_close(answer.apply(v.x).double(), states, rtol=0, atol=1e-5)


def test_weights_of_every_kept_token_sum_to_one() -> None:
    v = unit(3000, 2)  # more than a thousand halvings: 2^-n is 0 in float32, the sum still 1
    answer = vtprune.create("holitom_inner")(v)
    assert answer.dst is not None
    assert answer.w is not None
    torch.testing.assert_close(torch.zeros(2).index_add(0, answer.dst, answer.w), torch.ones(2))


def test_ties_go_to_the_lower_index() -> None:
    x = torch.eye(3)[[0, 0, 1, 0, 0]]
    answer = vtprune.create("holitom_inner")(Visual(x, 3, signals={LAST_ROW: torch.full((5,), 0.2)}))
    assert answer.idx.tolist() == [0, 1, 2]
    assert answer.dst is not None
    assert answer.dst[3:].tolist() == [0, 0]


def test_half_precision_scores_in_float32() -> None:
    v = unit(50, 10)
    half = Visual(v.x.bfloat16(), 10, signals=v.signals)
    answer = vtprune.create("holitom_inner")(half)
    kept, states = oracle(half.x, v.signals[LAST_ROW], 10)
    assert answer.idx.tolist() == kept
    assert answer.apply(half.x).dtype == torch.bfloat16
    torch.testing.assert_close(answer.apply(half.x).double(), states, rtol=0, atol=0.02)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_merged_states_enter_the_layer(family: str) -> None:
    """What layer LAYER runs on is the rule applied to what enters it unpruned."""
    model, batch = families.model(family), families.inputs(family, rows=(2,))
    stages, log = reference.spy(vtprune.create("holitom_inner", layer=LAYER).stages(0.5, families.depth(model)))
    seen: list[Tensor] = []
    layer = model.get_decoder().layers[LAYER]
    with torch.no_grad(), vtprune.patch(model, stages) as handle:

        def see(m: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        hook = layer.register_forward_pre_hook(see, with_kwargs=True)
        model(**batch)
        hook.remove()
        index = handle.last.index[0].tolist()
    for view, positions in zip(log[0].units, batch.units[0], strict=True):
        kept, states = oracle(view.x, view.signals[LAST_ROW], view.budget)
        slots = [index.index(positions[j]) for j in kept]
        torch.testing.assert_close(seen[0][0, slots].double(), states, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("depth", "layer"), [(28, 18), (80, 51), (32, 21), (4, 3), (2, 1)])
def test_the_published_place_is_a_share_of_the_depth(depth: int, layer: int) -> None:
    (stage,) = vtprune.create("holitom_inner").stages(0.5, depth)
    assert stage.where == layer
    assert vtprune.create("holitom_inner", layer=2).stages(0.5, depth)[0].where == 2


@pytest.mark.parametrize("bad", [0, -1, 0.0, 1.0, 1.5, float("nan")])
def test_layer_outside_its_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"layer=.*int >= 1"):
        vtprune.create("holitom_inner", layer=bad)


@pytest.mark.parametrize("bad", [True, "3", None])
def test_layer_of_another_type(bad: object) -> None:
    with pytest.raises(TypeError, match="layer="):
        vtprune.create("holitom_inner", layer=bad)


def test_half_of_the_tokens_stay_without_keep() -> None:
    method, v = vtprune.create("holitom_inner"), unit(6, 3)
    assert torch.equal(method(Visual(v.x, None, signals=v.signals)).idx, method(v).idx)
    assert len(method(Visual(v.x[:1], None, signals={LAST_ROW: torch.ones(1)})).idx) == 1


def test_bad_values_and_missing_parts() -> None:
    method = vtprune.create("holitom_inner")
    v = unit(6, 3)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        method(Visual(v.x * torch.nan, 3, signals=v.signals))
    with pytest.raises(ValueError, match="last_row"):
        method(Visual(v.x, 3))


def test_linear_attention_is_refused_with_the_option_that_works() -> None:
    model, batch = families.model("qwen3_5"), families.inputs("qwen3_5", rows=(1,))
    method = vtprune.create("holitom")
    with pytest.raises(
        vtprune.UnsupportedModel, match=r"linear_attention.*leave this stage out of holitom: inner=False"
    ):
        vtprune.patch(model, method, keep=0.5)
    with vtprune.patch(model, vtprune.create("holitom", inner=False), keep=0.5), torch.inference_mode():
        model(**batch)
