"""What an evaluation is made of, by names alone, so that another process can load the same."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vtprune.evals.tasks.folder import Line

if TYPE_CHECKING:
    from vtprune.evals.tasks.cells import Cell
    from vtprune.evals.tasks.folder import ResultFolder
    from vtprune.evals.tasks.sample import Sample


class Subject(Protocol):
    """A loaded model and what it is asked: a user's own samples, or tasks of a harness.

    resumable: `answers` can go on behind answers that are there; otherwise it begins the task again.
    """

    model: Any
    resumable: bool

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Name, metric, number of samples and source of every task."""

    def answers(self, task: str, cell: Cell, done: int = 0, stop: int | None = None) -> Iterator[Line]:
        """A line for every sample from `done` to `stop`, as it is answered by the model pruned as `cell` says."""

    def score(self, task: str, lines: Sequence[Line]) -> float | None:
        """The score of a task whose lines these are; None where nothing but the dense answers can be compared with."""

    def peak_mib(self, task: str, cell: Cell) -> float | None:
        """MiB that one prefill holds at once, weights not counted; None where it cannot be told."""

    def vision_flops(self, task: str, cell: Cell) -> int | None:
        """FLOPs of tower and projector on one sample; None where they cannot be told."""

    def draw(self, task: str, cell: Cell, folder: ResultFolder) -> None:
        """Leave pictures of what was kept where pruning changed an answer."""


@dataclass(frozen=True)
class Setup:
    """What is evaluated.

    model: path or hub id, None for the embedded toy. data: a file that `vtprune.evals.tasks.data.read` takes, with
    `metric` and `frames` as it takes them; None for the questions of the toy, of the one that watches clips if `video`.
    tasks: names of lmms-eval's tasks instead, `include` a folder with more of them. limit: samples of a task at most.
    new_tokens: tokens to generate at most, None for the task's own number. seed: shuffles the samples.
    """

    model: str | None = None
    data: str | None = None
    tasks: tuple[str, ...] = ()
    include: str | None = None
    video: bool = False
    metric: str | None = None
    frames: int = 8
    limit: int | None = None
    new_tokens: int | None = None
    device: str | None = None
    dtype: str | None = None
    seed: int | None = None

    @classmethod
    def of(cls, model: str | None, data: Any, tasks: str | None, preset: str | None = None, **more: Any) -> Setup:
        """As the command line names it. Raises ValueError unless there are either data or tasks."""
        names = tuple(filter(None, (tasks or "").split(",")))
        if preset is not None and data is None and not names:
            from vtprune.evals.tasks.published import preset_of

            names = tuple(preset_of(preset).tasks)
        if data is not None and names:
            raise ValueError("--data and --tasks exclude each other: name a file, or tasks of lmms-eval")
        include = more.pop("include", None)
        return cls(model, data and str(data), names, include and str(include), **more)

    def films(self, subject: Subject) -> bool:
        """Whether the questions are about films, so that rules about frames have a meaning."""
        samples = getattr(subject, "samples", {})
        return any(sample.video is not None for task in samples.values() for sample in task)

    def load(self) -> Subject:
        """Read the samples and load the model. Raises ValueError for what is not there, with the reason."""
        if self.tasks:
            return self._benchmarks()
        from vtprune.evals import models
        from vtprune.evals.tasks.ask import OwnData
        from vtprune.evals.tasks.data import read

        if self.data is None:
            samples = toy_samples(self.limit or 40, self.video)
        else:
            samples = read(Path(self.data), metric=self.metric, frames=self.frames, limit=self.limit)
        if self.seed is not None:
            samples = random.Random(self.seed).sample(samples, len(samples))
        video = any(sample.video is not None for sample in samples)
        model, processor = models.load(self.model, self.device, self.dtype, video)
        return OwnData(model, processor, samples, self.new_tokens or 16)

    def _benchmarks(self) -> Subject:
        from vtprune.evals.tasks.benchmarks import Benchmarks

        if self.model is None:
            raise ValueError("--tasks asks a model of your own: name it with --model")
        return Benchmarks(
            self.model, list(self.tasks), include=self.include, limit=self.limit, new_tokens=self.new_tokens,
            device=self.device, dtype=self.dtype,
        )  # fmt: skip

    def document(self, subject: Subject) -> Line:
        """What the folder of results says of the evaluation, its cells left out."""
        from vtprune.evals.report import environment
        from vtprune.evals.tasks.data import digest

        model = subject.model
        device, dtype = model.device.type, str(model.dtype).removeprefix("torch.")
        settings = {
            k: v for k, v in asdict(self).items() if k in ("limit", "new_tokens", "frames", "metric", "include")
        }
        return {
            "model": self.model or "the embedded toy VLM",
            "data": None
            if self.data is None
            else {"file": str(Path(self.data).resolve()), "sha256": digest(self.data)},
            "tasks": subject.tasks,
            "missing": getattr(subject, "missing", {}),
            "settings": {**settings, "device": device, "dtype": dtype},
            "environment": environment(device, dtype, 1, parameters=model.num_parameters()),
        }


def toy_samples(per_capability: int = 40, video: bool = False, seed: int = 777001) -> list[Sample]:
    """Held-out questions of an embedded toy, every kind of question a task of its own."""
    from vtprune.evals.accuracy.exam import words_of
    from vtprune.evals.tasks.sample import Sample
    from vtprune.evals.toys import image
    from vtprune.evals.toys import video as clips

    asked: Any = clips if video else image
    found = []
    for i, q in enumerate(asked.questions(per_capability=per_capability, seed=seed)):
        media: dict[str, Any] = {"video": q.seen} if video else {"images": (q.seen,)}
        where = f"question {i} of the toy"
        asked_as = words_of(q.prompt)
        found.append(Sample(str(i), q.capability, asked_as, answers=(q.answer,), metric="exact", where=where, **media))
    return found
