"""Plain vision transformers: patched models against their own library's forward, on which tokens are averaged or hidden
instead of merged or dropped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import vits
from torch import Tensor, nn

import vtprune
from vtprune import Stage
from vtprune.hf.vit import VitPatch
from vtprune.hf.vit_last import VitLast
from vtprune.model_adapters.vits import vit_of
from vtprune.reduction import Reducer, Reduction, Tokens, keep_rows
from vtprune.types import Assignment, Method, UnsupportedCall, UnsupportedModel, Visual, VtpruneError

every_model = pytest.mark.parametrize("name", vits.NAMES)
every_method = pytest.mark.parametrize(
    "method", ["tome", "diffrate", "zero_tprune", "topk_cls", "token_transforming", "random"]
)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def rows(name: str, model: Any, x: Tensor) -> Tensor:
    """What the last block puts out."""
    seen: list[Any] = []
    hook = vits.blocks(name, model)[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    vits.run(model, x)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


# -- the oracle: all tokens stay, groups are averaged in place, dropped ones are hidden from attention -----------------


@contextmanager
def in_place(name: str, model: Any, last: VitLast) -> Iterator[None]:
    """The unpatched model, with the reductions of `last` done on all N rows."""
    kind, done = vits.kind(name), VitLast(last.n, last.prefix)
    steps, hooks = dict(last.steps), []
    state: dict[str, Any] = {}

    def before_mlp(k: int, module: nn.Module, args: Any) -> Any:
        state["x"] = args[0]
        if k not in steps:
            state["new"] = args[0]
            return None
        done.steps.append((k, steps[k]))
        slots, x = done.slots, args[0].double()
        assert slots is not None
        new = x.clone()
        for b in range(len(x)):
            for slot in set(slots[b].tolist()) - {-1}:
                members = slots[b] == slot
                new[b, members] = x[b, members].mean(0)
        state["new"] = new.to(args[0].dtype)
        return (state["new"], *args[1:])

    def after_block(module: nn.Module, args: Any, out: Any) -> Any:
        y = out[0] if isinstance(out, tuple) else out
        y = y - state["x"] + state["new"]
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def hide(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not done.steps or bool((done.slots >= 0).all()):
            return None
        seen = done.slots >= 0
        if kind.mask == "key_padding_mask":
            return args, {**kwargs, kind.mask: ~seen}
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None, None]
        names = ("hidden_states", "attention_mask")[: len(args)] if kind.mask == "attention_mask" else ("x",)
        return (), {**dict(zip(names, args)), **kwargs, kind.mask: mask}

    for k, block in enumerate(vits.blocks(name, model)):
        hooks.append(vits.part(block, kind.norm).register_forward_pre_hook(partial(before_mlp, k)))
        # First among its hooks: transformers records hidden states with one.
        hooks.append(block.register_forward_hook(after_block, prepend=True))
        hooks.append(vits.part(block, kind.attention).register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@every_model
@torch.no_grad()
def test_merging_equals_averaging_in_place(name: str) -> None:
    """Blocks, pooling and heads: attention and means count a merged token as often as its size."""
    if vits.KINDS[name].rope:
        pytest.skip("merged tokens have one position, averaged ones keep theirs")
    model, x = vits.model(name), vits.images()
    with vtprune.patch(model, "tome", keep=0.4) as handle:
        ours = vits.run(model, x)
        last = handle.last
    assert last.slots.shape == (3, last.n)
    assert len(last.steps) >= min(3, vits.PATCHES // 2)
    with in_place(name, model, last):
        torch.testing.assert_close(ours, vits.run(model, x), **TOLERANCE)
    assert not torch.allclose(ours, vits.run(model, x), **TOLERANCE), "nothing was merged"


@every_model
@pytest.mark.parametrize("method", ["topk_cls", "zero_tprune", "random"])
@torch.no_grad()
def test_pruning_equals_hiding(name: str, method: str) -> None:
    model, x = vits.model(name), vits.images()
    with vtprune.patch(model, method, keep=0.4) as handle:
        ours, last = rows(name, model, x), handle.last
    with in_place(name, model, last):
        theirs = rows(name, model, x)
    index = last.index[..., None].expand(-1, -1, theirs.shape[2])
    torch.testing.assert_close(ours, theirs.gather(1, index), **TOLERANCE)
    assert ours.shape[1] < theirs.shape[1]


# -- what holds for every model ----------------------------------------------------------------------------------------


def traces(model: nn.Module) -> Any:
    """Everything on a model that a patch might leave behind."""
    return [
        (path, sorted(module.__dict__), {k: len(v) for k, v in module.__dict__.items() if "hooks" in k})
        for path, module in model.named_modules()
    ]


@every_method
@every_model
@torch.no_grad()
def test_keep_all_changes_no_bit_and_removal_leaves_no_trace(name: str, method: str) -> None:
    model, x = vits.model(name), vits.images()
    before, untouched = vits.run(model, x), traces(model)
    with vtprune.patch(model, method, keep=1.0) as handle:
        assert torch.equal(vits.run(model, x), before)
        assert handle.last.slots is None
        assert handle.last.lengths == [vits.PATCHES + vits.KINDS[name].prefix] * len(vits.blocks(name, model))
    with vtprune.patch(model, method, keep=0.5) as handle:
        assert not torch.equal(vits.run(model, x), before)
    assert not handle.active
    assert torch.equal(vits.run(model, x), before)
    assert traces(model) == untouched
    if method == "tome":
        with vtprune.patch(model, "tome", r=0):
            assert torch.equal(vits.run(model, x), before)


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_the_two_halves_of_a_block_are_the_block(name: str, training: bool) -> None:
    """In training too: stochastic depth and dropout draw in the same order."""
    model = copy.deepcopy(vits.model(name)).train(training)
    vit = vit_of(model)
    assert vit is not None
    assert vit.prefix == vits.KINDS[name].prefix
    x, rope = (
        torch.randn(2, vits.PATCHES + vit.prefix, vit.blocks[0].get_submodule(vits.KINDS[name].norm).weight.shape[0]),
        None,
    )
    if vits.KINDS[name].rope:
        rope = {"rope": model.rope.get_embed()} if hasattr(model, "rope") else None
        rope = rope or {"position_embeddings": model.rope_embeddings(vits.images())}
    for block in vit.blocks:
        given = rope or {}
        extra = {"attention_mask": None} if vits.KINDS[name].mask == "attention_mask" else {}
        torch.manual_seed(1)
        whole = block(x, **given, **extra)
        torch.manual_seed(1)
        half = x + vit.parts.attend(block, x, None, given)
        assert torch.equal(half + vit.parts.feed(block, half), whole)


@every_method
@every_model
@torch.no_grad()
def test_a_batch_equals_its_images_alone_and_the_prefix_stays(name: str, method: str) -> None:
    model, x = vits.model(name), vits.images()
    prefix = vits.KINDS[name].prefix
    with vtprune.patch(model, method, keep=0.5) as handle:
        together, last = rows(name, model, x), handle.last
        for b in range(len(x)):
            alone = rows(name, model, x[b : b + 1])
            torch.testing.assert_close(alone[0], together[b], **TOLERANCE)
            assert torch.equal(handle.last.slots[0], last.slots[b])
    assert torch.equal(last.index[:, :prefix], torch.arange(prefix).expand(len(x), -1))
    assert torch.equal(last.slots[:, :prefix], torch.arange(prefix).expand(len(x), -1))
    assert last.index.sort(1).values.diff(dim=1).gt(0).all(), "a token stands for itself once"
    assert together.shape[1] == last.lengths[-1] == prefix + max(1, round(0.5 * vits.PATCHES))


@every_model
def test_gradients_flow(name: str) -> None:
    model, x = vits.model(name), vits.images()
    with vtprune.patch(model, "tome", keep=0.4):
        vits.run(model, x).square().sum().backward()
    first = next(vits.blocks(name, model)[0].parameters())
    assert first.grad is not None
    assert first.grad.isfinite().all()
    assert first.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


def test_gradients_are_those_of_averaging() -> None:
    name = "timm-dinov2-reg4"
    model, x = vits.model(name), vits.images()
    weight = vits.blocks(name, model)[1].attn.qkv.weight
    with vtprune.patch(model, "tome", keep=0.4) as handle:
        (ours,) = torch.autograd.grad(vits.run(model, x).square().sum(), weight)
    with in_place(name, model, handle.last):
        (theirs,) = torch.autograd.grad(vits.run(model, x).square().sum(), weight)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


COMPILED = ("timm-dinov2-reg4", "timm-eva02", "open_clip-tower-avg", "siglip", "dinov2-classifier")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "backend"),
    [("timm-dinov2-reg4", "tome", "inductor"), ("timm-deit", "zero_tprune", "aot_eager")]
    + [(name, "tome", "aot_eager") for name in COMPILED],
)
@torch.no_grad()
def test_compile_runs(name: str, method: str, backend: str) -> None:
    model, x = vits.model(name), vits.images()
    torch.compiler.reset()
    with vtprune.patch(model, method, keep=0.5):
        ours = vits.run(model, x)
        torch.testing.assert_close(vits.run(torch.compile(model, backend=backend), x), ours, **TOLERANCE)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov2"])
@torch.no_grad()
def test_eager_attention_takes_the_size_too(name: str) -> None:
    model, x = copy.deepcopy(vits.model(name)), vits.images()
    with vtprune.patch(model, "tome", keep=0.4):
        fused = vits.run(model, x)
    model.set_attn_implementation("eager")
    with vtprune.patch(model, "tome", keep=0.4):
        torch.testing.assert_close(vits.run(model, x), fused, **TOLERANCE)


@pytest.mark.parametrize("name", ["timm-dinov2-reg4", "open_clip-tower-avg", "dinov2"])
@torch.no_grad()
def test_half_precision(name: str) -> None:
    model, x = copy.deepcopy(vits.model(name)).bfloat16(), vits.images().bfloat16()
    with vtprune.patch(model, "tome", keep=0.4):
        assert vits.run(model, x).dtype == torch.bfloat16


@every_method
@pytest.mark.parametrize("name", ["timm-deit", "timm-eva02", "open_clip", "siglip", "dinov3", "torchvision"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_rounds_no_score(name: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method is given under autocast it answers as it would without."""
    model, x, asked = vits.model(name), vits.images(), []
    plain = VitPatch._step

    def step(self: Any, run: Any, k: int, *rest: Any) -> Any:
        answer = plain(self, run, k, *rest)
        with torch.autocast("cpu", enabled=False):
            asked.append((answer, plain(self, run, k, *rest), torch.is_autocast_enabled("cpu")))
        return answer

    monkeypatch.setattr(VitPatch, "_step", step)
    with vtprune.patch(model, method, keep=0.4) as handle, torch.autocast("cpu", dtype=dtype):
        out = vits.run(model, x)
        sizes = handle.last.size
    assert out.isfinite().all()
    assert asked
    for ours, theirs, rounding in asked:
        assert not rounding
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.dense(60), theirs.dense(60)) if ours.matrix is None else True
    assert sizes is None or sizes.dtype == torch.float32


