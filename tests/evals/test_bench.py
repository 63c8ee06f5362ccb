"""The benchmark: FLOPs against torch's counter, bytes against the cache, limits against published arithmetic, files."""

from __future__ import annotations

import itertools
import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals import readme, speed
from vtprune.evals.speed import Limits, geometries, meter
from vtprune.evals.speed.bench import Subject, bench, subject
from vtprune.evals.speed.bench_hooks import hooks
from vtprune.evals.speed.flops import CARDS, TextCost, card, counted, ideal_llm, measured
from vtprune.evals.speed.meter import Allocated, Phases

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


H200 = CARDS["NVIDIA H200"]
PUBLISHED = {  # text model, its visual tokens, FLOPs of vision; limits of the TTFT speed-up at 1/3, 2/9, 1/9; budget ms
    "llava-1.5-7b": (LLAMA_7B, 576, 0.39e12, (2.38, 3.08, 3.09), 0.18),
    "llava-next-7b": (LLAMA_7B, 2880, 1.95e12, (2.74, 3.80, 6.12), 0.44),
    "llava-onevision-7b-video": (QWEN2_7B, 6272, 21.3e12, (2.23, 2.75, 3.58), 2.0),
    "qwen2.5-vl-7b": (QWEN2_7B, 1280, 7.15e12, (1.85, 2.14, 2.55), 0.45),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_roofline_limits_are_the_published_ones(name: str) -> None:
    text, visual, vision, published, budget = PUBLISHED[name]
    limits = Limits(H200, text, int(vision), 0, {}, batch=1)
    dense = [visual + 60] * text.layers
    for ninths, limit in zip((3, 2, 1), published):
        pruned = [round(visual * ninths / 9) + 60] * text.layers
        assert limits.ideal(dense) / limits.ideal(pruned) == pytest.approx(limit, rel=0.02)
    assert 1e3 * limits.selection_budget(dense, pruned) == pytest.approx(budget, rel=0.03)


def test_shares_of_the_limits() -> None:
    """On a made-up processor whose arithmetic fits on a line."""
    text = TextCost(layers=2, d=10, d_q=10, d_kv=10, mlp=10, vocab=100, width=2)
    limits = Limits(speed.Card(1e6, 1e6), text, 0, vision=0.2, floors={"eager": 0.1}, batch=1)
    dense = speed.Samples([2.0], [0.2], [0.0], [1.6], [], [0.4], [100, 100])
    pruned = speed.Samples([1.0], [0.2], [0.3], [0.4], [0.016], [0.2], [50, 50])
    row = speed.row_of(speed.Variant("some", keep=0.5), pruned, dense, limits, text_tokens=10)
    assert (row["ttft_speedup"], row["prefill_speedup"], row["decode_speedup"]) == (2, 4, 2)
    assert row["ttft_of_stack"] == pytest.approx(2 / (2.0 / 0.3))
    assert row["prefill_of_stack"] == pytest.approx(4 / (1.6 / 0.1))
    assert row["decode_of_stack"] == pytest.approx(2 / (0.4 / 0.1))
    assert row["ttft_of_roofline"] == pytest.approx(2 / (text.prefill(100) / text.prefill(50)))
    weights, token = text.weight_bytes, text.kv_bytes(1)
    assert row["decode_of_roofline"] == pytest.approx(2 / ((weights + 100 * token) / (weights + 50 * token)))
    assert row["selector_of_prefill"] == pytest.approx(0.01)
    assert row["selector_affordable"]
    assert row["kept_by_layer"] == [40, 40]


def test_peak_of_an_unknown_processor_is_measured() -> None:
    found = measured(torch.device("cpu"), torch.float32, side=256)
    assert 1e8 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e13


def test_phases_split_a_prefill_at_the_door_of_the_text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks when it is read: a tick each for the tower, two for the patch, three for the LLM."""
    clock = itertools.count()
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))

    class Text(nn.Module):
        def forward(self, x: int) -> int:
            return x + sum(1 for _ in range(3) if next(clock))

    text = Text()
    text.register_forward_pre_hook(lambda *_: [next(clock) for _ in range(2)] and None)
    text.register_forward_hook(lambda *_: [next(clock) for _ in range(10)] and None)
    with Phases(text, torch.device("cpu")) as phases:
        next(clock)
        text(0)
    assert phases.seconds == (2, 3, 4)  # reading the clock is a tick of its own
    assert len(text._forward_pre_hooks) == len(text._forward_hooks) == 1


def test_memory_alive_at_once_is_counted_to_the_byte() -> None:
    kibi = 256  # float32 numbers
    weight = torch.ones(kibi, 1)
    with torch.inference_mode(), Allocated() as allocated:
        a = torch.zeros(4 * kibi)
        b = a + 1
        view = b.view(2, -1).t()
        weight.t().mul_(2)
        assert allocated.live == 8 * 1024
        del a, b
        assert allocated.live == 4 * 1024  # the view holds b's memory
        del view
        assert allocated.live == 0
        torch.softmax(torch.zeros(kibi), 0)
    assert allocated.peak == 8 * 1024


def test_eager_attention_shows_in_the_peak() -> None:
    what = subject("llava-1.5-7b", "cpu", torch.float32, layers=2, scale=0.04)
    peaks = []
    for attention in ("sdpa", "eager"):
        what.model.set_attn_implementation(attention)
        made = bench(what, [], [], repeats=1, new_tokens=1, progress=False)
        peaks.append(made.rows[0]["peak_bytes"])
    heads = what.model.config.get_text_config().num_attention_heads
    assert peaks[1] - peaks[0] > heads * what.tokens**2 * 4


def test_rows_are_saved_after_every_round(tiny_subject: Subject, tmp_path: Path) -> None:
    """In one file, and dense is among them from the first round on."""
    seen = []

    def finished(report: speed.BenchReport) -> None:
        read = json.loads(report.write(tmp_path).read_text())
        seen.append([(row["method"], len(row["ttft_ms_all"])) for row in read["rows"]])
        assert read["environment"]["repeats"] == len(seen)

    made = bench(tiny_subject, ["random"], [0.25], repeats=2, new_tokens=1, progress=False, finished=finished)
    assert seen == [[("dense", n), ("random", n)] for n in (1, 2)]
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == json.loads(made.to_json())


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
        assert row["vision_ms"] > 0
        assert row["vision_ms"] + row["cut_ms"] + row["prefill_ms"] < 2 * row["ttft_ms"]  # medians of each, not sums
        assert row["peak_bytes"] > row["kv_bytes"]
        for what in ("ttft", "prefill", "decode"):
            assert row[f"{what}_of_roofline"] > 0
            assert row[f"{what}_of_stack"] > 0
    assert dense["selector_ms"] is dense["selector_of_prefill"] is dense["selector_affordable"] is None
    assert [dense[f"{what}_of_roofline"] for what in ("ttft", "prefill", "decode")] == [1, 1, 1]
    assert 0 < divprune["selector_ms"] < divprune["ttft_ms"]
    assert divprune["selector_ms"] < divprune["cut_ms"] + 1e-3
    assert divprune["selector_of_prefill"] == pytest.approx(divprune["selector_ms"] / dense["prefill_ms"])
    assert divprune["selector_affordable"] == (divprune["selector_of_prefill"] <= 0.02)
    assert divprune["peak_bytes"] < dense["peak_bytes"]


def test_one_file_a_run_names_machine_versions_and_commit(report, tmp_path: Path) -> None:
    path = report.write(tmp_path)
    assert path.name.startswith("tiny_cpu_float32_b2_")
    read = json.loads(path.read_text())
    env = read["environment"]
    assert env.keys() >= {"gpu", "driver", "cuda", "cpu", "versions", "commit", "dtype", "batch", "time", "repeats"}
    assert env["versions"].keys() >= {"torch", "transformers", "triton", "vtprune"}
    limits = Limits.of(env["limits"])
    assert read["rows"][0]["ideal_ttft_ms"] == 1e3 * limits.ideal(env["tokens"])
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


def test_signals_of_the_tower_need_no_attention_map_in_memory() -> None:
    """Any-resolution crops: what reads the tower peaks where what reads nothing does, far from an eager tower."""
    what = subject("llava-next-7b", "cpu", torch.float32, layers=2, scale=0.06)
    made = bench(what, ["random", "hiprune", "divprune"], [0.11], repeats=1, new_tokens=1, progress=False)
    assert what.visual >= 2880
    _, random, hiprune, divprune = (row["peak_bytes"] for row in made.rows)
    assert hiprune == pytest.approx(random, rel=0.05)
    assert hiprune < 1.05 * divprune


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


def test_a_method_the_model_cannot_take_is_left_out_and_named_on_demand(tiny_subject: Subject) -> None:
    some = ["divprune", "fastv:layer=40"]
    made = bench(tiny_subject, some, [0.25], repeats=1, new_tokens=1, skip=True, progress=False)
    assert [row["method"] for row in made.rows] == ["dense", "divprune"]
    assert "Not run: fastv:layer=40 at 0.25, eager" in made.notes[-1]


# -- saved files: table, plot, README -------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]


def run(*args: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, args)])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split()) if status else result.stdout


def test_saved_files_make_table_and_plot(report, tmp_path: Path) -> None:
    path = report.write(tmp_path)
    table = run("--table", path)
    assert table.startswith("tiny, 256 visual + 8 text tokens, batch 2, float32.\n\n| method | kept |")
    assert f"(benchmarks/{path.name})" in table
    assert "AMD" in table or report.environment["cpu"] in table
    for row in report.rows:
        assert f"| {row['method']} |" in table
    assert f"wrote {tmp_path / 'ttft.png'}" in run("--plot", "--out", tmp_path, path, path, path).replace("\n", "")
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert report.plot(tmp_path / "one.png").stat().st_size > 10_000


def test_readme_blocks_are_made_from_the_files_they_name(report, tmp_path: Path) -> None:
    name = report.write(tmp_path).name
    stale = f"before\n<!-- vtprune bench --table {name} -->\n\nold\n\n<!-- end of table -->\nafter"
    fresh = speed.refreshed(stale, tmp_path)
    assert fresh == stale.replace("old", speed.table([tmp_path / name], tmp_path))
    assert speed.refreshed(fresh, tmp_path) == fresh


def test_the_readmes_tables_are_those_of_the_committed_files() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert len(speed.BLOCK.findall(text)) == 1
    # Stills, clips, the mid model, what pruning costs, plain vision transformers.
    assert len(readme.BLOCK.findall(text)) == 5
    assert len(readme.LISTS.findall(text)) == 2  # runs, and why auto is what it is
    assert readme.refreshed(text, ROOT / "benchmarks") == text, "make readme rewrites them"


def test_the_first_page_shows_committed_figures() -> None:
    text = (ROOT / "README.md").read_text()
    (block,) = readme.BLOCK.finditer(text)
    assert 2 < block[0].count("\n| `") <= 8, "the first page has a short table"
    assert readme.refreshed(text, ROOT) == text, "make readme rewrites them"
    assert len(text.splitlines()) <= 110, "the first page stays short"


def test_the_guide_lists_the_registry() -> None:
    page = ROOT / "examples" / "guides" / "choose.md"
    (methods,) = readme.LISTS.finditer(page.read_text())
    ours = [cls.name for cls in vtprune.methods() if cls.__module__.startswith("vtprune.methods.")]
    assert sorted(re.findall(r"^\| \[`(\w+)`\]\(https://", methods[0], re.M)) == ours
    assert readme.refreshed(page.read_text(), page.parent) == page.read_text(), "make readme rewrites it"


def test_files_that_are_no_benchmarks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"environment": {}, "rows": []}')
    assert "text.json is no benchmark" in run("--table", tmp_path / "text.json", status=2)
    assert "other.json holds no timings" in run("--plot", tmp_path / "other.json", status=2)
    assert "name the files" in run("--plot", status=2)
    assert "--plot and --table only" in run(tmp_path / "text.json", status=2)


def test_kernels_are_benchmarked_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.evals.speed import bench_kernels

    rows = [{"kernel": "merge", "seconds": 1.0}, {"kernel": "compact", "speedup": 2.0}]
    monkeypatch.setattr(bench_kernels, "kernels", lambda device: rows)
    shown = run("--kernels", "--device", "cpu", "--out", tmp_path)
    assert "kernel=compact, speedup=2.000" in shown
    path = next(tmp_path.glob("kernels_cpu_*.json"))
    assert json.loads(path.read_text())["rows"] == rows


# -- make gpu -------------------------------------------------------------------------------------------------------

STUB = """#!/bin/bash
echo "$*" >> log
[[ "$*" != *pytest* || -z "$RED" ]]
"""


def make(folder: Path, *args: str, red: bool = False) -> tuple[int, list[str]]:
    """Exit status, and what would have been run by a Python whose GPU tests are red, or not."""
    import os
    import subprocess

    (folder / "log").write_text("")
    done = subprocess.run(
        ["make", *args, "PYTHON=./stub"], cwd=folder, capture_output=True, env={**os.environ, "RED": "1" * red}
    )
    return done.returncode, (folder / "log").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("vtprune", "kernels", "evals", "model_adapters", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "vtprune" / "code.py").write_text("1\n")
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["-k"], ["-i"], ["-k", "-j4"]], ids=str)
@pytest.mark.parametrize("target", ["gpu", "gpu-next", "gpu-kernels"])
def test_make_gpu_prints_no_speed_when_a_gpu_test_fails(checkout: Path, target: str, flags: list[str]) -> None:
    status, ran = make(checkout, target, *flags, red=True)
    assert any("-m pytest -m gpu" in line for line in ran)
    assert not [line for line in ran if " bench " in line]
    assert status != 0 or "-i" in flags


def test_make_gpu_tests_first_and_again_once_the_code_has_changed(checkout: Path) -> None:
    status, ran = make(checkout, "gpu")
    first = next(i for i, line in enumerate(ran) if " bench " in line)
    assert status == 0
    assert [i for i, line in enumerate(ran) if "pytest" in line] == [first - 1]
    assert "llava-next-7b" in ran[first]
    status, ran = make(checkout, "gpu-video")
    assert status == 0
    assert all(" bench " in line for line in ran)
    (checkout / "vtprune" / "code.py").write_text("2\n")
    status, ran = make(checkout, "gpu-video", red=True)
    assert status != 0
    assert not [line for line in ran if " bench " in line]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_make_gpu_finds_the_whole_package_without_an_install(checkout: Path) -> None:
    """A Python that knows our dependencies but no editable install: `python -m` must not start from the checkout."""
    for name in ("vtprune", "kernels", "evals", "model_adapters"):
        (checkout / name / "code.py").unlink(missing_ok=True)
        (checkout / name).rmdir()
        (checkout / name).symlink_to(ROOT / name)
    libraries = sysconfig.get_path("purelib")
    (checkout / "stub").write_text(
        f'#!/bin/bash\n[[ "$*" == *pytest* ]] && set -- -m vtprune.cli --help\n[[ "$*" == "-c "* ]] && exit 0\n'
        f'PYTHONPATH=$PYTHONPATH:{libraries} exec {sys.executable} -S "$@" >> log 2>&1\n'
    )
    _, ran = make(checkout, "gpu-test")
    assert any("train-tiny" in line for line in ran), ran[-3:]
