"""Tower signals per visual token, against two oracles that know nothing of vtprune.

What the tower computed: a spy on the softmax and matmul calls of an eager model. How its tokens become the LLM's: the
gradient of every projected feature, which tells from which tower tokens it was made.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
import transformers
from signal_oracles import ORACLES, Case
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import vtprune
from vtprune.hf import tower_signals
from vtprune.hf.tower_signals import TowerSignals
from vtprune.model_adapters import towers
from vtprune.model_adapters.towers import attention_modules, has_cls, tower_of
from vtprune.signals import kinds
from vtprune.tap import read
from vtprune.types import Signal, UnsupportedCall, UnsupportedModel

WITH_CLS = {"llava", "llava_next", "llava_next_video", "video_llava", "internvl"}


PACKED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "mistral3"}


def family(name: str) -> str:
    return name.removesuffix("-video").removesuffix("-frames")


def with_cls(name: str) -> bool:
    return family(name) in WITH_CLS


def modality_of(name: str) -> str:
    return "video" if name.endswith("-video") else "image"


ROWS = {row.name: row for row in kinds() if "tower" in row.where and row.source == "attention"}
KINDS = tuple(ROWS)


def needs_of(layer: int) -> list[Signal]:
    return [Signal(kind, layer) for kind in KINDS]


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, however it was passed."""
    return [*args, *kwargs.values()][0]


def visual_inputs(name: str, rows: tuple[int, ...] = (2, 0, 1), seed: int = 0) -> families.Inputs:
    return families.inputs(name, rows=rows, seed=seed)