# -- outputs of all rows -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_unmerge_gives_every_token_the_row_that_holds_it() -> None:
    model, x = vits.model("timm-dinov2-reg4"), vits.images()
    with vtprune.patch(model, "tome", keep=0.4) as handle:
        features = model.forward_features(x)
        last = handle.last
    whole = last.unmerge(features)
    assert whole.shape == (3, last.n, vits.WIDTH)
    for b in range(3):
        for token, slot in enumerate(last.slots[b].tolist()):
            assert torch.equal(whole[b, token], features[b, slot])
    counts = torch.stack([torch.bincount(s, minlength=features.shape[1]) for s in last.slots]).float()
    assert torch.equal(last.size, counts)
    with pytest.raises(ValueError, match=r"5 rows, but the last forward pass left"):
        last.unmerge(features[:, :5])
    with vtprune.patch(model, "topk_cls", keep=0.4) as handle:
        pruned = model.forward_features(x)
        whole = handle.last.unmerge(pruned, fill=-7.0)
    dropped = handle.last.slots < 0
    assert torch.equal((whole == -7.0).all(-1), dropped)
    assert int(dropped[0].sum()) == vits.PATCHES - round(0.4 * vits.PATCHES)


@pytest.mark.parametrize("name", ["timm-dinov2-reg4", "timm-eva02", "timm-siglip", "open_clip-tower-avg"])
@pytest.mark.parametrize("method", ["tome", "topk_cls"])
@torch.no_grad()
def test_intermediate_maps_have_all_rows(name: str, method: str) -> None:
    model, x = vits.model(name), vits.images()
    options = {"output_fmt": "NLC", "intermediates_only": True}

    def maps() -> list[Tensor]:
        out = model.forward_intermediates(x, **options)
        return out["image_intermediates"] if isinstance(out, dict) else out

    with vtprune.patch(model, method, keep=0.4) as handle:
        ours = maps()
        last = handle.last
        again = vits.run(model, x)
    with in_place(name, model, last):
        theirs = maps()
    prefix = last.prefix
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape == (3, vits.PATCHES, vits.WIDTH)
        done = VitLast(last.n, prefix, steps=[step for step in last.steps if step[0] <= k]).slots
        alive = torch.ones(3, vits.PATCHES, dtype=torch.bool) if done is None else done[:, prefix:] >= 0
        if not (vits.KINDS[name].rope and method == "tome"):
            torch.testing.assert_close(a[alive], b[alive], **TOLERANCE)
    assert again.isfinite().all(), "an ordinary call afterwards is short again"


