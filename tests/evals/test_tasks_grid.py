"""The grid on a user's own data: it equals a loop by hand, goes on where it was killed, and names what fails."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.evals.accuracy.exam import words_of
from vtprune.evals.speed.meter import seconds
from vtprune.evals.tasks import grid
from vtprune.evals.tasks.cells import DENSE, Cell, cells
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.recorder import Recorder
from vtprune.evals.tasks.setup import Setup
from vtprune.evals.tasks.summary import summarise
from vtprune.evals.toys import image as toy
from vtprune.evals.toys import video as clips

runner = CliRunner()
METHODS = ("divprune", "visionzip", "hiprune", "fastv")
KEEPS = (0.5, 0.25, 0.11)


def write_questions(folder: Path, count: int, kinds: tuple[str, ...] = ("color", "exist"), **more: Any) -> Path:
    """A file of the toy's questions, their pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, q in enumerate(toy.questions(per_capability=count, capabilities=kinds)):
        q.image.save(folder / f"{i}.png")
        row = {"id": str(i), "task": q.capability, "image": f"{i}.png", "question": words_of(q.prompt)}
        rows.append({**row, "answer": q.answer, "metric": "exact", **more})
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data"), 6)


def command(*args: object) -> str:
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_answers_and_tokens_equal_a_loop_by_hand(questions: Path, tmp_path: Path) -> None:
    command("eval", "--data", questions, "--method", "divprune", "--keep", 0.25, "--seeds", 1, "--out", tmp_path)
    folder = ResultFolder(tmp_path)
    model, processor = toy.load()
    cell = next(c for c in cells(["divprune"], [0.25], 1) if c.label == "divprune")
    asked = toy.questions(per_capability=6, capabilities=["color", "exist"])
    for where in (DENSE, cell):
        said = []
        with where.applied(model):
            for q in asked:
                inputs = processor(text=[q.prompt], images=[q.image], return_tensors="pt", add_special_tokens=False)
                ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
                said.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        lines = [line for task in ("color", "exist") for line in folder.lines_of(task, where.name)]
        assert [line["answer"] for line in lines] == said
        right = [line["parts"][0] for line in lines]
        assert right == [float(text == q.answer) for text, q in zip(said, asked)]
    assert {tuple(line["visual_tokens"]) for line in lines} == {(256, 64.0)}
    assert all(line["seconds"]["ttft"] > line["seconds"]["prefill"] > 0 for line in lines)
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    (row,) = (r for r in rows if r["method"] == "divprune" and r["task"] == "color")
    assert row["score"] == pytest.approx(sum(right[:6]) / 6)


def test_everything_kept_answers_as_dense(questions: Path, tmp_path: Path) -> None:
    command("eval", "--data", questions, "--method", "divprune", "--keep", 1.0, "--seeds", 1, "--out", tmp_path)
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert {row["agreement"] for row in rows} == {1.0}


def test_decode_methods_count_the_tokens_of_the_prompt_whole(questions: Path, tmp_path: Path) -> None:
    command("eval", "--data", questions, "--method", "dycoke_kv", "--keep", 0.5, "--seeds", 1, "--out", tmp_path)
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert next(row for row in rows if row["method"] == "dycoke_kv")["visual_tokens"] == [256, 256]


def test_the_clock_starts_with_the_tower_which_generate_runs_before_it_calls_the_model() -> None:
    model, processor = toy.load()
    q = toy.questions(per_capability=1)[0]
    inputs = processor(text=[q.prompt], images=[q.image], return_tensors="pt", add_special_tokens=False)

    def encode() -> None:
        model.get_image_features(pixel_values=inputs["pixel_values"])

    with torch.inference_mode(), Recorder(model) as recorder:
        for _ in range(4):
            model.generate(**inputs, max_new_tokens=2)
    with torch.inference_mode():
        towers = [seconds(encode, model.device) for _ in range(4)]
    calls = [call.seconds for call in recorder.taken]
    assert len(calls) == 4, "one prefill a call, decode steps are none"
    assert min(call["encode"] for call in calls) > 0.4 * min(towers)
    assert all(call["encode"] + call["cut"] + call["prefill"] <= call["ttft"] for call in calls)


def start(data: Path, out: Path) -> subprocess.Popen[bytes]:
    args = ["eval", "--data", str(data), "--seeds", "1", "--out", str(out)]
    args += [part for method in METHODS for part in ("--method", method)] + ["--keep", ",".join(map(str, KEEPS))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = "from vtprune.cli import app; app()"
    return subprocess.Popen([sys.executable, "-c", code, *args], env=env, stdout=subprocess.DEVNULL)


def lines_written(out: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in out.glob("cells/*/*.jsonl"))


def wait_for(process: subprocess.Popen[bytes], out: Path, lines: int) -> None:
    """Until so many lines are there; fails where the process ends before."""
    deadline = time.monotonic() + 120
    while lines_written(out) < lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)  # another process is waited for


