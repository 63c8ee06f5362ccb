"""Folders of results as an evaluation writes them, with answers made up: for tests of tables and of the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtprune.evals.tasks.cells import DENSE, Cell, cells
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.toys import image as toy

ENVIRONMENT = {
    "machine": "Linux x86_64", "cpu": "a CPU", "cpu_threads": 2, "gpu": None, "device": "cpu", "dtype": "float32",
    "batch": 1, "python": "3.12", "versions": {"vtprune": "0.1.0", "torch": "2.10"}, "commit": "abc", "time": "today",
    "command": "vtprune eval --data questions.jsonl --method divprune --method visionzip",
}  # fmt: skip
Answers = Mapping[Cell, Sequence[Line] | str | None]


def line(one: Any, answer: str, parts: Sequence[float] | None = None, **more: Any) -> Line:
    """A line as the runner writes it; `parts` None where there are no labels."""
    counts = {"visual_tokens": [64, 64], "prompt_tokens": [80, 80], "seconds": {}}
    return {"id": str(one), "answer": answer, "parts": None if parts is None else list(parts), **counts, **more}


def write(path: Path, tasks: Mapping[str, tuple[str, Answers]], scores: Any = None, **more: Any) -> ResultFolder:
    """A folder of `tasks`: name -> (metric, cell -> its lines; a text: it failed; None: it has not begun).

    scores: (task, cell) -> what a harness says at the cell's end, where that is not made of the parts.
    """
    every = list(dict.fromkeys(cell for _, answers in tasks.values() for cell in answers))
    named = [
        {"name": name, "metric": metric, "n": max(len(found) for found in answers.values() if isinstance(found, list)),
         "source": "file"}
        for name, (metric, answers) in tasks.items()
    ]  # fmt: skip
    folder = ResultFolder(path)
    document = {"model": "a toy", "data": None, "settings": {"limit": None}, "environment": ENVIRONMENT, **more}
    folder.open({**document, "tasks": named, "cells": [cell.document for cell in every]})
    for name, (metric, answers) in tasks.items():
        for cell, found in answers.items():
            if isinstance(found, str):
                folder.fail(name, cell.name, found)
            elif found is not None:
                list(folder.append(name, cell.name, found))
                score = None if scores is None else scores.get((name, cell))
                end = {"cell": cell.document, "task": name, "metric": metric, "n": len(found), "score": score}
                folder.finish(name, cell.name, {**end, "peak_mib": 12.5})
    return folder


METHODS = ("divprune", "visionzip", "hiprune", "fastv")
KEEPS = (0.5, 0.25, 0.11)
STRENGTH = {"dense": 1.0, "random": 0.9, "uniform": 0.92, "divprune": 0.97, "visionzip": 0.985, "hiprune": 0.96}


def example(path: Path, methods: Sequence[str] = METHODS, keeps: Sequence[float] = KEEPS, n: int = 60) -> ResultFolder:
    """Two tasks with pictures of the toy, in a data file beside them; answers, times and kept tokens are made up."""
    rng = np.random.default_rng(1)
    path.mkdir(parents=True, exist_ok=True)
    every = cells(methods, keeps, seeds=2)
    asked = toy.questions(per_capability=n, capabilities=["color", "count"])
    rows, tasks = [], {}
    for name in ("color", "count"):
        mine = [question for question in asked if question.capability == name][:n]
        records = []
        for i, question in enumerate(mine):
            file = path / "pictures" / f"{name}{i}.png"
            file.parent.mkdir(exist_ok=True)
            question.image.resize((320, 320), Image.Resampling.BICUBIC).save(file)
            text = question.prompt.split("> ")[-1].removesuffix(" answer:")
            records.append({"id": f"{name}-{i}", "task": name, "image": str(file.relative_to(path)),
                            "question": text, "answer": question.answer})  # fmt: skip
        rows += records
        tasks[name] = ("exact", {cell: [_made_up(cell, i, r, rng) for i, r in enumerate(records)] for cell in every})
    data = path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"file": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest(), "frames": 8}
    return write(path, tasks, data=found, model="the embedded toy VLM")


def _made_up(cell: Cell, i: int, record: dict[str, str], rng: np.random.Generator) -> Line:
    keep = 1.0 if cell.keep is None else cell.keep if isinstance(cell.keep, float) else cell.keep / 576
    chance = 0.85 * STRENGTH.get(cell.label, 0.88) ** (1 + 0.9 * np.log(1 / keep))
    right = np.random.default_rng(i).random() * 0.7 + rng.random() * 0.3 < chance
    answer = record["answer"] if right else "grey <b>"
    prefill = 0.040 * (0.2 + 0.8 * keep) + 0.0004 * rng.random()
    select = 0 if cell == DENSE else 0.002 * (1 - STRENGTH.get(cell.label, 0.9)) * 10
    after = max(1, round(64 * keep))
    kept = sorted(rng.choice(64, after, replace=False).tolist())
    return line(
        record["id"], answer, [float(right)], visual_tokens=[64, after], prompt_tokens=[80, 16 + after],
        seconds={"ttft": 0.02 + prefill + select, "encode": 0.02, "select": select, "prefill": prefill, "total": 0.1},
        **({"kept": [kept], "grid": [[1, 8, 8]]} if i < 8 else {}),
    )  # fmt: skip