@pytest.mark.parametrize("name", list(vits.MAPPED))
@pytest.mark.parametrize("method", ["tome", "topk_cls", "diffrate"])
@torch.no_grad()
def test_models_that_lay_rows_out_on_a_grid_get_all_of_them(name: str, method: str) -> None:
    model, x = vits.model(name), vits.images()
    before = vits.maps(model, x)
    with vtprune.patch(model, method, keep=1.0):
        assert all(map(torch.equal, vits.maps(model, x), before))
    with vtprune.patch(model, method, keep=0.4) as handle:
        ours, last = vits.maps(model, x), handle.last
        alone = [vits.maps(model, x[b : b + 1]) for b in range(len(x))]
    assert last.lengths[-1] == vits.kind(name).prefix + round(0.4 * vits.PATCHES)
    with in_place(name, model, last):
        theirs = vits.maps(model, x)
    assert all(map(torch.equal, vits.maps(model, x), before))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape == before[i].shape
        torch.testing.assert_close(a, torch.cat([one[i] for one in alone]), **TOLERANCE)
        if method == "topk_cls" and a.shape[-2:] == (vits.SIZE // vits.PATCH,) * 2:
            block = (1, vits.DEPTH - 1)[i]
            alive = last.slots_behind(block)[:, last.prefix :] >= 0
            torch.testing.assert_close(a.flatten(2).mT[alive], b.flatten(2).mT[alive], **TOLERANCE)
            assert not alive.all()
        elif method == "tome" and not vits.kind(name).rope:
            torch.testing.assert_close(a, b, **TOLERANCE)
            assert not torch.allclose(a, before[i], **TOLERANCE), "nothing was merged"


@pytest.mark.parametrize(("name", "inside"), [("dpt", "backbone"), ("vit-masked", "vit"), ("deit-masked", "deit")])
@torch.no_grad()
def test_the_model_inside_may_be_patched_alone(name: str, inside: str) -> None:
    model, x = vits.model(name), vits.images()
    with vtprune.patch(model, "tome", keep=0.4):
        expected = vits.maps(model, x)
    with vtprune.patch(getattr(model, inside), "tome", keep=0.4):
        assert all(map(torch.equal, vits.maps(model, x), expected))


@torch.no_grad()
def test_a_class_of_somebody_else_gets_all_rows() -> None:
    import transformers

    class Segmenter(transformers.ViTModel):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).last_hidden_state[:, 1:].unflatten(1, (7, 7))

    torch.manual_seed(0)
    model, x = Segmenter(vits.model("vit").config).eval(), vits.images()
    with vtprune.patch(model, "tome", keep=0.4) as handle:
        assert model(x).shape == (3, 7, 7, vits.WIDTH)
        assert handle.last.lengths[-1] == 21


