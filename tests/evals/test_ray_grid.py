"""The grid of `vtprune eval` on Ray: the rows of one process, whatever actors there are and whichever are lost."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("ray", reason="Ray is not installed: make test-lmms makes an environment with it")

import ray_processes
from test_tasks_grid import runner, write_questions

from vtprune import Assignment, Method, Visual
from vtprune.cli import app
from vtprune.evals.tasks import cluster, grid
from vtprune.evals.tasks.cells import Cell, cells
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.setup import Setup
from vtprune.evals.tasks.summary import summarise

pytestmark = pytest.mark.lmms
CELLS = cells(["divprune", "visionzip"], [0.5, 0.25], seeds=1)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(data=str(write_questions(tmp_path_factory.mktemp("data"), 8, kinds=("color",))))


@pytest.fixture(scope="module")
def alone(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> ResultFolder:
    """The grid in this process."""
    folder = ResultFolder(tmp_path_factory.mktemp("alone"))
    assert evaluated(setup, folder, CELLS, actors=None, address=None) == []
    return folder


def evaluated(
    setup: Setup, folder: ResultFolder, todo: list[Cell], actors: int | None, address: str | None = "local"
) -> list[str]:
    subject = setup.load()
    folder.open({**setup.document(subject), "cells": [cell.document for cell in todo]})
    jobs = grid.jobs([task["name"] for task in subject.tasks], todo)
    if address is None:
        return grid.run(subject, jobs, folder, progress=False)
    return cluster.run(setup, subject, jobs, folder, address, actors=actors, progress=False)


def answers(folder: ResultFolder) -> dict[str, Any]:
    """All lines of all finished cells, without the times."""
    found = {}
    for cell in CELLS:
        assert folder.end_of("color", cell.name) is not None, cell.title
        lines = folder.lines_of("color", cell.name)
        found[cell.name] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return found


def check_equal(folder: ResultFolder, alone: ResultFolder) -> None:
    """The same answers, and the same table to the last byte."""
    assert answers(folder) == answers(alone)
    for one in (folder, alone):
        summarise(one).write(one)
    assert (folder.path / "eval.json").read_bytes() == (alone.path / "eval.json").read_bytes()


def test_rows_of_one_actor_are_those_of_this_process(setup: Setup, alone: ResultFolder, tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path)
    assert evaluated(setup, folder, CELLS, 1) == []
    check_equal(folder, alone)


class Killing(ResultFolder):
    """Kills an actor of the pool as soon as the first cell has come back, while others are at work."""

    killed: ClassVar[list[int]] = []

    def finish(self, task: str, cell: str, end: Line) -> None:
        super().finish(task, cell, end)
        if not self.killed:
            workers = ray_processes.named("MapWorker(Map(Worker))")
            os.kill(workers[-1], signal.SIGKILL)
            self.killed.append(workers[-1])


def test_two_actors_of_which_one_is_killed_lose_nothing(setup: Setup, alone: ResultFolder, tmp_path: Path) -> None:
    folder = Killing(tmp_path)
    assert evaluated(setup, folder, CELLS, 2) == []
    assert len(folder.killed) == 1
    check_equal(folder, alone)


@dataclass(frozen=True)
class Deadly(Method):
    """A rule that takes its process down, as memory that runs out does."""

    name = "deadly"

    def __call__(self, v: Visual) -> Assignment:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.slow
def test_a_cell_that_kills_every_actor_is_named_and_the_others_are_run(
    setup: Setup, alone: ResultFolder, tmp_path: Path
) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this file
    folder = ResultFolder(tmp_path)
    deadly = Cell("deadly", Deadly(), 0.5)
    failed = evaluated(setup, folder, [*CELLS, deadly], actors=None)
    assert [told.split(":")[0] for told in failed] == ["deadly at 50 % on color"]
    assert "every actor that ran it was lost" in failed[0]
    assert folder.failure_of("color", deadly.name) is not None
    assert answers(folder) == answers(alone)


def test_a_cluster_that_is_not_there_is_one_sentence(setup: Setup, tmp_path: Path) -> None:
    some = ["eval", "--data", setup.data, "--out", tmp_path / "out", "--ray", "127.0.0.1:1"]
    result = runner.invoke(app, [str(a) for a in some])
    assert result.exit_code == 2
    assert "--ray 127.0.0.1:1: no cluster answers there" in result.output