@pytest.mark.slow
def test_a_grid_killed_at_two_places_ends_with_the_same_scores(tmp_path: Path) -> None:
    """4 methods x 3 budgets x 2 tasks with the controls: 17 cells of 2 tasks of 4 questions, 136 answers."""
    data = write_questions(tmp_path / "data", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(data, whole).wait(240) == 0
    total = 2 * 4 * len(cells(METHODS, KEEPS, 1))
    assert lines_written(whole) == total
    drawn = sorted(random.Random(14).sample(range(5, total - 10), 2))
    for place in drawn:
        process = start(data, killed)
        wait_for(process, killed, place)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        assert not (killed / "eval.json").exists()
    finished = {file: file.stat().st_mtime_ns for file in killed.glob("cells/*/*.json")}
    assert finished
    assert start(data, killed).wait(240) == 0
    assert (killed / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
    assert all(file.stat().st_mtime_ns == when for file, when in finished.items()), "what is finished is not run again"


def test_a_line_that_was_cut_off_is_answered_again(questions: Path, tmp_path: Path) -> None:
    some = ["eval", "--data", questions, "--method", "divprune", "--keep", 0.25, "--seeds", 1, "--out", tmp_path]
    command(*some)
    before = (tmp_path / "eval.json").read_bytes()
    cell = next(c for c in cells(["divprune"], [0.25], 1) if c.label == "divprune").name
    (tmp_path / "cells" / "color" / f"{cell}.json").unlink()
    file = tmp_path / "cells" / "color" / f"{cell}.jsonl"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    command(*some)
    assert (tmp_path / "eval.json").read_bytes() == before


def test_shards_together_are_the_whole_grid(questions: Path, tmp_path: Path) -> None:
    some = ["eval", "--data", questions, "--method", "divprune", "--keep", 0.25, "--seeds", 2]
    command(*some, "--out", tmp_path / "whole")
    command(*some, "--out", tmp_path / "parts", "--shard", "2/2")
    notes = " ".join(json.loads((tmp_path / "parts" / "eval.json").read_text())["notes"])
    assert "is not finished on color" in notes
    command(*some, "--out", tmp_path / "parts", "--shard", "1/2")
    assert (tmp_path / "parts" / "eval.json").read_bytes() == (tmp_path / "whole" / "eval.json").read_bytes()


class Broken(vtprune.Method):
    """A plug-in that fails behind its third question."""

    asked = 0

    def __call__(self, v: vtprune.Visual) -> vtprune.Assignment:
        Broken.asked += 1
        if Broken.asked > 3:
            raise RuntimeError("the fourth question")
        return vtprune.Assignment(torch.arange(v.budget or 1))


def test_a_cell_that_fails_is_named_and_the_others_are_run(questions: Path, tmp_path: Path) -> None:
    setup = Setup(data=str(questions))
    subject = setup.load()
    folder = ResultFolder(tmp_path)
    vtprune.register("broken_in_tests", paper="https://example.org", seam="pre_llm")(Broken)
    try:
        todo = cells(["broken_in_tests", "divprune"], [0.25], 1)
        folder.open({**setup.document(subject), "cells": [cell.document for cell in todo]})
        Broken.asked = 0
        failed = grid.run(subject, grid.jobs(["color", "exist"], todo), folder, progress=False)
    finally:
        from vtprune.registry import METHODS as REGISTRY

        REGISTRY.known.pop("broken_in_tests")
    assert len(failed) == 2
    assert "RuntimeError: the fourth question" in failed[0]
    summary = summarise(folder)
    assert "broken_in_tests" not in {row["method"] for row in summary.rows}, "no score 0"
    assert {"dense", "divprune", "uniform", "random"} <= {row["method"] for row in summary.rows}
    assert any("broken_in_tests at 25 % failed on color" in note for note in summary.notes)
    assert not hasattr(subject.model, "_vtprune")


def test_memory_that_runs_out_in_one_cell_ends_that_cell_only(
    questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(data=str(questions))
    subject = setup.load()
    folder = ResultFolder(tmp_path)
    todo = cells(["divprune"], [0.25], 1)
    folder.open({**setup.document(subject), "cells": [cell.document for cell in todo]})
    ask = subject.answers

    def answers(task: str, cell: Cell, *rest: int) -> Any:
        if cell.label == "uniform":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ask(task, cell, *rest)

    monkeypatch.setattr(subject, "answers", answers)
    failed = grid.run(subject, grid.jobs(["color"], todo), folder, progress=False)
    assert failed == ["uniform at 25 % on color: OutOfMemoryError: CUDA out of memory"]
    monkeypatch.undo()
    assert grid.run(subject, grid.jobs(["color"], todo), folder, progress=False) == [], "it is tried again"
    assert folder.failure_of("color", next(c.name for c in todo if c.label == "uniform")) is None


def test_a_fault_of_the_dense_model_ends_the_run(questions: Path, tmp_path: Path) -> None:
    setup = Setup(data=str(questions))
    subject = setup.load()
    subject.processor.tokenizer = None  # type: ignore[attr-defined]
    folder = ResultFolder(tmp_path)
    folder.open({**setup.document(subject), "cells": []})
    with pytest.raises(AttributeError):
        grid.run(subject, grid.jobs(["color"], [DENSE]), folder, progress=False)


def test_without_labels_answers_are_compared_with_dense(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", 5, ("color",))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    bare = [{key: row[key] for key in ("id", "image", "question")} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in bare))
    command("eval", "--data", data, "--method", "average_pool", "--keep", 0.05, "--seeds", 1, "--out", tmp_path / "out")
    (row,) = (
        r for r in json.loads((tmp_path / "out" / "eval.json").read_text())["rows"]
        if (r["method"], r["task"]) == ("average_pool", "questions")
    )  # fmt: skip
    assert row["metric"] == "agreement"
    assert row["score"] == row["agreement"] == row["relative"]
    assert 0 <= row["score"] < 1, "so few pooled tokens change an answer"


def test_a_film_and_pictures_are_asked_with_their_tokens_drawn(tmp_path: Path) -> None:
    """The embedded model that watches clips, on a file with a real video."""
    command("template", tmp_path / "mine")
    out = tmp_path / "out"
    some = ["eval", "--data", tmp_path / "mine" / "video.jsonl", "--frames", 16, "--seeds", 1, "--out", out]
    command(*some, "--method", "vidcom2", "--keep", 0.05)
    task = json.loads((out / "run.json").read_text())["tasks"][0]
    lines = ResultFolder(out).lines_of(task["name"], DENSE.name)
    assert all(line["visual_tokens"][0] > 200 for line in lines)
    command("report", out)
    assert (out / "report.html").stat().st_size > 10_000


def test_a_recipe_is_a_row_of_its_own(questions: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.json"
    stages = [vtprune.Stage("pre_llm", vtprune.create("divprune"), keep=0.25)]
    vtprune.Recipe.of(stages).save(recipe)
    command("eval", "--data", questions, "--recipe", recipe, "--seeds", 1, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "eval.json").read_text())["rows"]
    (row,) = (r for r in rows if (r["method"], r["task"]) == ("mine", "color"))
    assert row["visual_tokens"] == [256, 64]
    recipe.write_text(recipe.read_text().replace('"keep": 0.25', '"keep": 0.5'))
    again = ["eval", "--data", str(questions), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    result = runner.invoke(app, again)
    assert result.exit_code == 2
    assert "holds mine pruning by" in result.output


def test_another_evaluation_in_the_folder_is_refused(questions: Path, tmp_path: Path) -> None:
    some = ["eval", "--data", questions, "--method", "divprune", "--keep", "0.25", "--seeds", "1"]
    command(*some, "--out", tmp_path / "out")
    for more, told in (
        (["--limit", "3"], "settings was"),
        (["--new-tokens", "3"], "settings was"),
    ):
        result = runner.invoke(app, [*map(str, some), "--out", str(tmp_path / "out"), *more])
        assert result.exit_code == 2
        assert told in " ".join(result.output.split())
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps({**document, "version": 0}))
    result = runner.invoke(app, [*map(str, some), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "version 0" in result.output


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--shard", "3/2"], "--shard 3/2"),
        (["--shard", "x"], "--shard x"),
        (["--all"], "--all belongs to the questions of the embedded toy"),
        (["--tasks", "gqa"], "--data and --tasks exclude each other"),
        (["--method", "nothing"], "unknown method 'nothing'"),
        (["--preset", "nothing"], "nothing"),
        (["--actors", "2"], "--actors belongs to --ray"),
        (["--ray", "local", "--method", "divprune"], "pip install 'vtprune[ray]'"),
    ],
)
def test_bad_options_are_one_sentence(questions: Path, tmp_path: Path, args: list[str], told: str) -> None:
    if "--ray" in args:
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError:
            pass
        else:
            pytest.skip("Ray is installed here")
    result = runner.invoke(app, ["eval", "--data", str(questions), "--out", str(tmp_path / "out"), *args])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


def test_options_of_a_grid_need_samples(tmp_path: Path) -> None:
    result = runner.invoke(app, ["eval", "--shard", "1/2"])
    assert result.exit_code == 2
    assert "--shard needs samples to ask" in result.output


def test_a_folder_of_other_things_is_left_alone(questions: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    result = runner.invoke(app, ["eval", "--data", str(questions), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not empty and holds no evaluation" in " ".join(result.output.split())


def test_clips_of_the_toy_need_a_model_that_takes_videos(tmp_path: Path) -> None:
    from vtprune.evals.tasks.ask import OwnData
    from vtprune.evals.tasks.setup import toy_samples

    assert clips.CHECKPOINT.exists()
    with pytest.raises(ValueError, match="has no video processor"):
        OwnData(*toy.load(), toy_samples(1, video=True))
