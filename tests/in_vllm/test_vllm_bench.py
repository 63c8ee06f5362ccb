"""`vtprune bench --serve vllm` against vLLM's own server."""

from __future__ import annotations

import json
from pathlib import Path

import engines
import pytest
from typer.testing import CliRunner

from vtprune.cli import app

pytest.importorskip("vllm", reason="vLLM is in the environment of `make test-vllm`")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_dense_and_pruned_in_one_run(tmp_path: Path) -> None:
    folder = engines.save("qwen2_5_vl", tmp_path / "qwen2_5_vl")
    engine = "--enforce-eager --max-model-len 512 --block-size 32"
    line = ["bench", "--serve", "vllm", "--model", str(folder), "--keep", "0.25", "--dtype", "float32"]
    line += ["--requests", "8", "--concurrency", "2", "--repeats", "2", "--side", "64", "--new-tokens", "4"]
    done = CliRunner().invoke(app, [*line, "--server-args", engine, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "out").glob("serve_vllm_qwen2_5_vl_*.json")
    saved = json.loads(file.read_text())
    dense, pruned = saved["rows"]
    assert (dense["method"], pruned["method"], pruned["keep"]) == ("dense", "divprune", 0.25)
    assert dense["prompt_tokens"] - pruned["prompt_tokens"] == 12, "64 pixels a side are 16 visual tokens"
    for row in saved["rows"]:
        assert 0 < row["ttft_ms"] < row["latency_ms"]
        assert row["requests_per_second"] * row["latency_ms"] < 2.5e3
        assert row["rss_bytes"] > 100 * 2**20
    env = saved["environment"]
    assert env["engine"] == "vllm"
    assert env["versions"]["vllm"]
    assert env["arguments"] == engine.split()
