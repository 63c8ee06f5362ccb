"""The grid of an evaluation on a Ray cluster: every cell is a Ray task, and this process writes what comes back.

    vtprune eval --data data.jsonl --model ID --method divprune --ray auto

A worker loads the model once and keeps it for the cells that follow. It needs vtprune installed and sees the model and
the data under the same paths. Nothing here is distributed code of our own: Ray chooses machines, moves results and
tries again where a machine is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tqdm import tqdm

from vtprune.evals.tasks.cells import DENSE, Cell
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.setup import Setup, Subject

Answered = tuple[list[Line], Line]


def run(
    setup: Setup, subject: Subject, todo: Sequence[tuple[str, Cell]], folder: ResultFolder, address: str,
    *, progress: bool = True,
) -> list[str]:  # fmt: skip
    """Do every job that is not finished yet on the cluster at `address`; one sentence for each that failed.

    address: of a running cluster ("auto" finds it, "ray://HOST:10001" is a client's), or "local" for one that is
    started here and ends with the run. A job takes one CPU, and one GPU where the model stands on one. What fails in a
    cell is written into the folder; what fails on the dense model is raised.

    Raises ValueError where no cluster answers at that address.
    """
    ray = _ray()
    _check_reachable(address)
    gpus = 1 if subject.model.device.type == "cuda" else 0
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"--ray {address}: no cluster answers there ({' '.join(str(error).split())})") from error
    try:
        task = ray.remote(num_cpus=1, num_gpus=gpus)(answered)
        waiting = {
            task.remote(setup, name, cell): (name, cell)
            for name, cell in todo
            if folder.end_of(name, cell.name) is None
        }
        return _collect(ray, waiting, subject, folder, progress)
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


def answered(setup: Setup, task: str, cell: Cell) -> Answered:
    """One cell, on a worker: the lines of a task and the cell's end."""
    from vtprune.evals.tasks.grid import end_of

    subject = _loaded(setup)
    lines = list(subject.answers(task, cell))
    return lines, end_of(subject, task, cell, lines)


@lru_cache(maxsize=1)
def _loaded(setup: Setup) -> Subject:
    return setup.load()


def _collect(
    ray: Any, waiting: dict[Any, tuple[str, Cell]], subject: Subject, folder: ResultFolder, progress: bool
) -> list[str]:
    """Write the cells as they come, each whole."""
    from vtprune.evals.tasks.grid import reason

    failed = []
    with tqdm(total=len(waiting), unit="cell", disable=not progress) as bar:
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            name, cell = waiting.pop(done)
            try:
                lines, end = ray.get(done)
            except ray.exceptions.RayError as error:
                told = reason(getattr(error, "cause", None) or error)
                folder.fail(name, cell.name, told)
                if cell == DENSE:
                    raise ValueError(f"dense on {name}: {told}") from error
                failed.append(f"{cell.title} on {name}: {told}")
            else:
                list(folder.append(name, cell.name, lines))
                folder.finish(name, cell.name, end)
                subject.draw(name, cell, folder)
            bar.update()
    return failed


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("--ray needs the package ray: run pip install 'vtprune[ray]'") from error
    return ray
