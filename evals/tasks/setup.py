"""What an evaluation is made of, by names alone, so that another process can load the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vtprune.evals.tasks.folder import Line

if TYPE_CHECKING:
    from vtprune.evals.tasks.cells import Cell
    from vtprune.evals.tasks.folder import ResultFolder


class Subject(Protocol):
    """A loaded model and what it is asked: a user's own samples, or tasks of a harness.

    resumable: `answers` can go on behind answers that are there; otherwise it begins the task again.
    """

    model: Any
    resumable: bool

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """Name, metric, number of samples and source of every task."""

    def answers(self, task: str, cell: Cell, done: int = 0) -> Iterator[Line]:
        """A line for every sample behind the first `done`, as it is answered by the model pruned as `cell` says."""

    def score(self, task: str, lines: Sequence[Line]) -> float | None:
        """The score of a task whose lines these are; None where nothing but the dense answers can be compared with."""

    def peak_mib(self, task: str, cell: Cell) -> float | None:
        """MiB that one prefill holds at once, weights not counted; None where it cannot be told."""

    def draw(self, task: str, cell: Cell, folder: ResultFolder) -> None:
        """Leave pictures of what was kept where pruning changed an answer."""


@dataclass(frozen=True)
class Setup:
    """What is evaluated.

    model: path or hub id, None for the embedded toy. data: a file that `vtprune.evals.tasks.data.read` takes, with
    `metric` and `frames` as it takes them; or tasks: names of lmms-eval's tasks, `include` a folder with more of them.
    limit: samples of a task at most. new_tokens: tokens to generate at most, None for the task's own number.
    """

    model: str | None = None
    data: str | None = None
    tasks: tuple[str, ...] = ()
    include: str | None = None
    metric: str | None = None
    frames: int = 8
    limit: int | None = None
    new_tokens: int | None = None
    device: str | None = None
    dtype: str | None = None

    def load(self) -> Subject:
        """Read the samples and load the model. Raises ValueError for what is not there, with the reason."""
        if self.tasks:
            return self._benchmarks()
        from vtprune.evals import models
        from vtprune.evals.tasks.ask import OwnData
        from vtprune.evals.tasks.data import read

        samples = read(Path(self.data or ""), metric=self.metric, frames=self.frames, limit=self.limit)
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
            "settings": {**settings, "device": device, "dtype": dtype},
            "environment": environment(device, dtype, 1, parameters=model.num_parameters()),
        }