@contextlib.contextmanager
def observed(base: nn.Module, modality: str, before, after) -> Iterator[None]:
    """Call before() and after(arguments, output) around the features call, as the seam does."""
    name = f"get_{modality}_features"
    original = getattr(base, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before()
        output = original(*args, **kwargs)
        after(inspect.signature(original).bind(*args, **kwargs).arguments, output)
        return output

    setattr(base, name, wrapper)
    try:
        yield
    finally:
        delattr(base, name)


@contextlib.contextmanager
def collected(model: nn.Module, name: str, needs: list[Signal]) -> Iterator[list[list[dict[Signal, Tensor]]]]:
    """Everything that `TowerSignals` answers while the model runs, one list per features call."""
    base, answers = model.base_model, []
    signals = TowerSignals(base, modality_of(name), needs)
    undo = signals.install()
    try:
        with observed(base, modality_of(name), signals.start, lambda *a: answers.append(signals.finish(*a))):
            yield answers
    finally:
        for back in undo:
            back()


# --- the oracles ------------------------------------------------------------------------------------------------------


class Spy(TorchFunctionMode):
    """Softmax weights [B, H, N, N], keys and values [B, H, N, d] of one eager attention module, call by call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inside = False
        self.weights: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.hooks = [
            module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            module.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.inside and func is nn.functional.softmax:
            self.weights.append(out.float())
        if self.inside and func is torch.matmul:
            if len(self.keys) == len(self.values):
                self.queries.append(args[0])
                self.keys.append(args[1].mT)
            else:
                self.values.append(args[1])
        return out

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self.hooks:
            hook.remove()

    def flat(self, kind: str) -> Tensor:
        """[tower tokens, C] in the order in which the tower holds them; scores have C = 1."""
        assert kind in ORACLES, f"signal {kind!r} has no oracle: add one to ORACLES in tests/oracles/signal_oracles.py"
        parts = []
        for q, k, v, weights in zip(self.queries, self.keys, self.values, self.weights):
            x = ORACLES[kind](Case(q, k, v, (weights > 0).any(1), ran=weights)).float()
            x = torch.cat((torch.zeros_like(x[:, :1]), x), 1) if ROWS[kind].of_cls else x  # no score of its own
            x = x * weights.shape[2] if ROWS[kind].over_queries else x  # sums: the unit divides
            parts.append(x if ROWS[kind].vector else x[..., None])
        return torch.cat([x.flatten(0, 1) for x in parts])


def feature_layer(base: Any) -> int:
    """The tower layer whose output is projected, counted from the end."""
    return getattr(base.config, "vision_feature_layer", -1)


def provenance(model: nn.Module, name: str, inputs: dict[str, Any]) -> list[Tensor]:
    """Per entry [n, tower tokens]: the share of every tower token in every visual token; newlines have none.

    Where packing follows the projector it is linear, and the gradient is the share itself. Where it precedes it or
    is learned, the tokens with a gradient are those merged, in equal shares.
    """
    base, held = model.base_model, {}
    tower = tower_of(base, modality_of(name))
    linear = base.config.model_type in ("llava_next", "llava_onevision") or name == "llava_next_video"
    blocks = [parent for parent in tower.modules() if any(c in attention_modules(tower) for c in parent.children())]
    source = base.multi_modal_projector if linear else blocks[feature_layer(base)]

    def hold(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        held["x"] = x = x.detach().requires_grad_()
        return (x, *output[1:]) if isinstance(output, tuple) else x

    entries: list[Tensor] = []
    hook = source.register_forward_hook(hold, prepend=True)  # before transformers' own capturing
    with observed(base, modality_of(name), lambda: None, lambda c, o: entries.extend(o.pooler_output)):
        model(**inputs)
    hook.remove()
    return [torch.stack([_share(t, held["x"], linear) for t in e.flatten(0, -2)]) if e.numel() else e for e in entries]


def _share(token: Tensor, x: Tensor, linear: bool) -> Tensor:
    probe = token[0] if linear else token @ torch.randn(len(token), generator=torch.Generator().manual_seed(5))
    grad = torch.autograd.grad(probe, x, retain_graph=True, allow_unused=True)[0] if probe.requires_grad else None
    if grad is None:
        return torch.zeros(x.shape[:-1].numel())
    if linear:
        return grad[..., 0].flatten()
    touched = (grad.abs().sum(-1).flatten() > 0).float()
    return touched / touched.sum().clamp(min=1)


def expected(name: str, inputs: dict[str, Any], layer: int) -> list[dict[str, Tensor]]:
    """The signals of every entry, from the two oracles only."""
    model = families.model(name, "eager")
    tower = tower_of(model.base_model, modality_of(name))
    with Spy(attention_modules(tower)[layer]) as spy, torch.no_grad():
        model(**inputs)
    tiles, _, _, length = spy.weights[0].shape
    shares = provenance(model, name, inputs)
    entries: list[dict[str, Tensor]] = [{} for _ in shares]
    for kind in (kind for kind in KINDS if with_cls(name) or not ROWS[kind].of_cls):
        tokens = spy.flat(kind)
        for share, entry in zip(shares, entries):
            if not share.numel():
                entry[kind] = tokens[:0] if ROWS[kind].vector else tokens[:0, 0]
                continue
            # A projector that follows the removal of CLS has fewer inputs than the tower has tokens.
            seen = tokens if share.shape[1] == len(tokens) else tokens.unflatten(0, (tiles, -1))[:, 1:].flatten(0, 1)
            rows = share @ seen
            if ROWS[kind].over_queries:
                rows = rows / ((share > 0).any(0).sum() if family(name) in PACKED else length)
            entry[kind] = rows if ROWS[kind].vector else rows[:, 0]
    return entries


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("name", families.NAMES)
def test_signals_equal_the_oracles(name, layer):
    model, inputs = families.model(name), visual_inputs(name)
    with collected(model, name, needs_of(layer)) as answers, torch.no_grad():
        model(**inputs)
    (got,) = answers
    want = expected(name, inputs, layer)
    assert len(got) == len(want)
    for entry, oracle in zip(got, want):
        assert {s.kind for s in entry} == set(oracle)
        for signal, value in entry.items():
            assert value.dtype == torch.float32
            n = len(oracle[signal.kind])  # transformers 5.17 appends OneVision's video newline only later
            torch.testing.assert_close(value[:n], oracle[signal.kind], atol=2e-6, rtol=1e-5)
            assert (value[n:] == 0).all()


@pytest.mark.parametrize("name", families.NAMES)
def test_layer_none_is_the_layer_that_feeds_the_projector(name):
    """Scores as of the layer named outright, and the very states that the projector got."""
    model, inputs = families.model(name), visual_inputs(name)
    base = model.base_model
    outright = [Signal(kind, feature_layer(base)) for kind in KINDS]
    needs = [Signal(kind, None) for kind in KINDS]
    fed: list[Tensor] = []
    if name.startswith("glm4v"):  # a convolution merges before the merger does
        hook = base.visual.post_layernorm.register_forward_hook(lambda m, args, out: fed.append(out))
    else:
        beside = [part for part in base.children() if part is not model.get_decoder() and not attention_modules(part)]
        projector = beside[0] if beside else base.visual.merger
        hook = projector.register_forward_pre_hook(lambda m, args, kw: fed.append(first(args, kw)), with_kwargs=True)
    with collected(model, name, [*needs, *outright, Signal("hidden", None)]) as answers, torch.no_grad():
        model(**inputs)
    hook.remove()
    shares = provenance(families.model(name, "eager"), name, inputs)
    (got,) = answers
    assert len(got) == len(shares)
    for entry in got:
        for ours, theirs in zip(needs, outright, strict=True):
            assert (ours in entry) is (theirs in entry)
            assert ours not in entry or torch.equal(entry[ours], entry[theirs])
        assert entry[Signal("hidden", None)].dtype == torch.float32
    hidden = [entry[Signal("hidden", None)] for entry in got]
    want = _carried(torch.cat([x.flatten(0, -2) for x in fed]), shares, sum(map(len, hidden)))
    for ours, theirs in zip(hidden, want, strict=True):  # transformers 5.17 appends OneVision's video newline later
        torch.testing.assert_close(ours[: len(theirs)], theirs)
        assert (ours[len(theirs) :] == 0).all()


def _carried(fed: Tensor, shares: list[Tensor], n: int) -> list[Tensor]:
    """What the projector got, [rows, C], as the LLM's n tokens, image by image."""
    if len(fed) == n:  # merged before: the channels of one token's patches stand side by side, or are pooled
        return list(fed.unflatten(1, (-1, families.WIDTH)).mean(1).split([len(share) for share in shares]))
    return [share @ fed if share.numel() else fed[:0] for share in shares]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", families.NAMES)
def test_outputs_are_bit_identical_and_configs_come_back(name, implementation):
    model, inputs = families.model(name, implementation), visual_inputs(name)
    layers = attention_modules(tower_of(model.base_model, modality_of(name)))
    configs = [m.config for m in layers]
    entries: list[Tensor] = []
    with torch.no_grad():
        before = model(**inputs).logits
        with observed(model.base_model, modality_of(name), lambda: None, lambda c, o: entries.extend(o.pooler_output)):
            model(**inputs)
        with collected(model, name, [n for i in range(len(layers)) for n in needs_of(i)]) as answers:
            tapped = model(**inputs).logits
        after = model(**inputs).logits
    assert torch.equal(before, tapped)
    assert torch.equal(before, after)
    assert all(m.config is config for m, config in zip(layers, configs))
    # One answer per entry; together they cover the visual tokens of the prompt, which the model counts itself.
    assert len(entries) == len(answers[0])
    visual = sum(len(unit) for row in inputs.units for unit in row)
    assert sum(len(entry[Signal("received", 0)]) for entry in answers[0]) == visual


@pytest.mark.parametrize("name", families.NAMES)
def test_cls_is_recognised(name):
    assert has_cls(tower_of(families.model(name).base_model, modality_of(name))) is with_cls(name)


@pytest.mark.parametrize(("name", "read"), [("llava", ["cls"]), ("llava_onevision", ["received"])])
def test_a_fallback_is_read_only_where_there_is_no_cls_token(name, read):
    needs = [Signal("cls", -1), Signal("received", -1, without_cls=True)]
    signals = TowerSignals(families.model(name).base_model, "image", needs)
    assert [s.kind for s in signals.needs] == read
    undo = signals.install()
    assert len(undo) == 1
    undo[0]()


def test_newlines_of_a_mosaic_score_zero():
    """A 22 x 13 image on 24 x 12 pixels: 3 x 3 base patches, then 6 rows of 3 patches, each with its newline."""
    model, signal = families.model("llava_next"), Signal("cls", -2)
    inputs = families.build(
        "llava_next", [[families.FAMILIES["llava_next"].visual((24, 12), torch.Generator(), False)]]
    )
    with collected(model, "llava_next", [signal]) as answers, torch.no_grad():
        model(**inputs)
    scores = answers[0][0][signal]
    zero = [9 + 4 * row + 3 for row in range(6)]
    assert scores.shape == (9 + 6 * 4,)
    assert (scores[zero] == 0).all()
    assert (scores > 0).sum() == len(scores) - len(zero)


def test_windows_of_qwen2_5_are_put_back_into_raster_order():
    """Each merged token's score is that of its own 2 x 2 patches, found by their place in the window order."""
    name, grid = "qwen2_5_vl", (1, 8, 12)
    model, signal = families.model(name), Signal("keys", 0)
    inputs = families.build(name, [[families.FAMILIES[name].visual(grid, torch.Generator(), False)]])
    with collected(model, name, [signal]) as answers, torch.no_grad():
        model(**inputs)
    tower = model.base_model.visual
    side = tower.window_size // tower.patch_size // tower.spatial_merge_size  # tokens along a window
    rows, columns = grid[1] // 2, grid[2] // 2
    order = [
        r * columns + c
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for r in range(top, min(top + side, rows))
        for c in range(left, min(left + side, columns))
    ]
    with Spy(attention_modules(families.model(name, "eager").base_model.visual)[0]) as spy, torch.no_grad():
        families.model(name, "eager")(**inputs)
    in_window_order = spy.flat("keys").unflatten(0, (-1, 4)).mean(1)
    assert sorted(order) == list(range(rows * columns))
    assert order != sorted(order)
    for place, token in enumerate(order):
        torch.testing.assert_close(answers[0][0][signal][token], in_window_order[place], atol=2e-6, rtol=1e-5)


def test_received_is_comparable_across_windows_and_sums_to_one_over_an_image():
    """Windows at the border hold fewer patches; a mean per window would favour them."""
    name = "qwen2_5_vl"
    model, signal = families.model(name), Signal("received", 0)
    inputs = families.build(name, [[families.FAMILIES[name].visual((1, 6, 10), torch.Generator(), False)]])
    with collected(model, name, [signal]) as answers, torch.no_grad():
        model(**inputs)
    received = answers[0][0][signal]
    torch.testing.assert_close(received.sum() * 4, torch.tensor(1.0))
    torch.testing.assert_close(received.mean(), torch.tensor(1 / 60))


def test_padded_patches_of_a_tile_neither_give_nor_receive():
    name, signal = "smolvlm", Signal("received", -1)
    model, inputs = families.model(name), visual_inputs(name, rows=(1,))
    inputs["pixel_attention_mask"][..., 12:] = False  # only the left half of every tile is image
    with collected(model, name, [signal]) as answers, torch.no_grad():
        model(**inputs)
    # 3 x 3 tokens of 2 x 2 patches: the middle column has one real column of patches, the right one none.
    received = answers[0][0][signal].unflatten(0, (-1, 3, 3))
    assert (received[..., 2] == 0).all()
    assert (received[..., 1] > 0).all()
    torch.testing.assert_close(received.sum((1, 2)) * 4, torch.ones(len(received)))


def test_pixtral_under_llava():
    config = families.FAMILIES["mistral3"].config()
    torch.manual_seed(0)
    settings = transformers.LlavaConfig(
        text_config=config.text_config,
        vision_config=config.vision_config,
        image_token_index=families.IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(settings).eval()
    signal = Signal("received")
    inputs = families.inputs("mistral3", rows=(2,))
    signals = TowerSignals(model.base_model, "image", [signal])
    signals.install()
    signals.start()
    call = {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}
    with torch.no_grad():
        answers = signals.finish(call, model.base_model.get_image_features(**call))
    assert [len(a[signal]) for a in answers] == [math.prod(s) // 16 for s in inputs["image_sizes"].tolist()]
    assert all(torch.isclose(a[signal].sum(), torch.tensor(1.0)) for a in answers)


def test_threads_keep_their_own_buffers():
    name = "llava"
    model, signal = families.model(name), Signal("cls", -1)
    batches = [visual_inputs(name, rows=(1 + i % 2,), seed=i) for i in range(6)]
    base = model.base_model
    signals = TowerSignals(base, "image", [signal])
    undo = signals.install()
    barrier = threading.Barrier(len(batches))

    @torch.no_grad()
    def run(i: int, together: bool) -> list[Tensor]:
        call = {"pixel_values": batches[i]["pixel_values"]}
        signals.start()
        if together:
            barrier.wait(timeout=60)
        output = base.get_image_features(**call)
        if together:
            barrier.wait(timeout=60)
        return [entry[signal] for entry in signals.finish(call, output)]

    alone = [run(i, together=False) for i in range(len(batches))]
    results: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run(i, True)})) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for back in undo:
        back()
    assert all(torch.equal(a, b) for i in results for a, b in zip(results[i], alone[i], strict=True))
    assert len(results) == len(batches)


