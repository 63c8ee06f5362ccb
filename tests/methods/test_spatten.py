"""SpAtten: attention received so far, restated in float64 from eager maps; its cascade, schedule and whole models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import oracles
import pytest
import reference
import test_seam_calls as calls
import torch
from test_conformance import NO_LAYERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.generation.configuration_utils import CompileConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import vtprune
from vtprune import Signal, Stage, Visual, tap
from vtprune.hf import attention_probe
from vtprune.methods.in_llm.spatten import RECEIVED
from vtprune.methods.in_llm.spatten_heads import SAID, SpAttenHeads, most_important
from vtprune.signals import product

FAMILIES = ["llava", "llava_onevision", "qwen2_5_vl", "qwen2_5_vl-video", "qwen3_vl", "mistral3"]
LAYERS = (2, 3)
HEADS = 2


def cascade() -> list[Stage]:
    return vtprune.create("spatten", layers=LAYERS, ratios=(0.6, 0.3)).stages(None, 4)


def importance(maps: list[tuple[Tensor, list[int]]], length: int) -> list[float]:
    """s_j of every token of one row: what maps [H, n, n] give it, each over the tokens whose places go with it."""
    out = [0.0] * length
    for weights, places in maps:
        for query in weights.double().sum(1):  # over queries: one vector a head
            for place, share in zip(places, query.tolist()):
                out[place] += share / len(weights)
    return out


def maps_of(model: Any, batch: Any, upto: int) -> list[Tensor]:
    """Attention weights [H, n, n] of the layers before `upto`, of the first row."""
    held: list[Tensor] = []
    layers = model.get_decoder().layers[:upto]
    hooks = [layer.self_attn.register_forward_hook(lambda m, a, out: held.append(out[1][0])) for layer in layers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return held


@pytest.mark.parametrize("rows", [(1,), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_that_of_the_whole_maps(family: str, rows: tuple[int, ...]) -> None:
    """Also of a padded row in a batch: its padding neither gives nor receives."""
    model, eager = families.model(family), families.model(family, "eager")
    stages, log = reference.spy([Stage(LAYERS[1], vtprune.create("spatten"), keep=0.5)])
    with torch.no_grad(), vtprune.patch(model, stages):
        model(**families.inputs(family, rows=rows))
    (call,) = log
    for row, (view, answer) in enumerate(zip(call.units, call.answers, strict=True)):
        alone = families.inputs(family, rows=rows, only=row)
        length = alone["input_ids"].shape[1]
        scores = importance([(m, list(range(length))) for m in maps_of(eager, alone, LAYERS[1])], length)
        visual = [p for unit in alone.units[0] for p in unit]
        expected = torch.tensor([scores[p] for p in visual], dtype=torch.float64)
        torch.testing.assert_close(view.signals[RECEIVED].double(), expected, rtol=1e-4, atol=1e-6)
        assert answer.idx.tolist() == sorted(oracles.top(expected, view.budget))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_go_on_without_the_tokens_that_left(family: str) -> None:
    """Behind a stage only those that are left give and receive; what they had received before still counts."""
    model, eager, batch = families.model(family), families.model(family, "eager"), families.inputs(family, rows=(2,))
    length = batch["input_ids"].shape[1]
    stages, log = reference.spy(cascade())
    with torch.no_grad(), vtprune.patch(model, stages) as handle:
        model(**batch)
        lengths = handle.last.lengths
    assert lengths[0] > lengths[LAYERS[0]] > lengths[LAYERS[1]]
    first, second = log
    visual = [p for unit in batch.units[0] for p in unit]
    kept = [visual[i] for i in first.answers[0].idx]
    left = [p for p in range(length) if p not in visual or p in kept]
    with vtprune.patch(eager, cascade()[:1]):
        maps = maps_of(eager, batch, LAYERS[1])
    scores = importance([(m, list(range(length)) if len(m[0]) == length else left) for m in maps], length)
    expected = torch.tensor([scores[p] for p in kept], dtype=torch.float64)
    torch.testing.assert_close(second.units[0].signals[RECEIVED].double(), expected, rtol=1e-4, atol=1e-6)
    assert second.answers[0].idx.tolist() == sorted(oracles.top(expected, second.units[0].budget))


@pytest.mark.parametrize("family", FAMILIES)
def test_cascade_equals_the_oracle(family: str) -> None:
    """Prefill and decode on layers walked by hand, in a ragged batch; eager and sdpa."""
    rows = (2, 0, 1)
    for attention in ("sdpa", "eager"):
        model, batch = families.model(family, attention), families.inputs(family, rows=rows)
        stages, log = reference.spy(cascade())
        with vtprune.patch(model, stages):
            tokens, ours = reference.greedy(model, batch, 4)
        alone = [families.inputs(family, rows=rows, only=row).units[0] for row in range(len(rows))]
        samples = [[[p for unit in units for p in unit]] if units else [] for units in alone]
        cuts = reference.cuts_of_row(log, range(len(rows)), samples)
        for row in range(len(rows)):
            theirs = reference.expected(model, family, rows, row, cuts[row], tokens[row])
            torch.testing.assert_close(ours[row], theirs, rtol=0, atol=1e-5)


def test_keep_all_changes_no_bit_and_removal_restores() -> None:
    model, batch = families.model("qwen3_vl"), families.inputs("qwen3_vl", rows=(2, 0, 1))
    with torch.no_grad():
        before = model(**batch).logits
        with vtprune.patch(model, "spatten", keep=1.0, layers=LAYERS):
            assert torch.equal(model(**batch).logits, before)
        with reference.untouched(model), vtprune.patch(model, "spatten", keep=0.3, layers=LAYERS):
            assert not torch.equal(model(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen = max(self.seen, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("masked", ["causal", "padding", "whole"])
def test_received_in_blocks_equals_the_whole_map(monkeypatch: pytest.MonkeyPatch, masked: str) -> None:
    """Grouped heads, keys of an earlier call, a padded row; no block is larger than a few queries times all keys."""
    monkeypatch.setattr(product, "MASKED", 1)
    n, past, d = 150, 7, 4
    q, k = torch.randn(2, 4, n, d), torch.randn(2, 2, past + n, d)
    real = torch.ones(2, n, dtype=torch.bool)
    real[1, :9] = real[1, -5:] = False
    allowed = torch.ones(n, past + n, dtype=torch.bool).tril(past).repeat(2, 1, 1, 1).view(2, 1, n, past + n)
    if masked == "causal":
        real[:] = True
        mask = None
    else:
        keys = torch.cat([torch.ones(2, past, dtype=torch.bool), real], 1)
        allowed = allowed & keys[:, None, None]
        mask = keys[:, None, None] if masked == "padding" else allowed
        allowed = allowed | ~real[:, None, :, None]  # padded queries do whatever, and do not count
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    expected = (oracles.attention(q, k, bias, 0.5) * real[:, None, :, None]).sum(2).mean(1)[:, past:]
    with Largest() as largest:
        ours = product.LayerAttention(q, k, None, mask, 0.5, past).given_by(real)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    assert largest.seen <= 4 * product.ROWS * (past + n) * 2
    assert masked == "causal" or not ours[1, ~real[1]].any()


def test_schedule() -> None:
    method = vtprune.create("spatten")
    assert [s.where for s in method.stages(None, 24)] == [2, 3, 5, 11]
    assert [s.budgets([1024])[0] for s in method.stages(None, 24)] == [922, 819, 614, 307]  # they cut 921.6 off
    assert [s.keep for s in method.stages(0.3, 24)] == pytest.approx([0.9, 0.8, 0.6, 0.3])
    assert [s.keep for s in method.stages(30, 24)] == [90, 80, 60, 30]
    assert [s.keep for s in method.stages(1.0, 32)] == [1.0] * 4
    assert [s.where for s in method.stages(0.5, 32)] == [3, 4, 7, 15]
    assert [s.where for s in method.stages(0.5, 4)] == [2, 3]
    assert [s.keep for s in cascade()] == [0.6, 0.3]
    heads = vtprune.create("spatten", heads=0.6).stages(None, 24)[4:]
    assert [(s.where, s.budgets([16])) for s in heads] == [(16, [13]), (22, [10])]


def test_attention_is_read_once_however_many_stages() -> None:
    """Three stages over the same first layers: each of those is added once."""
    model, batch = families.model("llava"), families.inputs("llava")
    stages, log = reference.spy([Stage(k, vtprune.create("spatten"), keep=share) for k, share in ((1, 0.9), (2, 0.8))])
    with torch.no_grad(), vtprune.patch(model, stages):
        model(**batch)
    length = batch["input_ids"].shape[1]
    for call, layers in zip(log, (1, 2)):
        received = call.units[0].signals[RECEIVED].sum()
        assert 0 < float(received) < layers * length, "more than all queries of these layers have to give"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": (0, 2)}, ValueError, "use >= 1"),
        ({"layers": (3, 2)}, ValueError, "ascending"),
        ({"layers": 3}, TypeError, "tuple"),
        ({"ratios": (0.5,)}, ValueError, "4 stages"),
        ({"heads": 0.0}, ValueError, "heads=0.0"),
        ({"values": 1}, ValueError, "values=1"),
        ({"values": 1.5}, ValueError, "values=1.5"),
        ({"layers": (2, 3), "ratios": (0.3, 0.5)}, ValueError, "none above"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtprune.create("spatten", **options)


def test_bad_values_and_missing_parts() -> None:
    method = vtprune.create("spatten")
    with pytest.raises(ValueError, match="received_so_far"):
        method(Visual(torch.randn(6, 4), 3))
    with pytest.raises(ValueError, match=r"NaN|finite"):
        method(Visual(torch.randn(6, 4), 3, signals={RECEIVED: torch.full((6,), torch.nan)}))
    with pytest.raises(ValueError, match=r"can keep 1\.\.6"):
        method(Visual(torch.randn(6, 4), 7, signals={RECEIVED: torch.rand(6)}))
    assert len(method(Visual(torch.randn(6, 4), None, signals={RECEIVED: torch.rand(6)})).idx) == 3
    with pytest.raises(TypeError, match=r"keep=0.5 and ratios"):
        vtprune.create("spatten", ratios=(0.9, 0.8, 0.6, 0.3)).stages(0.5, 24)
    with pytest.raises(UnsupportedModelOrValue, match="layer"):
        vtprune.patch(families.model("llava"), "spatten", keep=0.5, layers=(2, 9))


UnsupportedModelOrValue = (ValueError, vtprune.UnsupportedModel)


def test_the_sum_is_over_all_layers_that_ran() -> None:
    class Earlier(type(vtprune.create("spatten"))):  # type: ignore[misc]
        @property
        def needs(self) -> tuple[Signal, ...]:
            return (Signal("received_so_far", -2),)

    with pytest.raises(ValueError, match="offset -1"):
        vtprune.patch(families.model("llava"), Stage(3, Earlier(), keep=3))


def test_most_important_of_every_head() -> None:
    """Between what stays in any case the best, of equal ones the first; as many as there are at most."""
    scores = torch.randn(2, 3, 20)
    scores[0, 0] = 0
    kept = most_important(scores, 5, first=4, last=6)
    for layer, heads in zip(scores, kept):
        for row, ours in zip(layer, heads):
            best = [4 + i for i in oracles.top(row[4:14], 5)]
            assert ours.tolist() == [*range(4), *sorted(best), *range(14, 20)]
    assert most_important(scores, 10, 4, 6).shape == (2, 3, 20)
    for count, first, last in ((11, 4, 6), (-1, 0, 0), (1, 30, 0), (1, 0, -1)):
        with pytest.raises(ValueError, match="20 slots"):
            most_important(scores, count, first, last)


def test_a_copied_model_keeps_its_own_scores() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava")
    with torch.no_grad(), vtprune.patch(model, "spatten", keep=0.3) as handle:
        ours = model(**batch).logits
        again = copy.deepcopy(model)(**batch).logits
        twice = model(**batch).logits
        assert handle.last.units
    assert torch.equal(ours, again)
    assert torch.equal(ours, twice), "nothing is left of the call before"


@pytest.mark.parametrize("check", [calls.test_static_cache_equals_dynamic, calls.test_no_cache_equals_cache])
def test_every_way_of_calling(check: Any) -> None:
    check("llava", "spatten")


# Local value pruning and heads


def few_values(module, query, key, value, attention_mask, scaling, **_):
    """Eager attention in float64 whose queries see the values of the int(0.3 n) >= 1 heaviest of their n keys."""
    share = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(share, 1) for x in (key, value))
    open_ = attention_mask[..., : keys.shape[2]] == 0
    logits = (query.double() @ keys.mT * scaling).masked_fill(~open_, -torch.inf)
    weights = torch.where(open_.any(-1, keepdim=True), logits.softmax(-1), 0)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape[:3])):
        row, seen = weights[tuple(place)], int(open_[place[0], 0, place[2]].sum())
        row[oracles.top(row, len(row))[max(1, int(0.3 * seen)) :]] = 0
    return (weights @ values).to(value.dtype).transpose(1, 2), None


@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_local_value_pruning(family: str, keep: float) -> None:
    """In prefill and decode of a ragged batch, after tokens left as well."""
    AttentionInterface.register("few_values", few_values)
    AttentionMaskInterface.register("few_values", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model, batch = families.fresh(family), families.inputs(family, rows=(1, 0))
    model.get_decoder().config._attn_implementation = "few_values"
    with vtprune.patch(model, "spatten", keep=keep):
        _, theirs = reference.greedy(model, batch, 3)
    for attention in ("sdpa", "eager"):
        model = families.model(family, attention)
        _, dense = reference.greedy(model, batch, 3)
        with vtprune.patch(model, "spatten", keep=keep, values=0.3):
            _, ours = reference.greedy(model, batch, 3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert not torch.allclose(ours, dense, atol=1e-3)
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("few_values", None)


@pytest.mark.parametrize("masked", ["causal", "padding", "whole"])
def test_reweighing_nothing_is_attention(monkeypatch: pytest.MonkeyPatch, masked: str) -> None:
    monkeypatch.setattr(attention_probe, "MASKED", 1)
    n, past = 9, 3
    q, k, v = torch.randn(2, 4, n, 8), torch.randn(2, 2, n + past, 8), torch.randn(2, 2, n + past, 8)
    allowed = torch.ones(n, n + past, dtype=torch.bool).tril(past).expand(2, 1, -1, -1).clone()
    keys = torch.ones(2, n + past, dtype=torch.bool)
    keys[1, :2] = masked == "causal"
    allowed &= keys[:, None, None]
    mask = {"causal": None, "padding": keys[:, None, None], "whole": allowed}[masked]
    seen = []
    ours = tap.reweighed(q, k, v, mask, 0.3, lambda rows, count: seen.append(count) or rows)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
    assert torch.equal(torch.cat(seen, -1), allowed.sum(-1))


@contextmanager
def silenced(model: Any, first: int, heads: list[list[int]]) -> Iterator[None]:
    """A stock model whose output projections from layer `first` on get zeros of all but the given heads of each row."""

    def silence(module: Any, args: Any) -> Any:
        (said,) = args
        count = model.get_decoder().config.num_attention_heads
        by_head = said.unflatten(-1, (count, -1)).clone()
        for i, row in enumerate(by_head):
            row[:, [h for h in range(count) if h not in heads[i * len(heads) // len(by_head)]]] = 0
        return by_head.flatten(-2)

    layers = model.get_decoder().layers[first:]
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(silence) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def said(model: Any, batch: Any, upto: int) -> list[float]:
    """What each head says in the layers before `upto`: |output| over channels and tokens of the first row."""
    out = [0.0] * HEADS

    def hear(module: Any, args: Any) -> None:
        for h, part in enumerate(args[0][0].double().chunk(HEADS, -1)):
            out[h] += float(part.abs().sum())

    layers = model.get_decoder().layers[:upto]
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(hear) for layer in layers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [name for name in families.NAMES if name not in (*NO_LAYERS, "qwen3_5")])
def test_silent_heads(family: str, attention: str) -> None:
    """Those that said least so far, in rows with images; in prefill, decode and beams as in a stock model."""
    rows = (2, 0, 1)
    model, batch = families.model(family, attention), families.inputs(family, rows=rows)
    options = {"do_sample": False, "num_beams": 2, "max_new_tokens": 4}
    spoke = [said(model, families.inputs(family, rows=rows, only=row), 3) for row in range(len(rows))]
    stages, log = reference.spy([Stage(3, SpAttenHeads(), keep=0.5)])
    with reference.untouched(model), vtprune.patch(model, stages) as handle:
        _, ours = reference.greedy(model, batch, 4)
        heads = [row.tolist() for row in handle.last.heads[3]]
        beams = model.generate(**batch, **options)
    seen = iter(log[0].units)
    for row, images in enumerate(rows):
        if images:
            ours_said = next(seen).signals[SAID].double()
            torch.testing.assert_close(ours_said, torch.tensor(spoke[row]).double(), rtol=1e-4, atol=1e-4)
        most = sorted(oracles.top(torch.tensor(spoke[row]), HEADS // 2))
        assert heads[row] == (most if images else list(range(HEADS)))
    with silenced(model, 3, heads):
        _, theirs = reference.greedy(model, batch, 4)
        assert torch.equal(model.generate(**batch, **options), beams)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_heads_fall_silent_for_good() -> None:
    """A second stage chooses among those that speak; its layers' outputs hold what the first silenced at zero."""
    config = copy.deepcopy(families.model("llava").config)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 8, 2
    model, batch = type(families.model("llava"))(config).eval(), families.inputs("llava", rows=(1, 2))
    stages, log = reference.spy([Stage(k, SpAttenHeads(), keep=share) for k, share in ((2, 0.75), (3, 0.5))])
    with torch.no_grad(), vtprune.patch(model, stages) as handle:
        ours = model(**batch).logits
        heads = {k: [row.tolist() for row in rows] for k, rows in handle.last.heads.items()}
    assert [v.n for call in log for v in call.units] == [8, 8, 6, 6]
    assert all(set(after) < set(before) for before, after in zip(heads[2], heads[3], strict=True))
    with torch.no_grad(), silenced(model, 2, heads[2]), silenced(model, 3, heads[3]):
        torch.testing.assert_close(ours, model(**batch).logits, rtol=0, atol=1e-5)


