"""examples/serving/prune_features_ray.py: one actor or two write the same rows, and these are `vtprune.select`'s."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed: make test-lmms makes an environment with it")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vtprune
from vtprune.evals import tiny

pytestmark = pytest.mark.lmms
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serving" / "prune_features_ray.py"


GRIDS = [(1, 4, 4), (1, 3, 5), (2, 3, 3)] * 8
IMAGES = [torch.randn(math.prod(grid), 8, generator=torch.Generator().manual_seed(i)) for i, grid in enumerate(GRIDS)]


def written(out: Path, *options: object) -> list[dict[str, Any]]:
    """The rows that the script writes, sorted by id."""
    command = [sys.executable, str(SCRIPT), "--out", str(out), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return sorted(pq.read_table(out).to_pylist(), key=lambda row: int(row["id"]))


@pytest.mark.slow
def test_one_actor_or_two_write_what_select_keeps(tmp_path: Path) -> None:
    ids = [str(i) for i in range(len(IMAGES))]
    rows = pa.table({"id": ids, "grid": GRIDS, "features": [x.tolist() for x in IMAGES]})
    for i in range(3):  # files are what actors share out
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(rows.slice(8 * i, 8), tmp_path / "in" / f"{i}.parquet")
    recipe = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.5, per="sample"))
    recipe.save(tmp_path / "recipe.json")
    options = ("--features", tmp_path / "in", "--recipe", tmp_path / "recipe.json")
    one = written(tmp_path / "one", *options, "--actors", 1)
    assert one == written(tmp_path / "two", *options, "--actors", 2)
    assert [row["id"] for row in one] == ids
    for row, x, grid in zip(one, IMAGES, GRIDS, strict=True):
        (kept,) = vtprune.select(x, recipe, grid=grid)
        assert row["n"] == len(x)
        assert row["idx"] == kept.idx.tolist()
        assert torch.equal(torch.tensor(row["features"]), kept.features)


def test_pictures_are_encoded_as_the_model_does() -> None:
    """What an actor does with pictures of the toy: the tokens that a patched model keeps."""
    spec = importlib.util.spec_from_file_location("prune_features_ray", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    questions = tiny.questions(per_capability=1)[:3]
    rows = pa.table({"id": ["a", "b", "c"], "image": [np.array(q.image).tolist() for q in questions]})
    recipe = vtprune.Recipe.of(vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25))
    found = script.Prune(recipe.to_json(), encodes=True)(rows).to_pylist()
    model, processor = tiny.load()
    for row, q in zip(found, questions, strict=True):
        inputs = processor(text=[q.prompt], images=[q.image], return_tensors="pt", add_special_tokens=False)
        with vtprune.patch(model, recipe) as handle, torch.inference_mode():
            model(**inputs)
        assert row["idx"] == handle.last.units[0].idx.tolist()
        assert len(row["features"]) == 64