@torch.no_grad()
def test_a_forward_pass_that_stops_early_is_the_last_one() -> None:
    model, x = vits.model("timm-deit"), vits.images()
    with vtprune.patch(model, "tome", r=5) as handle:
        model(x)
        (rows,) = model.forward_intermediates(
            x, indices=[1], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        assert handle.last.lengths == [45, 40]
        assert handle.last.size.sum(1).tolist() == [50.0] * 3
        assert rows.shape == (3, 49, vits.WIDTH)


@torch.no_grad()
def test_rows_that_others_add_between_blocks_are_refused() -> None:
    model, x = vits.model("vit"), vits.images()
    hook = vits.blocks("vit", model)[2].register_forward_pre_hook(
        lambda m, a: (torch.cat([a[0], a[0][:, :1]], 1), a[1])
    )
    try:
        with vtprune.patch(model, "tome", r=5), pytest.raises(UnsupportedCall, match="41 rows, but 40 are left behind"):
            model(x)
    finally:
        hook.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["siglip2", "siglip2-classifier"])
@every_method
@torch.no_grad()
def test_padded_images_equal_themselves_without_padding(name: str, method: str, attention: str) -> None:
    """Images of different grids in one batch of SigLIP 2: budgets are shares of their own patches."""
    model, shapes = copy.deepcopy(vits.model(name)), [(7, 7), (3, 5), (6, 4), (5, 3)]
    model.set_attn_implementation(attention)
    alone = [vits.patches(vits.images(1, seed=i)[..., : h * 8, : w * 8]) for i, (h, w) in enumerate(shapes)]
    batch = {name: nn.utils.rnn.pad_sequence([one[name][0] for one in alone], batch_first=True) for name in alone[0]}
    assert batch["pixel_attention_mask"].sum(1).tolist() == [49, 15, 24, 15]
    batch["pixel_values"] = batch["pixel_values"].where(batch["pixel_attention_mask"][..., None] > 0, 7.0)

    def pooled(inputs: dict[str, Tensor]) -> Tensor:
        out = model(**inputs)
        return out.pooler_output if hasattr(out, "pooler_output") else out.logits

    before = pooled(batch)
    with vtprune.patch(model, method, keep=1.0):
        assert torch.equal(pooled(batch), before)
    with vtprune.patch(model, method, keep=0.4) as handle:
        ours, last = pooled(batch), handle.last
        assert last.valid.sum(1).tolist() == [round(0.4 * h * w) for h, w in shapes]
        for b, one in enumerate(alone):
            torch.testing.assert_close(ours[b], pooled(one)[0], **TOLERANCE)
            n = int(last.valid[b].sum())
            assert torch.equal(last.index[b, :n], handle.last.index[0])
            assert torch.equal(last.slots[b, : handle.last.n], handle.last.slots[0])
    assert torch.equal(pooled(batch), before)
    assert not torch.allclose(ours, before, **TOLERANCE)
    batch["pixel_attention_mask"] = batch["pixel_attention_mask"].flip(1)
    with vtprune.patch(model, method, keep=0.4), pytest.raises(UnsupportedCall, match="padding at the right end"):
        model(**batch)


