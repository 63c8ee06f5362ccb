"""On a GPU: the same tokens as on the CPU, exact identity at keep=1.0, and real answers from the embedded model."""

from __future__ import annotations

import copy

import families
import pytest
import torch

import vtprune
from vtprune import Stage
from vtprune.core.prompt import PromptState
from vtprune.evals.accuracy import Exam
from vtprune.evals.toys import image as tiny
from vtprune.hf import hooks
from vtprune.hf.arguments import cut_text_call
from vtprune.hf.prefill import Prefill, open_prompt, run_before_llm
from vtprune.model_adapters.generic import Features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = [cls.name for cls in vtprune.methods()]
FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "mistral3"]


def _pair(family: str):
    """(CPU model, its twin on the GPU, CPU inputs, GPU inputs)."""
    model, batch = families.model(family), families.inputs(family, rows=(2, 1))
    there = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}
    return model, copy.deepcopy(model).cuda(), dict(batch), there


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_same_tokens_and_logits_as_on_the_cpu(family: str, method: str) -> None:
    model, twin, here, there = _pair(family)
    options = {"layer": 1} if method == "fastv" else {}
    with vtprune.patch(model, method, keep=0.5, **options) as cpu, torch.inference_mode():
        expected = model(**here).logits
        wanted = [unit.idx for unit in cpu.last.units]
    with vtprune.patch(twin, method, keep=0.5, **options) as gpu, torch.inference_mode():
        logits = twin(**there).logits.cpu()
        kept = [unit.idx.cpu() for unit in gpu.last.units]
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
    assert torch.allclose(logits, expected, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_changes_no_bit(method: str, dtype: torch.dtype) -> None:
    _, twin, _, there = _pair("llava")
    twin.to(dtype)
    there = {k: v.to(dtype) if v.is_floating_point() else v for k, v in there.items()}
    options = {"layer": 1} if method == "fastv" else {}
    with torch.inference_mode():
        dense = twin(**there).logits
        with vtprune.patch(twin, method, keep=1.0, **options):
            assert torch.equal(twin(**there).logits, dense)
        with vtprune.patch(twin, method, keep=0.5, **options):
            pruned = twin(**there).logits
        assert torch.isfinite(pruned).all()
        assert torch.equal(twin(**there).logits, dense)


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_cpu(method: str) -> None:
    questions = tiny.questions(per_capability=4, capabilities=["color", "position"])
    said = []
    for device in ("cpu", "cuda"):
        model, processor = tiny.load(device, torch.float32)
        with vtprune.patch(model, method, keep=0.5):
            said.append(Exam(model, processor, questions, batch=8).answers(needs_tower=True))
    assert said[0] == said[1]


def test_clocks_measure_the_method() -> None:
    model, processor = tiny.load("cuda", torch.bfloat16)
    question = tiny.questions(per_capability=1, capabilities=["color"])[0]
    inputs = processor(text=[question.prompt], images=[question.image], return_tensors="pt")
    inputs = inputs.to("cuda", dtype=torch.bfloat16)
    with vtprune.patch(model, "divprune", keep=0.25) as handle, torch.inference_mode():
        model(**inputs)
        assert 0 < handle.last.seconds < 5


ON_DEVICE = ["divprune", "todre", "hiprune", "visionzip", "cls_topk"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ON_DEVICE)
def test_the_pre_llm_path_never_waits(method: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the units to the cut arguments of the text model; transformers' own waits are not ours to judge."""
    _, twin, _, there = _pair(family)
    for name in ("open_prompt", "run_before_llm", "cut_text_call"):
        _without_waiting(monkeypatch, hooks, name)
    _without_waiting(monkeypatch, PromptState, "raise_if_failed")
    with vtprune.patch(twin, Stage("llm", vtprune.create(method), keep=0.5)) as handle, torch.inference_mode():
        for _ in range(2):  # the first run compiles kernels and copies, once per layout, where its crops lie
            twin(**there)
    assert "farthest_point" not in handle.last.kernels or handle.last.kernels["farthest_point"] == "triton"
    assert handle.last.kernels["compact"] == "triton"


def _without_waiting(monkeypatch: pytest.MonkeyPatch, owner, name: str) -> None:
    function, calls = getattr(owner, name), []

    def strict(*args):
        calls.append(name)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 1 else "default")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(owner, name, strict)


@pytest.mark.parametrize("method", ON_DEVICE)
def test_the_pre_llm_path_in_a_cuda_graph(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded once, replayed on other features: the same cut as without a graph."""
    _, twin, _, there = _pair("llava")
    prefills, calls = [], []

    def recorded(prefill, call):
        prefills.append(prefill)
        calls.append(dict(call))
        return cut_text_call(prefill, call)

    monkeypatch.setattr(hooks, "cut_text_call", recorded)
    with vtprune.patch(twin, Stage("llm", vtprune.create(method), keep=0.5)) as handle, torch.inference_mode():
        twin(**there)
        patch, (seen,), (call,) = handle._session, prefills, calls
        signals = [unit.signals for unit in seen.units]
        features = {"image": Features([unit.n for unit in seen.units], [u.spans for u in seen.units], signals)}
        monkeypatch.undo()

        def cut():
            prefill = Prefill(patch.adapter, patch.plan, seen.token_kind.clone())
            prefill.start_host_copies({})
            return prefill, lambda: (open_prompt(prefill, call, features), run_before_llm(prefill))

        cut()[1]()
        torch.cuda.synchronize()
        prefill, run = cut()
        prefill.copies[0].read()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
            out = cut_text_call(prefill, call)
        call["inputs_embeds"].copy_(torch.randn_like(call["inputs_embeds"]))
        graph.replay()
        torch.cuda.synchronize()
        again, run = cut()
        run()
        expected = cut_text_call(again, call)
    assert torch.equal(out["inputs_embeds"], expected["inputs_embeds"])
    assert torch.equal(out["position_ids"], expected["position_ids"])


def test_bad_pixels_are_refused_although_nobody_waits() -> None:
    _, twin, _, there = _pair("llava")
    broken = dict(there, pixel_values=there["pixel_values"].clone().index_fill_(0, torch.tensor([0]).cuda(), torch.nan))
    with vtprune.patch(twin, "divprune", keep=0.5), torch.inference_mode():
        with pytest.raises(ValueError, match="NaN or Inf"):
            twin(**broken)
        assert torch.isfinite(twin(**there).logits).all(), "the context is alive"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (2, 1)], ids=["one row", "ragged rows"])
def test_a_graph_of_a_bucket_answers_like_eager(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """Captured once, replayed for other tokens and another length; decode goes on from the cache it filled."""
    from vtprune.evals.speed.prefill import Bucketed

    model, batch = families.model("llava"), families.inputs("llava", rows=rows)
    twin = copy.deepcopy(model).cuda().to(dtype)
    there = {k: v.cuda().to(dtype) if v.is_floating_point() else v.cuda() for k, v in batch.items()}
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    runner = Bucketed(twin, "graph", bucket=64)
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    with torch.inference_mode():
        for keep in (0.5, 0.4, 0.5, 1.0):
            with vtprune.patch(twin, "divprune", keep=keep):
                eager = twin.generate(**there, **how)
                with runner:
                    graph = twin.generate(**there, **how)
            assert torch.allclose(graph.logits[0], eager.logits[0], atol=close)
            if dtype == torch.float32:
                assert torch.equal(graph.sequences, eager.sequences)
                assert torch.allclose(torch.stack(graph.logits), torch.stack(eager.logits), atol=close)
    assert runner.runs


def test_the_benchmark_measures_eager_and_graphs_side_by_side() -> None:
    from vtprune.evals.speed.bench import bench, subject

    what = subject("llava-1.5-7b", "cuda", torch.bfloat16, layers=2, scale=0.1)
    ways = ["eager", "graph"]
    made = bench(what, ["divprune", "fastv:layer=1"], [0.25], prefill=ways, repeats=2, new_tokens=2, progress=False)
    assert [(r["method"], r["prefill"]) for r in made.rows[-2:]] == [("dense", "graph"), ("divprune", "graph")]
    for row in made.rows:
        assert 0 < row["vision_ms"] + row["prefill_ms"] < 2 * row["ttft_ms"]
        assert row["peak_bytes"] > 0
    assert made.environment["gpu"]
    assert made.environment["driver"]
