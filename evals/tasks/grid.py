"""Run the grid: every cell on every task, each once, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from vtprune.evals.tasks.cells import DENSE, Cell
from vtprune.evals.tasks.folder import Line, ResultFolder
from vtprune.evals.tasks.setup import Subject

Job = tuple[str, Cell]


def jobs(tasks: Sequence[str], cells: Sequence[Cell], shard: tuple[int, int] = (1, 1)) -> list[Job]:
    """What there is to do, dense first; of shard (i, n) every n-th job from the i-th on.

    Raises ValueError for a shard that does not exist.
    """
    i, n = shard
    if not 1 <= i <= n:
        raise ValueError(f"shard {i}/{n}: write i/n with i from 1 to n, such as 1/4")
    return [(task, cell) for cell in cells for task in tasks][i - 1 :: n]


def run(subject: Subject, todo: Sequence[Job], folder: ResultFolder, *, progress: bool = True) -> list[str]:
    """Do every job that is not finished yet; one sentence for each that failed.

    What fails in a cell (a method that the model cannot take, memory that runs out, a fault in a plug-in) is written
    into the folder, and the other cells are run. What fails on the dense model is raised: nothing could be compared.
    """
    failed = []
    with tqdm(todo, unit="cell", disable=not progress) as bar:
        for task, cell in bar:
            bar.set_description(f"{task}: {cell.title}")
            if folder.end_of(task, cell.name) is not None:
                continue
            try:
                run_job(subject, task, cell, folder)
            except Exception as error:
                told = reason(error)
                folder.fail(task, cell.name, told)
                if cell == DENSE:
                    raise
                failed.append(f"{cell.title} on {task}: {told}")
                free(subject.model)
    return failed


def run_job(subject: Subject, task: str, cell: Cell, folder: ResultFolder) -> None:
    """Ask the questions of one task in one cell, from the first that has no answer yet, and mark it as finished."""
    there = folder.lines_of(task, cell.name) if subject.resumable else []
    fresh = folder.append(task, cell.name, subject.answers(task, cell, len(there)), keep=len(there))
    lines = [*there, *fresh]
    folder.finish(task, cell.name, end_of(subject, task, cell, lines))
    subject.draw(task, cell, folder)


def end_of(subject: Subject, task: str, cell: Cell, lines: Sequence[Line]) -> Line:
    """What is written at the end of a cell. Raises ValueError unless every sample was answered."""
    (known,) = (one for one in subject.tasks if one["name"] == task)
    if len(lines) != known["n"]:
        raise ValueError(f"{len(lines)} answers to the {known['n']} samples of {task}")
    score = subject.score(task, lines)
    peak, flops = subject.peak_mib(task, cell), subject.vision_flops(task, cell)
    return {"cell": cell.document, **known, "score": score, "peak_mib": peak, "vision_flops": flops}


def reason(error: BaseException) -> str:
    """Why a cell failed, in one line: the kind of the error, its message and the place in the code."""
    message = " ".join(str(error).split()) or "no message"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames and _is_fault(error) else ""
    return f"{type(error).__name__}: {message}{where}"


def _is_fault(error: BaseException) -> bool:
    from vtprune import VtpruneError

    return not isinstance(error, VtpruneError | ValueError | torch.OutOfMemoryError)


def free(model: Any) -> None:
    """Leave the model unpatched and the memory of a failed cell free for the next."""
    import vtprune

    vtprune.unpatch(model)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
