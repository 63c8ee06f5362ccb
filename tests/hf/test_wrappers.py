"""A model that stands in something else: what is inside is patched, once, or the error says what to call.

The oracle is the patch of the model by itself; for adapters, of a copy with the adapter merged into its weights.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from typing import Any

import families
import numpy as np
import pytest
import torch
import vits
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import vtprune
from vtprune import Stage, UnsupportedModel
from vtprune.types import budget

KEEP = 0.3
some_families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
some_methods = pytest.mark.parametrize("method", ["divprune", "fastv"])


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    return model(**batch).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def pruned(model: Any, method: str, batch: dict[str, Any]) -> Tensor:
    with vtprune.patch(model, method, keep=KEEP):
        return logits(model, batch)


class Head(nn.Module):
    """A model under some attribute, and something learnt beside it."""

    def __init__(self, model: Any, name: str = "pretrained_model") -> None:
        super().__init__()
        self.name, self.config = name, getattr(model, "config", None)
        setattr(self, name, model)
        self.head = nn.Linear(4, 1)

    def forward(self, **call: Any) -> Any:
        return getattr(self, self.name)(**call)


def lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)).eval()


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def parallel(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "value head": Head,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": parallel,
    "averaged": lambda model: Head(torch.optim.swa_utils.AveragedModel(model)),
    "nested": lambda model: Head(parallel(model)),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@some_methods
def test_the_model_inside_is_patched(wrapper: str, method: str) -> None:
    batch = families.inputs("llava")
    dense, right = logits(families.model("llava"), batch), pruned(families.fresh("llava"), method, batch)
    model = WRAPPERS[wrapper](families.fresh("llava")).eval()
    handle = vtprune.patch(model, method, keep=KEEP)
    close(logits(model, batch), right)
    assert handle.last is not None
    inner = handle._session.adapter.model
    for again in (model, inner, inner.base_model):
        with pytest.raises(ValueError, match="already patched"):
            vtprune.patch(again, method, keep=KEEP)
    vtprune.unpatch(model)
    assert not handle.active
    assert torch.equal(logits(model, batch), dense)
    inside = vtprune.patch(inner, method, keep=KEEP)
    with pytest.raises(ValueError, match="already patched"):
        vtprune.patch(model, method, keep=KEEP)
    vtprune.unpatch(model)
    assert not inside.active
    assert torch.equal(logits(model, batch), dense)


def test_the_base_model_is_the_same_model() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava")
    dense, right = logits(model, batch), pruned(families.fresh("llava"), "divprune", batch)
    with vtprune.patch(model.base_model, "divprune", keep=KEEP):
        close(logits(model, batch), right)
        with pytest.raises(ValueError, match="already patched"):
            vtprune.patch(model, "divprune", keep=KEEP)
        added = vtprune.patch(model, "fastv", keep=4, add=True)
        assert len(added.stages) == 2
        logits(model, batch)
        assert added.last.lengths[0] > added.last.lengths[-1]
        vtprune.unpatch(model)
    assert torch.equal(logits(model, batch), dense)


def test_a_pipeline_is_taken_for_its_model() -> None:
    """Only its class and its `model` are asked for, so none is built here."""
    from transformers import Pipeline

    model, batch = families.fresh("llava"), families.inputs("llava")
    right = pruned(families.fresh("llava"), "divprune", batch)

    class Made(Pipeline):
        def __init__(self) -> None:
            self.model = model

        def _sanitize_parameters(self, **_: Any) -> Any: ...
        def preprocess(self, *_: Any, **__: Any) -> Any: ...
        def _forward(self, *_: Any, **__: Any) -> Any: ...
        def postprocess(self, *_: Any, **__: Any) -> Any: ...

    pipe: Any = Made()
    handle = vtprune.patch(pipe, "divprune", keep=KEEP)
    close(logits(model, batch), right)
    vtprune.unpatch(pipe)
    assert not handle.active


@pytest.mark.usefixtures("group")
def test_unknown_wrappers_name_the_call() -> None:
    model, other = families.fresh("llava"), families.fresh("qwen2_5_vl")
    cases = [
        (Head(model, "backbone"), r"Head .* holds 1: call vtprune\.patch\(model\.backbone, \.\.\.\)"),
        (Head(parallel(model), "policy"), r"call vtprune\.patch\(model\.policy\.module, \.\.\.\)"),
        (parallel(Head(model, "backbone")), r"call vtprune\.patch\(model\.module\.backbone, \.\.\.\)"),
        (nn.ModuleList([model, other]), r"holds 2: call vtprune\.patch\(model\[0\], .* or vtprune\.patch\(model\[1\]"),
        (nn.Sequential(vits.model("timm-deit"), nn.Linear(4, 2)), r"call vtprune\.patch\(model\[0\], \.\.\.\)"),
    ]
    for wrapper, message in cases:
        with pytest.raises(UnsupportedModel, match=message):
            vtprune.patch(wrapper, "random", keep=KEEP)
    with pytest.raises(UnsupportedModel, match="pass the whole model"):
        vtprune.patch(model.get_decoder(), "divprune", keep=KEEP)
    with pytest.raises(UnsupportedModel, match="Linear"):
        vtprune.patch(nn.Linear(2, 2), "divprune", keep=KEEP)
    for nothing in ("llava", None, parallel):
        with pytest.raises(TypeError, match="pass the loaded Hugging Face model itself"):
            vtprune.patch(nothing, "divprune", keep=KEEP)


def test_wrappers_whose_hooks_would_act_elsewhere_are_refused() -> None:
    copies = nn.DataParallel(families.fresh("llava"))
    copies.device_ids = [0, 1]
    with pytest.raises(UnsupportedModel, match=r"copies the model to devices \[0, 1\].*DistributedDataParallel"):
        vtprune.patch(copies, "divprune", keep=KEEP)


@pytest.mark.usefixtures("group")
def test_a_vision_transformer_inside() -> None:
    model, x = vits.model("timm-deit"), vits.images()
    with torch.no_grad(), vtprune.patch(model, "tome", keep=0.5):
        right = vits.run(model, x)
    with torch.no_grad(), vtprune.patch(parallel(model), "tome", keep=0.5) as handle:
        close(vits.run(model, x), right)
        with pytest.raises(ValueError, match="already patched"):
            vtprune.patch(model, "tome", keep=0.5)
    assert not handle.active


def test_a_tower_patched_alone_is_not_patched_again_by_its_model() -> None:
    model = families.fresh("llava")
    with vtprune.patch(model.base_model.get_encoder(modality="image"), "random", keep=0.5):
        with pytest.raises(ValueError, match="already patched"):
            vtprune.patch(model, "divprune", keep=KEEP)
        with pytest.raises(ValueError, match="a part of this model is patched alone"):
            vtprune.patch(model, "divprune", keep=KEEP, add=True)


# -- adapters -----------------------------------------------------------------------------------------------------


@some_methods
@some_families
def test_lora_is_pruned_as_its_merged_model_is(family: str, method: str) -> None:
    batch, model = families.inputs(family), lora(families.fresh(family))
    right = pruned(copy.deepcopy(model).merge_and_unload(), method, batch)
    without = pruned(families.fresh(family), method, batch)
    assert not torch.allclose(right, without, atol=1e-3), "the adapter does something"
    options = {"max_new_tokens": 4, "do_sample": False}
    with vtprune.patch(model.get_base_model(), method, keep=KEEP):
        tokens = model.generate(**batch, **options)
    with vtprune.patch(model, method, keep=KEEP) as handle:
        close(logits(model, batch), right)
        with model.disable_adapter():
            close(logits(model, batch), without)
        close(logits(model, batch), right)
        assert torch.equal(model.generate(**batch, **options), tokens)
        assert handle.active
    vtprune.patch(model, method, keep=KEEP)
    bare = model.unload()
    close(logits(bare, batch), without)
    vtprune.unpatch(bare)
    assert torch.equal(logits(bare, batch), logits(families.model(family), batch))


def _traces(model: nn.Module) -> list[tuple[str, int, int, set[str]]]:
    found = []
    for name, m in model.named_modules():
        own = {key for key in m.__dict__ if key == "forward" or key == "_vtprune" or key.startswith("get_")}
        found.append((name, len(m._forward_pre_hooks), len(m._forward_hooks), own))
    return found


@some_methods
def test_an_adapter_may_come_and_merge_after_the_patch(method: str) -> None:
    batch, model, untouched = families.inputs("llava"), families.fresh("llava"), families.fresh("llava")
    logits(untouched, batch)  # transformers adds hooks of its own
    alone = lora(families.fresh("llava")).merge_and_unload()
    right, dense = pruned(alone, method, batch), logits(alone, batch)
    handle = vtprune.patch(model, method, keep=KEEP)
    adapted = lora(model)
    close(logits(adapted, batch), right)
    with pytest.raises(ValueError, match="already patched"):
        vtprune.patch(adapted, method, keep=KEEP)
    merged = adapted.merge_and_unload()
    close(logits(merged, batch), right)
    handle.remove()
    close(logits(merged, batch), dense)
    assert _traces(merged) == _traces(untouched)


@some_methods
def test_lora_learns_on_pruned_prompts(method: str) -> None:
    model, batch = lora(families.fresh("llava")).train(), families.inputs("llava")
    labels = batch["input_ids"].clamp(min=families.FIRST_TEXT)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.Adam(weights.values(), lr=1e-2), []
    with vtprune.patch(model, method, keep=KEEP) as handle:
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(**batch, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
            assert all(p.grad.abs().sum() > 0 for n, p in weights.items() if "language_model" in n)
            optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert handle.last.lengths[-1] < labels.shape[1]


VIRTUAL = 3
SHAPE: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL, "num_layers": 4}


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(token_dim=families.WIDTH, num_attention_heads=2, **SHAPE),
        PrefixTuningConfig(token_dim=16, num_attention_heads=1, **SHAPE),
    ],
    ids=["prompt", "prefix"],
)
@torch.no_grad()
def test_virtual_tokens_stay(config: Any) -> None:
    """The text model by hand, on what is left of the row that it is fed without a patch."""
    model, batch = get_peft_model(families.fresh("llava"), config).eval(), families.inputs("llava")
    fed: dict[str, Any] = {}
    inner = model.get_base_model()
    text = inner.get_decoder()
    hook = text.register_forward_pre_hook(lambda _, args, call: fed.update(call), with_kwargs=True)
    model(**batch)
    hook.remove()
    with vtprune.patch(model, "divprune", keep=KEEP) as handle:
        ours, index = model(**batch).logits, handle.last.index
    past = model.get_prompt(batch_size=1) if config.peft_type == "PREFIX_TUNING" else None
    places = index + (VIRTUAL if past is not None else 0)
    call = {"inputs_embeds": fed["inputs_embeds"][:, index[0]], "position_ids": places}
    if past is not None:
        call["past_key_values"] = past
        call["attention_mask"] = torch.ones(1, VIRTUAL + index.shape[1], dtype=torch.long)
    else:
        assert index[0, :VIRTUAL].tolist() == list(range(VIRTUAL))
        call["attention_mask"] = torch.ones(1, index.shape[1], dtype=torch.long)
    close(ours[:, index[0]], inner.lm_head(text(**call)[0]))


# -- accelerate -----------------------------------------------------------------------------------------------------


@some_methods
@pytest.mark.parametrize("first", ["patch", "dispatch", "offload"])
def test_accelerate_hooks(first: str, method: str) -> None:
    """It puts a forward on instances, before or after the patch does; each takes off its own."""
    from accelerate import cpu_offload, dispatch_model

    batch = families.inputs("llava")
    right, dense = pruned(families.fresh("llava"), method, batch), logits(families.model("llava"), batch)
    model = families.fresh("llava")
    if first == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif first == "dispatch":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    handle = vtprune.patch(model, method, keep=KEEP)
    if first == "patch":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    close(logits(model, batch), right)
    handle.remove()
    assert torch.equal(logits(model, batch), dense)
    with vtprune.patch(model, method, keep=KEEP):
        close(logits(model, batch), right)
    assert torch.equal(logits(model, batch), dense)


# -- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.int64(8), np.int32(8), np.uint8(8), np.float64(0.25), np.float32(0.25)])
def test_numbers_of_numpy(number: Any) -> None:
    plain = number.item()
    model, batch = families.fresh("llava"), families.inputs("llava")
    stage = Stage(np.int64(2), vtprune.create("fastv"), keep=number)  # type: ignore[arg-type]
    total = Stage("llm", vtprune.create("random"), keep_total=number)
    assert (type(stage.keep), stage.keep, type(stage.where)) == (type(plain), plain, int)
    assert (type(total.keep_total), total.keep_total) == (type(plain), plain)
    assert budget(number, 25) == budget(plain, 25)
    with vtprune.patch(model, "divprune", keep=plain) as handle:
        right, index = logits(model, batch), handle.last.index
    with vtprune.patch(model, "divprune", keep=number) as handle:
        assert torch.equal(logits(model, batch), right)
        assert torch.equal(handle.last.index, index)
        assert type(handle.stages[0].keep) is type(plain)
    with vtprune.patch(model, stage):
        assert torch.isfinite(logits(model, batch)).all()


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (np.bool_(True), TypeError, "use a float in"),
        (True, TypeError, "use a float in"),
        (np.int64(0), ValueError, "keeps nothing"),
        (np.float32(1.5), ValueError, "outside the valid range"),
        (np.float32("nan"), ValueError, "outside the valid range"),
        (np.array(0.25), TypeError, r"call its \.item\(\)"),
        (torch.tensor(0.25), TypeError, r"call its \.item\(\)"),
        (torch.tensor([0.25]), TypeError, "use a float in"),
    ],
)
def test_other_numbers_are_refused(number: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtprune.patch(families.model("llava"), "divprune", keep=number)
    with pytest.raises(error, match=message):
        Stage("llm", vtprune.create("divprune"), keep_total=number)