def test_a_call_that_nobody_waits_for_is_not_read(monkeypatch):
    model, reads = families.model("llava"), []
    monkeypatch.setattr(tower_signals, "read", lambda *args: reads.append(args) or read(*args))
    signals = TowerSignals(model.base_model, "image", [Signal("cls")])
    undo = signals.install()
    call = {"pixel_values": visual_inputs("llava")["pixel_values"]}
    with torch.no_grad():
        model.base_model.get_image_features(**call)  # before start
        signals.start()
        first = signals.finish(call, model.base_model.get_image_features(**call))
        model.base_model.get_image_features(**call)  # after finish
        signals.start()
        second = signals.finish(call, model.base_model.get_image_features(**call))
    assert len(reads) == 2
    for back in undo:
        back()
    assert all(torch.equal(a[s], b[s]) for a, b in zip(first, second, strict=True) for s in a)


@pytest.mark.parametrize(
    ("depth", "whole", "share", "index"),
    [
        (24, None, 0.375, 8),  # the 9th of CLIP-L's 24
        (32, (7, 15, 23, 31), 0.375, 15),  # the 12th of Qwen2.5-VL's 32 sees windows, the 16th is next to see all
        (32, (7, 15, 23, 31), 0.5, 15),
        (32, (7, 15, 23), 0.99, 23),
        (27, None, 0.5, 13),
        (6, None, 0.01, 0),
        (6, None, 0.99, 5),
    ],
)
def test_a_share_of_the_depth_is_a_layer_that_sees_the_whole_image(depth, whole, share, index):
    tower = nn.Module()
    if whole:
        tower.fullatt_block_indexes = list(whole)
    assert towers.layer_index(None, tower, depth, share) == index


