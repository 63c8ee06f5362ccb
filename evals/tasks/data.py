"""A user's own questions, read from a file and checked before any model is asked.

A row has a question, its image, images or video, and if known its answer or answers; options make it a multiple-choice
question, whose answer is a letter, the text of an option, or an index from 0 to n - 1.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from vtprune.evals.tasks.choices import labelled
from vtprune.evals.tasks.columns import answers_of, check_names, media_of, options_of, question_of, text_of
from vtprune.evals.tasks.metrics import METRICS
from vtprune.evals.tasks.sample import Sample, by_task
from vtprune.evals.tasks.tables import rows

AGREEMENT = "agreement"  # the answers of the dense model are the measure; no label is needed
NAMES = (*METRICS, AGREEMENT)


def read(
    path: str | os.PathLike[str], *, metric: str | None = None, frames: int = 8, limit: int | None = None
) -> list[Sample]:
    """The samples of a file, in its order: JSON lines, a JSON list, parquet, or the folder of a saved dataset.

    Columns: question; image or images (paths relative to the folder in which the file lies, absolute paths, bytes, or
    the {"bytes", "path"} of datasets) or video; answer or answers; options or choices; metric; task, by default the
    name of the file; id, by default the number of the line.

    metric: marks all samples, whatever the file says. A task whose metric is not given has choice if it has options,
    yesno_f1 if all its answers are yes or no, exact if every sample has one answer, vqa if some have several, and
    agreement if there are no answers. frames: how many are taken from a video. limit: samples per task, the first ones;
    what is left out is checked too.

    Raises FileNotFoundError, ImportError where a package is missing that reads the file or marks by anls, and
    ValueError that names the file and the line of what is wrong.
    """
    for name, number in (("frames", frames), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    if metric is not None:
        _check_metric(metric, "metric")
    path = Path(path)
    samples = []
    for row in rows(path):
        check_names(row)
        images, video = media_of(row, path.parent)
        samples.append(
            Sample(
                id=text_of(row, "id") or str(row.number),
                task=text_of(row, "task") or path.stem,
                question=question_of(row),
                images=images,
                video=video,
                answers=answers_of(row),
                options=options_of(row),
                metric=metric or text_of(row, "metric") or "",
                frames=frames,
                where=row.where,
            )
        )
    _check_files(samples)
    marked = {task: iter(_marked(task, group)[:limit]) for task, group in by_task(samples).items()}
    taken = (next(marked[sample.task], None) for sample in samples)  # in the order of the file again
    return [sample for sample in taken if sample is not None]


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a data file, as hexadecimal digits; of a folder, of the names and the content of all its files.

    Of the pictures and videos that it names, only the name as written and the size in bytes are part of it: what is
    inside them is not hashed, since it may be many gigabytes.
    """
    path = Path(path)
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        total.update(f"{file.relative_to(path.parent) if path.is_dir() else ''}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                total.update(chunk)
    for row in rows(path):
        images, video = media_of(row, path.parent)
        for one in (*images, video):
            if isinstance(one, Path):
                total.update(f"{os.path.relpath(one, path.parent)}\0{one.stat().st_size}\n".encode())
    return total.hexdigest()


def _check_files(samples: Sequence[Sample]) -> None:
    """ValueError that names the first missing file and tells how many are missing."""
    named = [
        (sample, "image" if sample.video is None else "video", one)
        for sample in samples
        for one in (*sample.images, sample.video)
        if isinstance(one, Path)
    ]
    missing = [(sample, kind, file) for sample, kind, file in named if not file.is_file()]
    if missing:
        sample, kind, file = missing[0]
        more = f", the first of {len(missing)} missing files" if len(missing) > 1 else ""
        raise ValueError(
            f"{sample.where}: there is no {kind} file {file}{more}; paths are relative to the folder of the data file"
        )


def _marked(task: str, samples: list[Sample]) -> list[Sample]:
    """The samples of one task with the metric that they share, and labels that it can mark."""
    _check_ids(samples)
    _check_labels(task, samples)
    named = [sample for sample in samples if sample.metric]
    for sample in named:
        _check_metric(sample.metric, f"{sample.where}: metric")
        if sample.metric != named[0].metric:
            raise ValueError(
                f"{sample.where}: the metric {sample.metric} and, at {named[0].where}, {named[0].metric} in the task "
                f"{task!r}: a task has one metric, so give these samples different tasks"
            )
    metric = named[0].metric if named else _default(samples)
    if metric == "anls" and find_spec("rapidfuzz") is None:
        raise ImportError("the metric anls needs rapidfuzz, which is not installed: run pip install rapidfuzz")
    return [_fit(sample, metric) for sample in samples]


def _check_ids(samples: Sequence[Sample]) -> None:
    seen: dict[str, Sample] = {}
    for sample in samples:
        first = seen.setdefault(sample.id, sample)
        if first is not sample:
            raise ValueError(f"{sample.where}: the id {sample.id!r} is that of {first.where} too: make it unique")


def _check_labels(task: str, samples: Sequence[Sample]) -> None:
    """ValueError where some samples of a task have an answer and others do not."""
    empty = [sample for sample in samples if not sample.answers]
    if 0 < len(empty) < len(samples):
        raise ValueError(
            f"{empty[0].where}: it has no answer, as {len(empty)} of the {len(samples)} samples of the task {task!r}: "
            "answer all of them or none, or give those without an answer another task"
        )


def _check_metric(name: str, where: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{where} {name!r} is unknown: choose from {', '.join(NAMES)}")


def _default(samples: Sequence[Sample]) -> str:
    if not any(sample.answers for sample in samples):
        return AGREEMENT
    if any(sample.options for sample in samples):
        return "choice"
    if any(len(sample.answers) > 1 for sample in samples):
        return "vqa"
    return "yesno_f1" if all(_says_yes_or_no(sample) for sample in samples) else "exact"


def _says_yes_or_no(sample: Sample) -> bool:
    return len(sample.answers) == 1 and sample.answers[0].lower() in ("yes", "no")


def _fit(sample: Sample, metric: str) -> Sample:
    """The sample with its metric and, for a multiple choice, the letter of its answer; ValueError if they clash."""
    where, answers = sample.where, sample.answers
    if metric == AGREEMENT:
        return replace(sample, metric=metric)
    if not answers:
        raise ValueError(f"{where}: the metric {metric} needs an answer; {AGREEMENT} needs none")
    if bool(sample.options) != (metric == "choice"):
        raise ValueError(
            f"{where}: it has {'' if sample.options else 'no '}options, and its metric is {metric}: the metric choice "
            "goes with options, and the others without"
        )
    if metric == "yesno_f1" and not _says_yes_or_no(sample):
        raise ValueError(f"{where}: the metric yesno_f1 needs one answer, yes or no, and not {', '.join(answers)}")
    if metric == "choice":
        if len(answers) > 1:
            raise ValueError(f"{where}: it has {len(answers)} answers, and a multiple choice has one right option")
        try:
            answers = (labelled(answers[0], sample.options),)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return replace(sample, metric=metric, answers=answers)
