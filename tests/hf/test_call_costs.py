"""What a patch adds to calls that prune nothing: counted torch operations, Python calls, masks and rotary tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import signal_oracles as oracles
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune import cache as kv
from vtprune.signals import LayerAttention, kinds

OURS = Path(vtprune.__file__).parent
METHODS = ("divprune", "fastv", "spatten", "pyramiddrop", "sparsevlm", "transprune", "aim_inllm")
every_method = pytest.mark.parametrize("method", METHODS)


class Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher, and what gathers keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.gathers += func.overloadpacket is torch.ops.aten.gather and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> int:
    with Operations() as counted:
        call()
    return counted.count


def python_calls(call: Callable[[], Any]) -> int:
    """Calls of functions of this package."""
    count = 0

    def see(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and Path(frame.f_code.co_filename).is_relative_to(OURS)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def words(model: Any, count: int = 20) -> Callable[[], Any]:
    ids = torch.tensor([families.text(3, count).ids])
    return lambda: model(input_ids=ids, use_cache=True)


@every_method
@torch.no_grad()
def test_a_call_without_images_adds_no_operation(method: str) -> None:
    """And no more than a look at whether there is something to do, at each of the places where a hook stands."""
    model = families.model("llava")
    call = words(model)
    dense = operations(call)
    with vtprune.patch(model, method, keep=0.3):
        assert operations(call) == dense
        entries = python_calls(call)
    layers, places = len(model.get_decoder().layers), 14  # one layer has at most so many: its hook, probes and covers
    assert entries <= 20 + places * layers


@every_method
@torch.no_grad()
def test_a_decode_step_adds_no_operation(method: str) -> None:
    """Without padding every layer sees all it stores."""
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    one = torch.tensor([[families.FIRST_TEXT]])

    def step_of(cache: Any) -> Callable[[], Any]:
        return lambda: model(input_ids=one, use_cache=True, **{kv.NAME: cache})

    dense = operations(step_of(model(**batch, use_cache=True)[kv.NAME]))
    with vtprune.patch(model, method, keep=0.3):
        assert operations(step_of(model(**batch, use_cache=True)[kv.NAME])) == dense


@torch.no_grad()
def test_rotary_tables_and_masks_are_made_once_for_layers_that_store_the_same() -> None:
    """Two turns with an image each, rows of different lengths: renumbered, padded and masked behind two stages."""
    model, batch = families.model("llava"), families.inputs("llava", rows=(2, 1))
    method = vtprune.create("sparsevlm", layers=(0,))
    stages = [replace(stage, positions="compact") for stage in method.stages(0.5, 4)]
    tables, masks = [], []
    text = model.get_decoder()
    length = batch["input_ids"].shape[1]
    one = torch.tensor([[families.FIRST_TEXT]] * 2)
    with vtprune.patch(model, stages):
        cache = model(**batch, use_cache=True)[kv.NAME]
        mask = torch.cat([batch["attention_mask"], batch["attention_mask"]], 1)
        model(**{**batch, "attention_mask": mask}, use_cache=True, **{kv.NAME: cache})
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        hooks = [text.rotary_emb.register_forward_hook(lambda *_: tables.append(1))]
        for layer in text.layers:
            see = lambda m, args, kwargs: masks.append(kwargs.get("attention_mask"))  # noqa: E731
            hooks.append(layer.self_attn.register_forward_pre_hook(see, with_kwargs=True))
        try:
            model(input_ids=one, attention_mask=mask, use_cache=True, **{kv.NAME: cache})
        finally:
            for hook in hooks:
                hook.remove()
    assert int(cache.get_seq_length()) == 2 * length + 1
    assert len(text.layers) == len(masks) == 4
    assert len(tables) == 2, "that of the text model, and that of the layers behind the stage"
    assert len({id(m) for m in masks if m is not None}) <= 2


@torch.no_grad()
def test_layers_to_which_tokens_come_back_share_one_mask_and_gather_nothing() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(2, 1))
    one, masks, lengths = torch.tensor([[families.FIRST_TEXT]] * 2), [], []
    see = lambda m, args, kwargs: masks.append(kwargs["attention_mask"])  # noqa: E731
    run = lambda m, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])  # noqa: E731
    with vtprune.patch(model, "lazyllm", keep=0.3, layers=(1,)):
        cache = model(**batch, use_cache=True)[kv.NAME]
        layers = model.get_decoder().layers
        hooks = [layer.self_attn.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
        hooks += [layer.mlp.register_forward_pre_hook(run, with_kwargs=True) for layer in layers]
        mask = batch["attention_mask"]
        try:
            for _ in range(4):
                mask = torch.cat([mask, mask[:, -1:]], 1)
                with Operations() as counted:
                    model(input_ids=one, attention_mask=mask, use_cache=True, **{kv.NAME: cache})
                assert counted.gathers == 0
                assert len({id(m) for m in masks[-3:]}) == 1
        finally:
            for hook in hooks:
                hook.remove()
    assert max(lengths) > 1, "nothing came back"


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind.asks != "all"], ids=lambda kind: kind.name)
def test_a_signal_reads_no_more_queries_than_it_says(kind: Any) -> None:
    """Where the layer has not run yet, the others are zeros, and values are those of one token."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(oracles.B, heads, oracles.N, 4, generator=g) for heads in (4, 2, 2))
    prompt: Any = oracles.Words()
    asked = torch.zeros(oracles.B, 1, oracles.N, 1)
    for row in range(oracles.B):
        slots = [oracles.LAST[row], *(oracles.TEXT[row] if kind.asks == "words" else ())]
        asked[row, :, slots] = 1
    whole = LayerAttention(q, k, v, None, 0.5, prompt=prompt)
    part = LayerAttention(q * asked, k, v[:, :, :1].expand_as(v), None, 0.5, prompt=prompt)
    assert torch.equal(kind(whole), kind(part))


@torch.no_grad()
def projected(keep: float | int) -> dict[str, int]:
    """Rows of hidden states that each projection of the layer with PyramidDrop's stage is given, by its own forward."""
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    attention, rows = model.get_decoder().layers[2].self_attn, {}
    undo = []
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(attention, name)

        def count(x: Tensor, name: str = name, linear: Any = linear) -> Tensor:
            rows[name] = rows.get(name, 0) + x.shape[:-1].numel()
            return type(linear).forward(linear, x)

        undo.append(linear)
        linear.forward = count
    try:
        with vtprune.patch(model, vtprune.create("pyramiddrop", layers=(2,)), keep=keep) as handle:
            model(**batch, use_cache=True)
            rows["enter"], rows["stay"] = handle.last.lengths[1:3]
    finally:
        for linear in undo:
            del linear.forward
    return rows


def test_a_look_at_the_layer_about_to_run_makes_its_keys_once() -> None:
    rows = projected(0.3)
    assert rows["stay"] < rows["enter"]
    assert rows["k_proj"] == rows["enter"]
    assert rows["q_proj"] == rows["v_proj"] == 1 + rows["stay"]


def test_gradients_reach_the_keys_of_a_layer_that_was_looked_at() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    weight = model.get_decoder().layers[2].self_attn.k_proj.weight
    before = weight.grad
    try:
        with vtprune.patch(model, vtprune.create("pyramiddrop", layers=(2,)), keep=0.3):
            model(**batch).logits.float().square().mean().backward()
        assert weight.grad is not None
        assert bool(weight.grad.abs().sum() > 0)
    finally:
        model.zero_grad(set_to_none=True)
        weight.grad = before