def test_vision_feature_layer_counts_hidden_states():
    base = families.fresh("llava").base_model
    for asked, index in ((-1, 2), (-2, 1), (1, 0), (3, 2), ([-1, -2], 1)):
        base.config.vision_feature_layer = asked
        assert TowerSignals(base, "image", [Signal("cls", None)]).index == {Signal("cls", None): index}
    base.config.vision_feature_layer = 0
    with pytest.raises(UnsupportedModel, match="tower layer -1 does not exist"):
        TowerSignals(base, "image", [Signal("cls", None)])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_families_are_named():
    base = families.fresh("llava").base_model
    base.config = transformers.AyaVisionConfig()
    with pytest.raises(UnsupportedModel, match=r"aya_vision.*llava_next"):
        TowerSignals(base, "image", [Signal("cls")])


def test_a_missing_layer_is_refused():
    base = families.model("llava").base_model
    for layer in (3, -4):
        with pytest.raises(UnsupportedModel, match=r"valid: -3\.\.2"):
            TowerSignals(base, "image", [Signal("received", layer)])
    with pytest.raises(UnsupportedModel, match="last_row"):
        TowerSignals(base, "image", [Signal("last_row")])


def test_layers_that_say_nothing_sensible_are_refused():
    for layer in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="share of the depth"):
            Signal("received", layer)
    with pytest.raises(ValueError, match="use layer=None"):
        TowerSignals(families.model("llava").base_model, "image", [Signal("hidden", -1)])
    with pytest.raises(ValueError, match="offset"):
        Signal("last_row", None).offset  # noqa: B018


