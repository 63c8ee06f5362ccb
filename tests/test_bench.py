"""The benchmark: FLOPs against torch's counter, bytes against the cache, limits against published arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import vtprune
from vtprune.evals import geometries
from vtprune.evals.bench import Subject, bench, hooks, subject
from vtprune.evals.flops import CARDS, TextCost, card, counted, ideal_llm

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
}
LLAMA_7B = TextCost(32, 4096, 4096, 4096, 11008, 32000)
QWEN2_7B = TextCost(28, 3584, 3584, 512, 18944, 152064)


@pytest.fixture(scope="module")
def tiny_subject() -> Subject:
    return subject("tiny", "cpu", torch.float32, batch=2)


@pytest.fixture(scope="module")
def report(tiny_subject: Subject):
    return bench(tiny_subject, ["divprune", "fastv"], [0.25], repeats=2, new_tokens=2, progress=False)


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES, num_key_value_heads=4), Qwen2Config(**SIZES, num_key_value_heads=2)],
    ids=["llama", "qwen2, grouped keys"],
)
def test_prefill_flops_match_torch(config) -> None:
    config._attn_implementation = "eager"  # it computes the whole square, which is what torch counts
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 500, (1, 70))
    with torch.inference_mode():
        seen = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    assert TextCost.of(config).prefill(70, causal=False) == pytest.approx(seen, rel=0.01)


def test_pruned_prefill_flops_match_torch(tiny_subject: Subject) -> None:
    model, inputs = tiny_subject.model, tiny_subject.inputs
    text = TextCost.of(model.config.get_text_config(), width=4)
    with vtprune.patch(model, "random", keep=0.25) as handle, torch.inference_mode():
        seen = counted(lambda: model(**inputs, logits_to_keep=1))
        lengths = handle.last.lengths
    seen -= counted(tiny_subject.encode)
    assert len(set(lengths)) == 1
    assert 2 * text.prefill(lengths, causal=False) == pytest.approx(seen, rel=0.02)


def test_weight_bytes_are_those_of_the_matrices() -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert TextCost.of(config, width=4).weight_bytes == sum(p.nbytes for p in weights)


def test_lengths_by_layer_cost_what_their_layers_cost() -> None:
    head = 2 * LLAMA_7B.d * LLAMA_7B.vocab
    once = LLAMA_7B.prefill(640) - head
    half = LLAMA_7B.prefill([640] * 16 + [0] * 16) - head
    assert half * 2 == once
    assert LLAMA_7B.kv_bytes(1) == 512 * 1024
    assert QWEN2_7B.kv_bytes(1) == 56 * 1024


@pytest.mark.parametrize(
    ("text", "tokens", "milliseconds"),
    [
        (LLAMA_7B, 636, 10.56),  # LLaVA-1.5, all tokens: bound by compute
        (LLAMA_7B, 124, 3.10),  # LLaVA-1.5, 11 %: bound by reading the weights
        (QWEN2_7B, 6332, 114.8),  # LLaVA-OneVision video, all tokens
    ],
)
def test_ideal_prefill_on_a_known_card(text: TextCost, tokens: int, milliseconds: float) -> None:
    gpu = card("NVIDIA H200")
    assert gpu is CARDS["NVIDIA H200"]
    assert 1e3 * ideal_llm(gpu, text, tokens) == pytest.approx(milliseconds, rel=0.02)
    assert card("Some other card") is None
    assert card(None) is None


def test_rows_hold_what_was_measured(report, tiny_subject: Subject) -> None:
    dense, divprune, fastv = report.rows
    assert (dense["method"], divprune["method"], fastv["method"]) == ("dense", "divprune", "fastv")
    text = TextCost.of(tiny_subject.model.config.get_text_config(), width=4)
    decoded = 2  # steps that were appended after the bytes were read must not count
    assert dense["kv_bytes"] == 2 * text.kv_bytes(tiny_subject.tokens)
    assert divprune["kv_bytes"] == 2 * text.kv_bytes(tiny_subject.tokens - 192)
    assert divprune["kept_by_layer"] == [64] * 6
    assert fastv["kept_by_layer"] == [256, 256, 64, 64, 64, 64]
    assert divprune["flops"] < fastv["flops"] < dense["flops"]
    for row in report.rows:
        assert row["ttft_ms"] > 0
        assert row["decode_ms_per_token"] > 0
        assert len(row["ttft_ms_all"]) == decoded
        assert row["of_roofline_limit"] is None  # this processor is no known card
        assert 0 < row["of_stack_limit"] < 2
    assert dense["selector_ms"] is None
    assert 0 < divprune["selector_ms"] < divprune["ttft_ms"]


def test_one_file_a_run_names_machine_versions_and_commit(report, tmp_path: Path) -> None:
    path = report.write(tmp_path)
    assert path.name.startswith("tiny_cpu_float32_b2_")
    read = json.loads(path.read_text())
    env = read["environment"]
    assert env.keys() >= {"gpu", "cpu", "versions", "commit", "dtype", "batch", "formula", "time", "repeats"}
    assert env["visual_tokens"] == 256
    assert read["rows"] == report.rows
    header, lines = report.cells()
    assert all(len(line) == len(header) for line in lines)


def test_hooks_are_compared_at_equal_length(tiny_subject: Subject) -> None:
    before = [len(m._forward_pre_hooks) for m in tiny_subject.model.modules()]
    made = hooks(tiny_subject, "divprune", 0.25, steps=4, progress=False)
    row = made.rows[0]
    assert row["cached_tokens"] == tiny_subject.tokens - 192
    assert row["ratio"] == pytest.approx(row["patched_ms"] / row["unpatched_ms"])
    assert [len(m._forward_pre_hooks) for m in tiny_subject.model.modules()] == before
    assert made.file_name().startswith("hooks_tiny_cpu")


VISUAL = {  # at full size the first is 576, the others as here: towers keep their image size when narrowed
    "llava-1.5-7b": 576,
    "llava-next-7b": 576 + 48 * 49,
    "llava-onevision-7b-video": 32 * 196 + 1,
    "qwen2.5-vl-7b": 1280,
}


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b"])
def test_a_shrunk_geometry_keeps_its_tokens_and_says_that_it_is_shrunk(name: str) -> None:
    what = subject(name, "cpu", torch.float32, layers=2, scale=0.04)
    assert what.visual == VISUAL[name]
    assert what.tokens == what.visual + geometries.TEXT_TOKENS
    made = bench(what, ["random"], [0.11], repeats=1, new_tokens=1, progress=False)
    assert "SHRUNK to 2 layer(s) and widths x 0.04" in made.notes[0]
    assert "_shrunk_" in made.file_name()
    assert made.rows[1]["kept_by_layer"] == [round(0.11 * what.visual)] * 2


@pytest.mark.parametrize("name", VISUAL)
def test_full_size_configs_are_the_published_ones(name: str) -> None:
    config = geometries.GEOMETRIES[name].config(None, 1.0)
    text = TextCost.of(config.get_text_config())
    known = LLAMA_7B if text.layers == 32 else QWEN2_7B
    assert (text.layers, text.d, text.d_kv, text.mlp) == (known.layers, known.d, known.d_kv, known.mlp)


def test_impossible_requests_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"unknown geometry 'llava'; choose one of: tiny, llava-1\.5-7b"):
        subject("llava", "cpu", torch.float32)
    with pytest.raises(ValueError, match="needs a GPU: shrink it with --layers"):
        subject("llava-1.5-7b", "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"scale=2.0 is outside \(0, 1\]"):
        subject("llava-1.5-7b", "cpu", torch.float32, scale=2.0)
    with pytest.raises(ValueError, match="layers=0"):
        subject("llava-1.5-7b", "cpu", torch.float32, layers=0)


def test_a_stage_the_model_cannot_take_fails_before_the_run(tiny_subject: Subject) -> None:
    with pytest.raises(Exception, match="layer 40"):
        bench(tiny_subject, ["divprune", "fastv:layer=40"], [0.25], repeats=1, progress=False)
