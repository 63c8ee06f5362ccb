"""`vtprune eval --tasks` and `tune --tasks` on lmms-eval: run by `make test-lmms`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-lmms makes an environment with it")

import checkpoints
import lmms_tasks

from vtprune.cli import app
from vtprune.evals.tasks.benchmarks import Benchmarks
from vtprune.evals.tasks.cells import DENSE, cells
from vtprune.evals.tasks.folder import ResultFolder

pytestmark = pytest.mark.lmms
runner = CliRunner()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lmms_tasks.build(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.embedded("image", tmp_path_factory.mktemp("models") / "toy")


def command(*args: object, status: int = 0) -> str:
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == status, result.output
    return result.output


def test_the_command_gives_the_scores_of_lmms_eval_and_names_what_it_could_not_load(
    toy: Path, tasks: Path, tmp_path: Path
) -> None:
    """That these are the scores of `python -m lmms_eval` and of a loop by hand, test_lmms tests."""
    cut = next(cell for cell in cells(["divprune"], [0.25], 1) if cell.label == "divprune")
    alone = Benchmarks(str(toy), ["vt_shapes"], include=tasks, device="cpu", dtype="float32")
    expected = {}
    for cell in (DENSE, cut):
        lines = list(alone.answers("vt_shapes", cell))
        expected[cell.name] = [line["answer"] for line in lines], alone.score("vt_shapes", lines)
    some = ["eval", "--tasks", "vt_shapes,vt_share,gqa", "--include", tasks, "--model", toy, "--method", "divprune"]
    told = command(*some, "--keep", 0.25, "--seeds", 1, "--dtype", "float32", "--out", tmp_path)
    assert "gqa was not run" in " ".join(told.split())
    folder = ResultFolder(tmp_path)
    for name, (answers, score) in expected.items():
        assert [line["answer"] for line in folder.lines_of("vt_shapes", name)] == answers
        end = folder.end_of("vt_shapes", name)
        assert end is not None
        assert end["score"] == score
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert {row["task"] for row in rows} == {"vt_shapes", "vt_share", "mean"}
    assert all(row["visual_tokens"] == [256, 64] for row in rows if row["method"] == "divprune")
    command("report", tmp_path)


def test_a_recipe_is_found_on_tasks_of_lmms_eval(toy: Path, tasks: Path, tmp_path: Path) -> None:
    some = ["tune", "--tasks", "vt_shapes", "--include", tasks, "--model", toy, "--method", "divprune"]
    command(*some, "--keep", "0.5,0.25", "--max-drop", "90%", "--dtype", "float32", "--out", tmp_path)
    assert json.loads((tmp_path / "tune.json").read_text())["recommended"]["method"] in ("divprune", "uniform")
