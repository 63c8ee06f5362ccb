"""Compilers and tracers around a patched model: the eager result, an error, and never a dense one without a word.

The oracle is the same patch of a model that no compiler has seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import reference
import torch
import vits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers.generation.configuration_utils import CompileConfig

import vtprune
from vtprune import Stage, UnsupportedCall

KEEP = 0.3
Compile = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    return model(**batch).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def wants(family: str, method: Any) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """(inputs, dense logits, pruned logits, kept positions), without any compiler."""
    model, batch = families.fresh(family), families.inputs(family)
    with vtprune.patch(model, method, keep=KEEP) as handle:
        pruned, index = logits(model, batch), handle.last.index
    dense = logits(model, batch)
    assert not torch.allclose(dense, pruned, atol=1e-3), "the test could not tell them apart"
    return batch, dense, pruned, index


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def parts(get: Callable[[Any], Any]) -> Compile:
    """Compile submodules in place."""

    def compiled(model: Any) -> Any:
        for module in get(model):
            module.compile(backend="eager")
        return model

    return compiled


def tower(model: Any) -> Any:
    return model.base_model.get_encoder(modality="image")


def blocks(model: Any) -> list[nn.Module]:
    return [m for m in tower(model).modules() if type(m).__name__.endswith(("Block", "EncoderLayer", "Encoder"))]


HOW: dict[str, Compile] = {
    "torch.compile": whole,
    "in place": parts(lambda model: [model]),
    "base model": parts(lambda model: [model.base_model]),
    "text model": parts(lambda model: [model.get_decoder()]),
    "decoder layers": parts(lambda model: model.get_decoder().layers),
    "attention": parts(lambda model: [layer.self_attn for layer in model.get_decoder().layers]),
    "tower": parts(lambda model: [tower(model)]),
    "tower blocks": parts(blocks),
}
CASES = [
    ("llava", "divprune", "torch.compile"),
    ("llava", "divprune", "in place"),
    ("llava", "divprune", "base model"),
    ("llava", "divprune", "text model"),
    ("llava", "topk_cls", "torch.compile"),
    ("llava", "hiprune", "tower"),
    ("llava", "flowcut", "tower blocks"),
    ("llava", "fastv", "torch.compile"),
    ("llava", "fastv", "decoder layers"),
    ("llava", "fastv", "attention"),
    ("qwen2_5_vl", "fastv", "torch.compile"),
    ("qwen2_5_vl", "hiprune", "tower"),
]


@pytest.mark.parametrize(("family", "method", "how"), CASES)
def test_the_order_of_compiler_and_patch_does_not_matter(family: str, method: str, how: str) -> None:
    """Compiled and called before the patch, called under it, after it, and under the next one."""
    batch, dense, pruned, index = wants(family, method)
    model = families.fresh(family)
    compiled = HOW[how](model)
    close(logits(compiled, batch), dense)
    for _ in range(2):
        with vtprune.patch(model, method, keep=KEEP) as handle:
            close(logits(compiled, batch), pruned)
            assert torch.equal(handle.last.index, index)
        close(logits(compiled, batch), dense)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_compiled_after_the_patch(how: str) -> None:
    batch, dense, pruned, _ = wants("llava", "divprune")
    model = families.fresh("llava")
    with vtprune.patch(model, "divprune", keep=KEEP):
        compiled = HOW[how](model)
        close(logits(compiled, batch), pruned)
    close(logits(compiled, batch), dense)


def test_the_compiled_module_itself_is_patched() -> None:
    batch, dense, pruned, _ = wants("llava", "divprune")
    model = families.fresh("llava")
    compiled: Any = whole(model)
    with vtprune.patch(compiled, "divprune", keep=KEEP) as handle:
        assert handle._session.adapter.model is model
        close(logits(compiled, batch), pruned)
        with pytest.raises(ValueError, match="already patched"):
            vtprune.patch(model, "divprune", keep=KEEP)
    close(logits(compiled, batch), dense)


def test_another_patch_is_not_taken_for_the_last() -> None:
    """Code compiled under one patch serves no other: method, place and budget change."""
    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    compiled = whole(model)
    fastv = vtprune.create("fastv")
    for stages in (Stage("llm", vtprune.create("random"), 9), Stage(2, fastv, 7), [Stage(1, fastv, 5)]):
        with vtprune.patch(model, stages) as handle:
            eager, lengths = logits(model, batch), handle.last.lengths
            close(logits(compiled, batch), eager)
            assert handle.last.lengths == lengths


def test_a_batch_and_a_prompt_without_an_image() -> None:
    model = families.fresh("llava")
    compiled = whole(model)
    for rows in ((2, 0, 1), (0,), (1,)):
        batch = families.inputs("llava", rows=rows)
        with vtprune.patch(model, "divprune", keep=KEEP):
            close(logits(compiled, batch), logits(model, batch))


def test_layers_that_no_stage_hooks_stay_compiled() -> None:
    """Before the LLM only the seam itself is plain Python: its layers run compiled on the pruned prompt."""
    batch, _, pruned, _ = wants("llava", "divprune")
    model, counter = families.fresh("llava"), CompileCounter()
    for layer in model.get_decoder().layers:
        layer.compile(backend=counter)
    with vtprune.patch(model, "divprune", keep=KEEP):
        close(logits(model, batch), pruned)
    assert counter.frame_count >= 1


def test_a_full_graph_of_a_pruned_prompt_is_an_error() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava")
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with vtprune.patch(model, "divprune", keep=KEEP), pytest.raises(torch._dynamo.exc.Unsupported):
        logits(compiled, batch)


def test_an_error_in_a_compiled_call_leaves_nothing_behind() -> None:
    batch, _, pruned, _ = wants("llava", "divprune")
    model = families.fresh("llava")
    with vtprune.patch(model, "divprune", keep=KEEP) as handle:
        compiled = whole(model)
        wrong = dict(families.inputs("llava", rows=(2,)), pixel_values=batch["pixel_values"][:1])
        with pytest.raises(Exception, match="tokens"):
            logits(compiled, wrong)
        text = families.inputs("llava", rows=(0,))
        close(logits(compiled, text), logits(families.fresh("llava"), text))
        assert not handle._session.busy()
        close(logits(compiled, batch), pruned)


def test_gradients_of_a_compiled_model() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    labels = batch["input_ids"].clamp(min=families.FIRST_TEXT)
    found = []
    with vtprune.patch(model, "divprune", keep=KEEP):
        for run in (model, torch.compile(model, backend="aot_eager")):
            model.zero_grad()
            run(**batch, labels=labels).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4)


def test_decoding_compiled_before_the_patch() -> None:
    """generate keeps its compiled step; one made of the dense model knows nothing of layers of several lengths."""
    settings: Any = {"fullgraph": True, "dynamic": False, "backend": "eager", "mode": None}
    config: Any = CompileConfig(**settings)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config}
    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    with vtprune.patch(model, "fastv", keep=KEEP):
        tokens, right = reference.greedy(model, batch, 5)
    dense_tokens, dense = reference.greedy(model, batch, 5)
    close(reference.greedy(model, batch, 5, **options)[1], dense)
    with vtprune.patch(model, "fastv", keep=KEEP):
        ours, compiled = reference.greedy(model, batch, 5, **options)
        assert torch.equal(ours, tokens)
        close(compiled, right)
    ours, compiled = reference.greedy(model, batch, 5, **options)
    assert torch.equal(ours, dense_tokens)
    close(compiled, dense)


def test_a_plain_vision_transformer_compiled_before_the_patch() -> None:
    model, x = vits.model("timm-deit"), vits.images()
    with torch.no_grad():
        dense = vits.run(model, x)
        with vtprune.patch(model, "tome", keep=0.5):
            right = vits.run(model, x)
        compiled = torch.compile(model, backend="eager")
        close(vits.run(compiled, x), dense)
        with vtprune.patch(compiled, "tome", keep=0.5):
            close(vits.run(compiled, x), right)
        close(vits.run(compiled, x), dense)


# -- what records a call to run it again --------------------------------------------------------------------------


class Logits(nn.Module):
    """Tensors in, a tensor out, as tracers want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        call = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return self.model(**call, use_cache=False).logits


def exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.export.export(model, inputs, strict=False)


def traced(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.jit.trace(model, inputs)


def recorded(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(*inputs)


def mapped(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.vmap(model, randomness="same")(*(x[None] for x in inputs))


def fake(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(*(mode.from_tensor(x) for x in inputs))


RECORDERS = {
    "torch.export": exported,
    "torch.jit.trace": traced,
    "torch.fx": recorded,
    "torch.vmap": mapped,
    "fake or meta": fake,
}


@pytest.mark.parametrize("what", RECORDERS)
@pytest.mark.parametrize("method", ["divprune", "topk_cls"])
@torch.no_grad()
def test_recordings_are_refused(what: str, method: str) -> None:
    """A recording keeps the picks of its example, which are wrong for the next image."""
    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    inputs = (batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    with vtprune.patch(model, method, keep=KEEP) as handle:
        with pytest.raises(UnsupportedCall, match=what):
            RECORDERS[what](Logits(model).eval(), inputs)
        assert handle.last is None
        model(**batch)
        assert handle.last is not None, "the next call is pruned"


def test_a_captured_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU only the question whether one is recording can be answered for it."""
    model, batch = families.fresh("llava"), families.inputs("llava")
    with vtprune.patch(model, "divprune", keep=KEEP):
        monkeypatch.setattr("vtprune.hf.checks.capturing", lambda device: True)
        with pytest.raises(UnsupportedCall, match="a CUDA graph"):
            logits(model, batch)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_function_transforms(method: str) -> None:
    """torch.func.grad of the weights equals backward; vmap over several weights would need picks for each."""
    from torch.func import functional_call, grad, vmap

    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    batch = dict(batch, labels=batch["input_ids"].clamp(min=families.FIRST_TEXT))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return functional_call(model, given, (), batch).loss

    with vtprune.patch(model, method, keep=KEEP):
        model(**batch).loss.backward()
        found = grad(loss)(weights)
        for name, p in model.named_parameters():
            if p.grad is not None:
                close(found[name], p.grad)
        with pytest.raises(UnsupportedCall, match="vmap"):
            vmap(loss)({name: torch.stack([p, p]) for name, p in weights.items()})


@torch.no_grad()
def test_strict_export_and_symbolic_tracing_fail_loudly() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    inputs = (batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
    with vtprune.patch(model, "divprune", keep=KEEP):
        with pytest.raises(Exception, match=r"(?s)vtprune|Unsupported|graph break"):
            torch.export.export(Logits(model).eval(), inputs, strict=True)
        with pytest.raises(Exception, match=r"torch.fx|symbolically traced|Proxy"):
            torch.fx.symbolic_trace(Logits(model).eval())


def test_a_copy_is_told_apart() -> None:
    """What announces hooks to compilers belongs to the copy as well, and leaves it with the copy's own patch."""
    batch, dense, pruned, _ = wants("llava", "divprune")
    model = families.fresh("llava")
    with vtprune.patch(model, "divprune", keep=KEEP):
        twin = copy.deepcopy(model)
    close(logits(whole(twin), batch), pruned)
    vtprune.unpatch(twin)
    close(logits(whole(twin), batch), dense)
    assert not [name for name, module in twin.named_modules() if "forward" in module.__dict__]
