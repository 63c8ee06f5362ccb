"""examples/serving/prune_features_ray.py: one actor or two write the same rows, and these are `vtprune.select`'s."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed: make test-lmms makes an environment with it")

import pyarrow as pa
import pyarrow.parquet as pq

import vtprune

pytestmark = pytest.mark.lmms
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serving" / "prune_features_ray.py"


def written(out: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that the script writes, sorted by id."""
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return sorted(pq.read_table(out).to_pylist(), key=lambda row: int(row["id"]))


@pytest.mark.slow
def test_two_actors_write_the_rows_of_one(tmp_path: Path) -> None:
    one = written(tmp_path / "one", "--actors", "1")
    two = written(tmp_path / "two", "--actors", "2")
    assert one == two
    assert [row["id"] for row in one] == [str(i) for i in range(22)]
    assert {(row["n"], len(row["idx"]), len(row["features"])) for row in one} == {(256, 64, 64)}


def test_rows_are_what_select_keeps() -> None:
    spec = importlib.util.spec_from_file_location("prune_features_ray", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    grids = [(1, 4, 4), (1, 3, 5), (2, 3, 3)]
    images = [torch.randn(t * h * w, 8, generator=torch.Generator().manual_seed(t * h)) for t, h, w in grids]
    rows = pa.table({"id": ["a", "b", "c"], "grid": grids, "features": [x.tolist() for x in images]})
    recipe = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.5, per="sample"))
    found = script.Prune(recipe.to_json(), encodes=False)(rows).to_pylist()
    for row, x, grid in zip(found, images, grids, strict=True):
        (kept,) = vtprune.select(x, recipe, grid=grid)
        assert row["n"] == len(x)
        assert row["idx"] == kept.idx.tolist()
        assert torch.equal(torch.tensor(row["features"]), kept.features)