def test_tokens_and_heads_together_in_two_turns() -> None:
    """The schedule by name; a second turn of text is answered by the heads that the first left."""
    model, batch = families.model("llava"), families.inputs("llava")
    words = torch.tensor([families.text(5, 4).ids])
    with torch.no_grad(), vtprune.patch(model, "spatten", keep=0.4, heads=0.5) as handle:
        assert [(s.where, s.method.name) for s in handle.stages][-1] == (3, "spatten_heads")
        cache = model(**batch, use_cache=True).past_key_values
        heads = [row.tolist() for row in handle.last.heads[3]]
        ours = model(input_ids=words, past_key_values=cache).logits
    with torch.no_grad(), vtprune.patch(model, "spatten", keep=0.4), silenced(model, 3, heads):
        cache = model(**batch, use_cache=True).past_key_values
        theirs = model(input_ids=words, past_key_values=cache).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_silent_heads_go_with_their_rows() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1, 0))
    with torch.no_grad(), vtprune.patch(model, Stage(3, SpAttenHeads(), keep=0.5)):
        cache = model(**batch, use_cache=True).past_key_values
    held = cache.layers[3].heads
    assert held.sum(1).tolist() == [1, 2]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[3].heads, held.flip(0))
    cache.reset()
    assert cache.layers[3].heads is None


