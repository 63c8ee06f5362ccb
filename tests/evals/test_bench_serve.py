"""`vtprune bench --serve` against the real server of the toy, and what it refuses before it starts one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals.speed import servers
from vtprune.evals.speed.serving import Load, budget, percentile, serving

SMALL = ("--requests", "8", "--concurrency", "2", "--repeats", "2", "--side", "64", "--new-tokens", "4")
RECIPE = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25))


def run(*arguments: str | Path, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def test_dense_and_pruned_in_one_run(tmp_path: Path) -> None:
    before = children()
    run("--serve", "vtprune", "--keep", "0.25,16", *SMALL, "--json", "--out", tmp_path)
    assert children() == before, "the server is gone"
    (file,) = tmp_path.glob("serve_vtprune_toy_cpu_float32_c2_*.json")
    saved = json.loads(file.read_text())
    dense, tokens, pruned = saved["rows"]
    assert [(row["method"], row["keep"]) for row in saved["rows"]] == [
        ("dense", 1.0), ("divprune", 16), ("divprune", 0.25)
    ]  # fmt: skip
    assert dense["prompt_tokens"] - pruned["prompt_tokens"] == 256 - 64, "the toy has 256 visual tokens"
    assert dense["prompt_tokens"] - tokens["prompt_tokens"] == 256 - 16
    assert dense["speedup"] == 1.0
    for row in saved["rows"]:
        assert len(row["requests_per_second_by_round"]) == 2
        assert 0 < row["ttft_ms"] <= row["ttft_p95_ms"] <= row["latency_p95_ms"]
        assert 0 < row["ttft_ms"] < row["latency_ms"]
        # Two clients are never more than two requests at once, so requests / s is at most 2 / latency.
        assert row["requests_per_second"] * row["latency_ms"] < 2.5e3
        assert row["rss_bytes"] > 100 * 2**20, "torch alone takes more"
        assert 1 <= row["completion_tokens"] <= 4
    env = saved["environment"]
    assert {"engine": "vtprune", "model": "toy", "device": "cpu", "dtype": "float32"}.items() <= env.items()
    assert {"requests": 8, "concurrency": 2, "repeats": 2, "new_tokens": 4, "side": 64}.items() <= env.items()
    assert vtprune.Recipe.from_json(env["recipe"]).stages[0].keep == 0.25
    assert {"vtprune", "torch", "transformers"} <= env["versions"].keys()
    assert "a picture of noise of its own" in " ".join(saved["notes"])


def test_a_recipe_is_measured_at_its_own_budget(tmp_path: Path) -> None:
    RECIPE.save(tmp_path / "recipe.json")
    told = run("--serve", "vtprune", "--recipe", tmp_path / "recipe.json", *SMALL, "--out", tmp_path / "out")
    assert "toy served by vtprune, 2 clients" in told
    (file,) = (tmp_path / "out").iterdir()
    dense, pruned = json.loads(file.read_text())["rows"]
    assert pruned["keep"] is None
    assert dense["prompt_tokens"] - pruned["prompt_tokens"] == 192


def test_what_the_server_says_stands_in_the_error() -> None:
    loud = ["--log-level", "loud"]
    with pytest.raises(ValueError, match=r"ended with status 2 .*--log-level loud: use debug, info"):
        serving("vtprune", None, RECIPE, [None], Load(1, 1, 1), device="cpu", dtype="float32", arguments=loud)


def test_a_request_that_is_refused_ends_the_run() -> None:
    before = children()
    small = ["--max-pixels", "100"]
    with pytest.raises(ValueError, match=r"failed at a request: .*pixels"):
        serving("vtprune", None, RECIPE, [None], Load(1, 1, 1), device="cpu", dtype="float32", arguments=small)
    assert children() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--serve", "tgi"], "--serve tgi: choose one of vtprune, vllm"),
        (["--serve", "vtprune", "--requests", "0"], "'--requests'"),
        (["--serve", "vtprune", "--concurrency", "0"], "'--concurrency'"),
        (["--serve", "vtprune", "--geometry", "tiny"], "name a checkpoint with --model"),
        (["--serve", "vtprune", "--method", "random", "--method", "divprune"], "one --method"),
        (["--serve", "vtprune", "--method", "pyramiddrop"], "3 stages, and a request names one budget"),
        (["--serve", "vtprune", "--keep", "2.5"], "--keep 2.5: use a share in (0, 1]"),
        (["--serve", "vtprune", "--recipe", "r.json", "--keep", "0.5"], "leave out --keep"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments: list[str], told: str) -> None:
    assert told in run(*arguments, status=2)


def test_vllm_needs_itself_and_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed here"):
        servers.check("vllm", "model")
    monkeypatch.setattr(servers, "find_spec", lambda name: sys)
    with pytest.raises(ValueError, match="name a model with --model"):
        servers.check("vllm", None)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, part) for part in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([1.0, 2.0, 9.0], 0.95) == 9.0
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match="a part in"):
        percentile([1.0], 0)


def test_budgets_of_requests() -> None:
    assert [budget(keep) for keep in (None, 1.0, 1)] == [{}, {"keep_ratio": 1.0}, {"keep_tokens": 1}]


@pytest.mark.parametrize("name", ["requests", "concurrency", "repeats", "new_tokens", "side"])
def test_a_load_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: use an integer >= 1"):
        Load(**{name: 0})
