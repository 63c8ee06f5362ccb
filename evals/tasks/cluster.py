"""The grid of an evaluation on a Ray cluster: a pool of actors runs the cells, and this process writes what comes back.

    vtprune eval --data data.jsonl --model ID --method divprune --ray auto

An actor loads the model once and keeps it for the cells that follow. It needs vtprune installed and sees the model and
the data under the same paths. Nothing here is distributed code of our own: the pool is Ray Data's, which chooses
machines, moves results, and asks again where an actor is lost.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vtprune.evals.tasks.cells import DENSE
from vtprune.evals.tasks.folder import ResultFolder
from vtprune.evals.tasks.grid import Job, end_of, free, reason
from vtprune.evals.tasks.setup import Setup, Subject

Row = dict[str, Any]
RETRIES = 3  # of a cell whose actor is lost: a machine may fail, but a cell that kills every actor should not go on


def run(
    setup: Setup, subject: Subject, todo: Sequence[Job], folder: ResultFolder, address: str,
    *, actors: int | None = None, progress: bool = True,
) -> list[str]:  # fmt: skip
    """Do every job that is not finished yet on the cluster at `address`; one sentence for each that failed.

    address: of a running cluster ("auto" finds it, "ray://HOST:10001" is a client's), or "local" for one that is
    started here and ends with the run. actors: how many run cells at once; None: as many as Ray finds room for. Each
    takes one CPU, and one GPU where the model stands on one. A cell whose actor is lost is run again by another. What
    fails in a cell is written into the folder; what fails on the dense model is raised.

    Raises ValueError where no cluster answers at that address.
    """
    waiting = [(name, cell) for name, cell in todo if folder.end_of(name, cell.name) is None]
    if not waiting:
        return []
    with connected(address) as ray:
        if actors is None:
            pool = ray.data.ActorPoolStrategy(min_size=1, max_size=len(waiting))
        else:
            pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1)
        # A block is what an actor is given at once: here one cell.
        rows = ray.data.from_items([{"job": i} for i in range(len(waiting))], override_num_blocks=len(waiting))
        rows.context.enable_progress_bars = rows.context.print_on_execution_start = False
        rows.context.max_errored_blocks = -1  # a cell that fails leaves the others alone
        rows.context.execution_no_progress_timeout_s = -1  # a cell may take hours
        done = rows.map(
            Worker, fn_constructor_args=(setup, waiting), compute=pool, num_cpus=1,
            num_gpus=1 if subject.model.device.type == "cuda" else 0, max_restarts=-1, max_task_retries=RETRIES,
        )  # fmt: skip
        return _collect(done.iter_rows(), waiting, subject, folder, progress)


class Worker:
    """An actor of the pool: a loaded model that runs the jobs whose numbers it is given."""

    def __init__(self, setup: Setup, jobs: Sequence[Job]) -> None:
        self.subject, self.jobs = setup.load(), jobs

    def __call__(self, row: Row) -> Row:
        """{"job": number} -> {"job": number, "told": JSON}: lines and the cell's end, or why it failed."""
        task, cell = self.jobs[row["job"]]
        try:
            lines = list(self.subject.answers(task, cell))
            told = {"lines": lines, "end": end_of(self.subject, task, cell, lines)}
        except Exception as error:
            told = {"failed": reason(error)}
            free(self.subject.model)
        return {"job": row["job"], "told": json.dumps(told)}


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The package ray, connected to the cluster at an address as `run` takes it, inside a `with` block.

    Raises ValueError where Ray is not installed or no cluster answers at that address.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ValueError("--ray needs the package ray: run pip install 'vtprune[ray]'") from error
    _check_reachable(address)
    try:
        # "local" starts a cluster of its own; None would wait for one that an earlier run has left a note of.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"--ray {address}: no cluster answers there ({' '.join(str(error).split())})") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ValueError where nothing listens at HOST:PORT; Ray would try for minutes and then end this process."""
    import socket

    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"--ray {address}: no cluster answers there ({error})") from error


def _collect(
    rows: Iterator[Row], waiting: Sequence[Job], subject: Subject, folder: ResultFolder, progress: bool
) -> list[str]:
    """Write the cells as they come, each whole, and why those that did not come are missing."""
    failed, missing = [], dict(enumerate(waiting))
    for row in tqdm(rows, total=len(waiting), unit="cell", disable=not progress):
        name, cell = missing.pop(row["job"])
        told = json.loads(row["told"])
        if "failed" in told:
            failed.append(_failed(name, cell, folder, told["failed"]))
        else:
            list(folder.append(name, cell.name, told["lines"]))
            folder.finish(name, cell.name, told["end"])
            subject.draw(name, cell, folder)
    lost = f"every actor that ran it was lost, {RETRIES + 1} of them; Ray's logs say how"
    return failed + [_failed(name, cell, folder, lost) for name, cell in missing.values()]


def _failed(name: str, cell: Any, folder: ResultFolder, told: str) -> str:
    """Write down why a cell failed, and say it; ValueError for dense, without which nothing could be compared."""
    folder.fail(name, cell.name, told)
    if cell == DENSE:
        raise ValueError(f"dense on {name}: {told}")
    return f"{cell.title} on {name}: {told}"