@torch.no_grad()
def test_hidden_states_have_the_length_they_ran_on() -> None:
    model, x = vits.model("dinov2"), vits.images()
    with vtprune.patch(model, "tome", r=5) as handle:
        out = model(x, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [50, *handle.last.lengths] == [50, 45, 40, 35, 30]
    for k, states in enumerate(out.hidden_states[1:]):
        whole = handle.last.unmerge(states, block=k)
        slots = VitLast(50, 1, steps=handle.last.steps[: k + 1]).slots
        assert torch.equal(whole, states.gather(1, slots[..., None].expand(-1, -1, vits.WIDTH)))
    with pytest.raises(ValueError, match="left 40 behind block 1"):
        handle.last.unmerge(out.hidden_states[1], block=1)


# -- export ------------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A model with one tensor in and one out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return vits.run(self.model, x)


def onnx(module: nn.Module, x: Tensor, dynamo: bool, tmp_path: Any) -> Any:
    """The module in ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "model.onnx")
    if dynamo:
        torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(path)
    else:
        torch.onnx.export(module, (x,), path, dynamo=False, opset_version=17)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def recorded(way: str, module: nn.Module, x: Tensor, tmp_path: Any) -> Any:
    if way == "export":
        return torch.export.export(module, (x,)).module()
    if way == "trace":
        return torch.jit.trace(module, (x,), check_trace=False)
    return onnx(module, x, way == "onnx", tmp_path)


EXPORTED = [
    *[("timm-deit", m) for m in ("tome", "diffrate", "zero_tprune", "topk_cls", "token_transforming")],
    *[("vit", "tome"), ("dinov3", "tome"), ("dinov2-backbone", "tome"), ("timm-gap", "diffrate")],
]


@pytest.mark.parametrize(
    ("name", "method", "way"),
    [(*case, way) for case in EXPORTED for way in ("export", "trace")]
    + [(*case, way) for case in EXPORTED[:2] for way in ("onnx-legacy", "onnx")],
)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exported_models_prune_as_the_eager_one(name: str, method: str, way: str, tmp_path: Any) -> None:
    """On other images than they were exported with."""
    model, x, other = vits.model(name), vits.images(2), vits.images(2, seed=5)
    module = Pooled(model).eval()  # an exporter puts back the mode that it finds
    if name in vits.MAPPED:
        module.forward = lambda x: vits.maps(model, x)[-1]  # type: ignore[method-assign]
    with vtprune.patch(model, method, keep=0.4) as handle:
        found = recorded(way, module, x, tmp_path)
        ours = module(other)
        torch.testing.assert_close(found(other), ours, rtol=1e-3, atol=1e-4)
        assert type(handle.last.slots) is Tensor, "what was recorded is no result"
    assert not torch.allclose(module(other), ours, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_exports_take_other_batch_sizes() -> None:
    model, x, batch = vits.model("timm-deit"), vits.images(2), torch.export.Dim("batch", min=1, max=64)
    with vtprune.patch(model, "tome", keep=0.4):
        traced = torch.jit.trace(Pooled(model).eval(), (x,), check_trace=False)
        exported = torch.export.export(Pooled(model).eval(), (x,), dynamic_shapes=({0: batch},)).module()
        for count in (1, 5):
            other = vits.images(count, seed=1)
            torch.testing.assert_close(traced(other), vits.run(model, other), **TOLERANCE)
            torch.testing.assert_close(exported(other), vits.run(model, other), **TOLERANCE)


@pytest.mark.parametrize("way", ["export", "trace", "onnx-legacy"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_what_cannot_be_exported_is_refused(way: str, tmp_path: Any) -> None:
    x = vits.images(2)
    for name, method, why in (
        ("timm-deit", "divprune", "divprune chooses image by image.*export with a method for whole batches.*tome"),
        ("timm-deit", "random", "random chooses image by image"),
        ("siglip2", "tome", "Siglip2VisionModel is told by a mask.*export it unpatched"),
    ):
        model = vits.model(name)
        with vtprune.patch(model, method, keep=0.4), pytest.raises(UnsupportedCall, match=why):
            recorded(way, Pooled(model).eval(), x, tmp_path)


# -- stages, copies, threads -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stages_at_single_blocks() -> None:
    model, x = vits.model("timm-deit"), vits.images()
    stages = [
        Stage(("vit", 1), vtprune.create("topk_cls"), keep=30),
        Stage(("vit", slice(2, None)), vtprune.create("tome"), keep=0.2),
    ]
    with vtprune.patch(model, stages) as handle:
        vits.run(model, x)
        assert handle.last.lengths == [50, 31, 21, 11]
    with vtprune.patch(model, [Stage(("vit", -1), vtprune.create("random"), keep=7)]) as handle:
        vits.run(model, x)
        assert handle.last.lengths == [50, 50, 50, 8]
    with pytest.raises(ValueError, match="one stage a block"):
        vtprune.patch(model, [stages[0], stages[0]])
    with pytest.raises(ValueError, match=r"blocks 0\.\.3"):
        vtprune.patch(model, [Stage(("vit", 4), vtprune.create("tome"), keep=7)])
    with pytest.raises(ValueError, match="a stage in the tower is at"):
        vtprune.patch(model, [Stage("llm", vtprune.create("tome"), keep=7)])


@torch.no_grad()
def test_copies_and_pickles_of_a_patched_model_prune_too() -> None:
    model, x = vits.model("timm-dinov2-reg4"), vits.images()
    with vtprune.patch(model, "tome", keep=0.4):
        expected = vits.run(model, x)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    dense = vits.run(model, x)
    for other in (copied, pickled):
        assert torch.equal(vits.run(other, x), expected)
        vtprune.unpatch(other)
        assert torch.equal(vits.run(other, x), dense)


def test_threads_do_not_mix() -> None:
    model = vits.model("timm-deit")
    inputs = [vits.images(batch=1 + i % 3, seed=i) for i in range(8)]

    @torch.no_grad()
    def one(x: Tensor) -> tuple[Tensor, Tensor]:
        out = vits.run(model, x)
        return out, handle.last.slots

    with vtprune.patch(model, "tome", keep=0.4) as handle:
        expected = [one(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(one, inputs))
    for (a, s), (b, t) in zip(expected, found, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(s, t)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_unknown_blocks_are_refused_by_name() -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 56, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    vt = timm.models.vision_transformer
    for block in (vt.ParallelScalingBlock, vt.ResPostBlock, vt.DiffParallelScalingBlock):
        with pytest.raises(UnsupportedModel, match=f"{block.__name__}.*supported blocks: .*EvaBlock"):
            vtprune.patch(vt.VisionTransformer(**small, block_fn=block), "tome", r=2)
    with pytest.raises(UnsupportedModel, match="Beit"):
        vtprune.patch(timm.models.Beit(**small), "tome", r=2)
    with pytest.raises(UnsupportedModel, match="EvaBlockPostNorm"):
        vtprune.patch(timm.models.Eva(**small, use_post_norm=True), "tome", r=2)


def test_refusals_name_the_vision_transformers_that_work() -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    works = "vision transformers that work: .*timm.*open_clip.*torchvision.*DeiT.*SigLIP 2.*DINOv3"
    for name, config, why in (
        ("BeitModel", "BeitConfig", "bias for every pair of places"),
        ("ViTMAEModel", "ViTMAEConfig", "drops patches at random"),
        ("VitDetBackbone", "VitDetConfig", "does not know its blocks"),
    ):
        given = {k: v for k, v in sizes.items() if name != "VitDetBackbone" or k != "intermediate_size"}
        model = getattr(transformers, name)(getattr(transformers, config)(image_size=56, patch_size=8, **given))
        with pytest.raises(UnsupportedModel, match=f"{name}.*{why}.*{works}"):
            vtprune.patch(model, "tome", keep=0.5)
    vision = pytest.importorskip("torchvision.models")
    with pytest.raises(UnsupportedModel, match=f"ResNet of torchvision.*{works}"):
        vtprune.patch(vision.resnet18(), "tome", keep=0.5)
    with pytest.raises(UnsupportedModel, match=f"Linear.*plain {works}"):
        vtprune.patch(nn.Linear(2, 2), "tome", keep=0.5)


def test_a_mean_without_weights_is_refused_where_it_needs_some() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("naflexvit_base_patch16_gap", **sizes)
    with pytest.raises(UnsupportedModel, match="NaFlexVit takes a mean that knows no weights"):
        vtprune.patch(model, "tome", keep=0.5)
    with vtprune.patch(model, "topk_cls", keep=0.5), torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@dataclass(frozen=True)
class Answers(Method):
    """Always the same answer."""

    name: ClassVar[str] = "answers"
    idx: tuple[int, ...] = ()

    def __call__(self, v: Visual) -> Assignment:
        return Assignment(torch.tensor(self.idx[: v.n]))


@dataclass(frozen=True)
class Reduces(Reducer):
    """The first patches, with a weight that is no number."""

    name: ClassVar[str] = "reduces"

    def reduce(self, t: Tokens, left: int) -> Reduction:
        index = keep_rows(t, torch.arange(left).expand(len(t.x), -1))
        pair = torch.full((len(t.x), 1), t.x.shape[1] - 1)
        return Reduction(index, pair, torch.zeros_like(pair), torch.full(pair.shape, torch.nan))


@torch.no_grad()
def test_bad_answers_are_errors_that_name_the_method() -> None:
    model, x = vits.model("timm-deit"), vits.images()
    for idx, why in (
        ((3, 1, 2), "ascending"),
        ((0, 1), "kept 2 tokens"),
        ((0, 1, 49), "within"),
        ((1, 1, 2), "distinct"),
    ):
        stage = Stage(("vit", 1), Answers(idx), keep=3)
        with vtprune.patch(model, stage), pytest.raises(VtpruneError, match=f"answers .*{why}"):
            model(x)
    with (
        vtprune.patch(model, Stage(("vit", 1), Reduces(), keep=3)),
        pytest.raises(VtpruneError, match=r"reduces .*finite"),
    ):
        model(x)


@torch.no_grad()
def test_calls_that_cannot_be_followed_are_refused() -> None:
    model, x = copy.deepcopy(vits.model("timm-deit")), vits.images()
    with vtprune.patch(model, "tome", r=5):
        with pytest.raises(UnsupportedCall, match="attn_mask hides tokens"):
            model.forward_features(x, attn_mask=torch.ones(50, 50, dtype=torch.bool))
        model.set_grad_checkpointing(True)
        with pytest.raises(UnsupportedCall, match="gradient checkpointing"), torch.enable_grad():
            model(x)
        model.set_grad_checkpointing(False)
        model(x)
    with vtprune.patch(model, "tome", r=5, pooling="plain"), pytest.raises(ValueError, match="already patched"):
        vtprune.patch(model, "tome", r=5)
    pooled = vits.model("timm-gap")
    with vtprune.patch(pooled, "tome", r=5):
        pooled(x)
        with pytest.raises(UnsupportedCall, match="49 rows to pool"):
            pooled.pool(torch.randn(3, 49, vits.WIDTH))


def test_bad_arguments() -> None:
    model = vits.model("timm-deit")
    with pytest.raises(TypeError, match="keep is missing"):
        vtprune.patch(model, "tome")
    with pytest.raises(ValueError, match="give one of them"), vtprune.patch(model, "tome", r=3, keep=0.5):
        model(vits.images())
    with pytest.raises(TypeError, match="per: for vision-language models"):
        vtprune.patch(model, "tome", r=3, per="frame")
    with pytest.raises(UnsupportedModel, match="flowcut reads cls_value"):
        vtprune.patch(model, "flowcut", keep=0.5)
    with pytest.raises(UnsupportedModel, match="fastv reads"):
        vtprune.patch(model, "fastv", keep=0.5)
    assert "_vtprune" not in model.__dict__
    with (
        pytest.raises(ValueError, match="counts for 2 blocks"),
        vtprune.patch(model, "diffrate", prune=[9, 8], merge=[8, 7]),
    ):
        model(vits.images())
