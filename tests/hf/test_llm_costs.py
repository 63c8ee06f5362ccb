"""What a stage inside the LLM costs: operations counted by torch, keys and values stored, memory at the peak."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import families
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune import Stage
from vtprune.evals.speed.flops import TextCost
from vtprune.methods.in_llm.withdraw import Withdraw
from vtprune.tap import attach

DEPTH = 4
WIDTH = 4  # bytes of a float32
WORDS = 7  # behind the image


def schedule(name: str, keep: float | int, **options: Any) -> Callable[[], list[Stage]]:
    return lambda: vtprune.create(name, **options).stages(keep, DEPTH)


# What asks for a few attention rows only; AIM's PageRank and what SpAtten sums up are about all of them.
BY_ROWS: dict[str, Callable[[], list[Stage]]] = {
    "fastv": schedule("fastv", 0.25),
    "flowcut_llm": schedule("flowcut_llm", 0.25),
    "holitom_inner": schedule("holitom_inner", 0.5),
    "pyramiddrop": schedule("pyramiddrop", 0.125),
    "sparsevlm": schedule("sparsevlm", 0.2),
    "sparsevlm plus": schedule("sparsevlm", 0.2, version="plus"),
    "transprune": schedule("transprune", 0.125),
    "lazyllm": schedule("lazyllm", 0.3),
    "dycoke_kv": schedule("dycoke_kv", 0.3),
    "withdraw": lambda: [Stage(2, Withdraw(0.99))],
    "withdraw, untested": lambda: [Stage(2, Withdraw(None))],
}
SCHEDULES = BY_ROWS | {"aim_inllm": schedule("aim_inllm", 0.2), "spatten": schedule("spatten", 0.3)}


@cache
def model(side: int, attention: str = "sdpa") -> Any:
    """A LLaVA of side x side visual tokens, whose layers are wide enough to outweigh what is counted beside them."""
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 8192}
    tower = families._tower("clip_vision_model", 4 * side, layers=1)
    text = families._text("llama", **size)
    config = families._config("llava", text, tower, **families._INDEX, image_seq_length=side * side)
    made = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    families._spread(made)
    return made.eval()


def inputs(side: int, length: int) -> dict[str, Any]:
    """One image, WORDS behind it and as many in front of it as make the prompt `length` long."""
    visual, generator = side * side, torch.Generator().manual_seed(0)
    words = torch.randint(families.FIRST_TEXT, families.VOCAB, (length - visual,), generator=generator).tolist()
    ids = [*words[WORDS:], *[families.IMAGE] * visual, *words[:WORDS]]
    pixels = torch.randn(1, 3, 4 * side, 4 * side, generator=generator)
    mask = torch.ones(1, length, dtype=torch.long)
    return {"input_ids": torch.tensor([ids]), "attention_mask": mask, "pixel_values": pixels, "logits_to_keep": 1}


def merging(last: Any, d: int) -> int:
    """Operations of merges, which are the methods' own: k of n tokens made as one product, and for HoliTom whom the
    n - k others are most like."""
    found = [(u, len(u.idx)) for u in last.units if u.assignment.merges]
    return sum(2 * d * k * (u.n + (u.n - k) * (u.method == "holitom_inner")) for u, k in found)


def planned(stages: list[Stage], visual: int, text: int) -> list[int]:
    """Tokens that each layer runs on and stores, by what the stages say they keep."""
    out, left = [], visual
    for layer in range(DEPTH):
        for stage in (s for s in stages if s.where == layer and "prefill" in s.method.phases):
            left = min(left, stage.budgets([visual])[0] or 0)  # no budget: a withdrawal
        out.append(left + text)
    return out


def counted(stages: list[Stage], batch: dict[str, Any]) -> tuple[int, Any]:
    """Operations of the text model and its head, whose attention is a plain product here, and what the prefill kept."""
    eager = model(20, "eager")
    handle = vtprune.patch(eager, stages) if stages else None
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            eager(**batch)
    finally:
        vtprune.unpatch(eager)
    by_module = counter.get_flop_counts()
    parts = [k for k in by_module if k.endswith((".language_model", ".lm_head"))]
    assert len(parts) == 2
    return sum(sum(by_module[k].values()) for k in parts), handle and handle.last


def cost(side: int = 20) -> TextCost:
    return TextCost.of(model(side).config.text_config, width=WIDTH)


def test_operations_of_the_dense_model() -> None:
    total, _ = counted([], inputs(20, 424))
    assert total == cost().prefill(424, causal=False)


@pytest.mark.parametrize("method", BY_ROWS)
def test_operations_equal_the_formula(method: str) -> None:
    """Scores are rows, and rows are less than 1 %; a stage that reads its own layer makes the keys of what it drops."""
    batch, stages = inputs(20, 424), BY_ROWS[method]()
    total, last = counted(stages, batch)
    lengths = planned(stages, 400, 24)
    assert last.lengths == lengths
    own = sorted({s.where for s in stages if isinstance(s.where, int) and any(n.layer == 0 for n in s.method.needs)})
    looks = sum(cost().look(([424, *lengths])[layer] - lengths[layer]) for layer in own)
    formula = cost().prefill(lengths, causal=False) + looks + merging(last, cost().d)
    assert total == pytest.approx(formula, rel=0.01)
    dense = cost().prefill(424, causal=False)
    assert total < 0.97 * dense or method == "dycoke_kv"


@pytest.mark.parametrize("method", SCHEDULES)
def test_stored_keys_and_values_equal_the_plan(method: str) -> None:
    batch, stages = inputs(20, 424), SCHEDULES[method]()
    plan = planned(stages, 400, 24)
    with torch.no_grad(), vtprune.patch(model(20), stages):
        held: Any = model(20)(**batch, use_cache=True).past_key_values
    stored = [layer.keys.nbytes + layer.values.nbytes for layer in held.layers]
    one = TextCost(layers=1, d=0, d_q=0, d_kv=cost().d_kv, mlp=0, vocab=0, width=WIDTH)
    assert stored == [one.kv_bytes(n) for n in plan]
    assert sum(stored) == cost().kv_bytes(plan)
    assert [layer.keys.untyped_storage().nbytes() for layer in held.layers] == [n // 2 for n in stored], (
        "what was dropped must be freed, not looked past"
    )


# -- memory ----------------------------------------------------------------------------------------------------------

SIDE, LONG = 63, 4096  # 3969 visual tokens
MAP = LONG * LONG * WIDTH  # bytes of one head's attention map


@torch.no_grad()
def peak(vlm: Any, stages: list[Stage] | None = None) -> int:
    """Most bytes that the text model holds at once beyond what it was given, by torch's own record of allocations."""
    text, batch = vlm.get_decoder(), inputs(SIDE, LONG)
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    hooks = [text.register_forward_pre_hook(lambda *_: recorder.start())]
    if stages:
        vtprune.patch(vlm, stages)
    hooks.append(text.register_forward_hook(lambda *_: recorder.stop()))
    try:
        vlm(**batch, use_cache=True)
    finally:
        vtprune.unpatch(vlm)
        for hook in hooks:
            hook.remove()
    events = recorder.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = torch.tensor([size for _, size in changes]).cumsum(0)
    return int(held.max())


@pytest.fixture(scope="module")
def dense_peak() -> int:
    return peak(model(SIDE))


@pytest.mark.parametrize("method", BY_ROWS)
def test_memory_at_the_peak_is_that_of_the_dense_model(dense_peak: int, method: str) -> None:
    """4,096 tokens, fused attention: rows are read, no map is made."""
    assert dense_peak < MAP / 2, "a map would not be seen"
    assert peak(model(SIDE), BY_ROWS[method]()) <= 1.02 * dense_peak


def test_a_map_would_be_seen(dense_peak: int) -> None:
    """Eager attention makes one; so does a tap that asks for all rows."""
    assert peak(model(SIDE, "eager"), BY_ROWS["fastv"]()) > dense_peak + MAP
    layer = model(SIDE).get_decoder().layers[1].self_attn
    undo = attach(layer, lambda module, q, k, v, mask, scaling: (q[:, :1] @ k[:, :1].mT * scaling).softmax(-1).sum())
    try:
        assert peak(model(SIDE), BY_ROWS["fastv"]()) > dense_peak + MAP / 2
    finally:
        undo()
