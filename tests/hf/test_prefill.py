"""Prefill at bucketed lengths: the same logits as eager, one compilation a bucket, refusals."""

from __future__ import annotations

from functools import partial

import families
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import vtprune
from vtprune import UnsupportedCall, UnsupportedModel
from vtprune.evals.speed import bench as benchmark
from vtprune.evals.speed.bench import bench, subject
from vtprune.evals.speed.prefill import Bucketed


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("rows", [(1,), (2, 1)], ids=["one row", "ragged rows"])
def test_bucketed_prefill_and_decode_equal_eager(family: str, rows: tuple[int, ...]) -> None:
    model, inputs = families.fresh(family), dict(families.inputs(family, rows=rows))
    how = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    runner = Bucketed(model, "compile", bucket=64, backend="eager")
    for keep in (1.0, 0.5):
        with vtprune.patch(model, "divprune", keep=keep):
            eager = model.generate(**inputs, **how)
            with runner:
                bucketed = model.generate(**inputs, **how)
        assert torch.equal(bucketed.sequences, eager.sequences)
        assert torch.allclose(torch.stack(bucketed.logits), torch.stack(eager.logits), atol=1e-5)
    assert runner.runs
    assert all(size % 64 == 0 and masked == (len(rows) > 1) for _, size, masked in runner.runs)
    assert "forward" not in model.get_decoder().__dict__


def test_lengths_of_one_bucket_share_one_compilation() -> None:
    model, inputs = families.fresh("llava"), dict(families.inputs("llava", rows=(1,)))  # 10 words, 25 visual tokens
    counter = CompileCounter()
    runner = Bucketed(model, "compile", bucket=16, backend=counter)
    with torch.inference_mode():
        for keep, graphs in ((7, 1), (22, 1), (13, 1), (5, 2), (20, 2)):
            with vtprune.patch(model, "random", keep=keep) as handle, runner:
                model(**inputs, logits_to_keep=1)
                assert set(handle.last.lengths) == {keep + 10}
            assert counter.frame_count == graphs
    assert [size for _, size, _ in runner.runs] == [32, 16]


def test_bench_runs_both_ways_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "Bucketed", partial(Bucketed, backend="eager"))
    what = subject("tiny", "cpu", torch.float32)
    ways = ["eager", "compile"]
    made = bench(what, ["random", "fastv"], [0.25], prefill=ways, bucket=512, repeats=1, new_tokens=1, progress=False)
    assert [(row["method"], row["prefill"]) for row in made.rows] == [
        ("dense", "eager"),
        ("random", "eager"),
        ("fastv", "eager"),
        ("dense", "compile"),
        ("random", "compile"),
    ]
    assert "Not run: fastv at 0.25, compile" in made.notes[-1]
    assert made.rows[1]["kept_by_layer"] == made.rows[4]["kept_by_layer"]
    assert made.rows[3]["ttft_speedup"] == 1  # against dense with the same prefill
    assert made.environment["limits"]["floors"].keys() == {"eager", "compile"}
    assert made.rows[4]["peak_bytes"] is None
    assert any("random, compile" in line for line in made.cells()[1] for line in line)


def test_what_cannot_be_bucketed_is_refused() -> None:
    model = families.fresh("llava")
    with pytest.raises(ValueError, match="'fast': choose one of eager, graph, compile"):
        Bucketed(model, "fast")
    with pytest.raises(ValueError, match="captures CUDA graphs"):
        Bucketed(model, "graph")
    with pytest.raises(ValueError, match="bucket=0"):
        Bucketed(model, "compile", bucket=0)
    with pytest.raises(UnsupportedModel, match="causal full attention"):
        Bucketed(families.fresh("gemma3"), "compile")
    runner = Bucketed(model, "compile", backend="eager")
    with vtprune.patch(model, "fastv", keep=0.5, layer=1), pytest.raises(UnsupportedModel, match="stages inside"):
        runner.__enter__()
    with torch.inference_mode(), runner, pytest.raises(UnsupportedCall, match="cannot serve output_hidden_states"):
        model(**families.inputs("llava"), output_hidden_states=True)
    deep = families.fresh("qwen3_vl")
    with (
        torch.inference_mode(),
        Bucketed(deep, "compile", backend="eager"),
        pytest.raises(UnsupportedCall, match=r"cannot serve .*deepstack"),
    ):
        deep(**families.inputs("qwen3_vl"))