def test_a_cache_with_silent_heads_goes_nowhere_else() -> None:
    model, batch = families.model("llava"), families.inputs("llava")
    word = torch.tensor([[families.FIRST_TEXT]])
    with torch.no_grad(), vtprune.patch(model, Stage(3, SpAttenHeads(), keep=0.5)):
        cache = model(**batch, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(vtprune.UnsupportedCall, match="silent heads"):
        model(input_ids=word, past_key_values=cache)
    with (
        torch.no_grad(),
        vtprune.patch(model, "divprune", keep=0.5),
        pytest.raises(vtprune.UnsupportedCall, match="silences none"),
    ):
        model(input_ids=word, past_key_values=cache)


OPTIONS = [{"heads": 0.5}, {"values": 0.3}, {"heads": 0.5, "values": 0.3}]


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_decode_with_a_static_cache(options: dict[str, Any]) -> None:
    """One graph without a break, and the logits of a dynamic cache; of a ragged batch as well, uncompiled."""
    graphs = []
    compiled: Any = CompileConfig(
        fullgraph=True, dynamic=False, mode=None, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    compiled._compile_all_devices = True
    model = families.fresh("llava")
    torch._dynamo.reset()
    with vtprune.patch(model, "spatten", keep=0.5, **options):
        for rows, more in (((2, 0, 1), {}), ((1,), {"compile_config": compiled})):
            batch = families.inputs("llava", rows=rows)
            _, dynamic = reference.greedy(model, batch, 5)
            _, static = reference.greedy(model, batch, 5, cache_implementation="static", **more)
            torch.testing.assert_close(static, dynamic, rtol=0, atol=1e-5)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_all_heads_and_all_values_change_little() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1, 2))
    with torch.no_grad():
        dense = model(**batch).logits
        with vtprune.patch(model, "spatten", keep=1.0, heads=1.0):
            assert torch.equal(model(**batch).logits, dense)
        with vtprune.patch(model, "spatten", keep=1.0, values=1.0):  # computed row by row, so not to the bit
            torch.testing.assert_close(model(**batch).logits, dense, rtol=0, atol=1e-5)


def test_heads_and_values_in_places_that_cannot_be() -> None:
    model = families.model("llava")
    heads = SpAttenHeads()
    with pytest.raises(ValueError, match="decoder layer >= 1"):
        vtprune.patch(model, Stage("llm", heads, keep=0.5))
    late = vtprune.create("spatten", layers=(4, 20), heads=0.5).stages(0.5, 24)
    assert [s.where for s in late] == [4, 20, 20, 22], "no head falls silent before the last tokens go"
    two = [Stage(k, vtprune.create("spatten", values=share), keep=0.5) for k, share in ((1, 0.3), (2, 0.5))]
    with pytest.raises(ValueError, match="use one"):
        vtprune.patch(model, two)
    flash = families.fresh("llava")
    flash.get_decoder().config._attn_implementation = "flash_attention_2"
    for options in ({"values": 0.3}, {"heads": 0.5}):
        with reference.untouched(flash), pytest.raises(vtprune.UnsupportedModel, match=r"flash.*'sdpa'"):
            vtprune.patch(flash, "spatten", keep=0.5, **options)
    with pytest.raises(ValueError, match="head_output"):
        heads(Visual(torch.randn(4, 0), 2))