def test_another_feature_layer_in_the_call_is_refused():
    base = families.model("llava").base_model
    signals = TowerSignals(base, "image", [Signal("cls", None)])
    undo = signals.install()
    call = {"pixel_values": visual_inputs("llava")["pixel_values"], "vision_feature_layer": -1}
    signals.start()
    with torch.no_grad(), pytest.raises(UnsupportedCall, match="vision_feature_layer=-1"):
        signals.finish(call, base.get_image_features(**call))
    for back in undo:
        back()


def test_a_silent_layer_is_refused():
    base = families.model("llava").base_model
    signals = TowerSignals(base, "image", [Signal("keys", 1)])
    call = {"pixel_values": visual_inputs("llava")["pixel_values"]}
    signals.start()  # nothing installed: the layer stays silent
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=r"layer 1 .* did not run"):
        signals.finish(call, base.get_image_features(**call))


def test_a_layout_that_does_not_fit_is_refused():
    base = families.model("llava").base_model
    signals = TowerSignals(base, "image", [Signal("keys", 1)])
    undo = signals.install()
    call = {"pixel_values": visual_inputs("llava")["pixel_values"]}
    signals.start()
    with torch.no_grad():
        output = base.get_image_features(**call)
    output.pooler_output = output.pooler_output[:-1]
    with pytest.raises(UnsupportedModel, match="75 mapped tokens against 50"):
        signals.finish(call, output)
    for back in undo:
        back()


@pytest.mark.parametrize("name", ["cls_topk", "visionzip", "flowcut"])
def test_a_missing_cls_signal_is_named_itself_and_not_its_fallback(name: str) -> None:
    bare = vtprune.Visual(torch.randn(9, 4), budget=3)
    with pytest.raises(ValueError, match=rf"{name} needs the signal cls \("):
        vtprune.create(name)(bare)
