"""Cells of the grid on the tasks of lmms-eval, scored by lmms-eval itself."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from vtprune.evals.tasks import results
from vtprune.evals.tasks.cells import Cell
from vtprune.evals.tasks.folder import Line
from vtprune.evals.tasks.harness import Harness, Loaded
from vtprune.integrations.lmms_eval import MODELS, PREFIX, RunFailed, stock_model

if TYPE_CHECKING:
    from vtprune.evals.tasks.folder import ResultFolder

logger = logging.getLogger(__name__)


class Benchmarks:
    """A model loaded once by a stock class of lmms-eval, to be asked the questions of its tasks cell by cell.

    A `Subject` of the grid. model: what the stock class has loaded, a transformers model. missing: by name, why a task
    could not be loaded; it is logged and left out.
    """

    resumable = False  # lmms-eval answers a task as a whole, in an order of its own

    def __init__(
        self,
        model: str,
        tasks: Sequence[str],
        *,
        model_name: str | None = None,
        include: str | Path | None = None,
        limit: int | None = None,
        new_tokens: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """model: a folder or hub id. model_name: a model of lmms-eval, "llava_hf"; None: the one for such checkpoints.

        include: a folder with tasks of one's own. limit: samples of a task at most. new_tokens: in place of the length
        of answers that each task sets. device: None for a GPU where there is one. dtype: for stock classes that let one
        choose it. options: further arguments of the stock class. Answers come one by one, as most stock classes want it
        and as times are measured.

        Raises ValueError for an unknown model or task, and if no task can be loaded, before any weights are loaded.
        """
        from vtprune.evals.models import device_of

        _quiet()
        where = device_of(device)
        name = (model_name or stock_model(model_type(model))).removeprefix(PREFIX)
        made = pruned_class(name)
        harness = Harness(name, "simple" if made.is_simple else "chat", include)
        self._loaded, self.missing = harness.load(harness.named(tasks), limit)
        told = [f"the task {task} is left out, as it cannot be loaded: {why}" for task, why in self.missing.items()]
        if not self._loaded:
            raise ValueError("; ".join(told))
        for sentence in told:
            logger.warning(sentence)  # modules of lmms-eval switch all warnings off as they are imported
        self._manager, self._limit, self._new_tokens = harness.manager, limit, new_tokens
        fixed = {"device": where, "device_map": where, "dtype": dtype, "batch_size": 1}
        self._wrapper = _made(made, model, {k: v for k, v in fixed.items() if v is not None}, dict(options or {}))
        self.model = self._wrapper.model
        self._wrapper.clean = lambda: None  # the evaluator lets go of a model behind its last task; ours goes on
        self._scores: dict[str, tuple[int, float | None]] = {}
        self._peaks: dict[tuple[str, str], float] = {}

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks that are run, as run.json lists them: name, metric, n samples, source."""
        told = [(one.name, one.metric, one.n, "lmms-eval") for one in self._loaded]
        return [dict(zip(("name", "metric", "n", "source"), one)) for one in told]

    def answers(self, task: str, cell: Cell, done: int = 0, stop: int | None = None) -> Iterator[Line]:
        """Run one task with the model pruned as the cell says; a line for every sample, once all are answered.

        `parts` holds the sample's own mark where the mean of those is the task's score, None elsewhere. done, stop: the
        samples to run, in the order of the task; a score covers them alone.
        Raises what the model raises, also where lmms-eval would have made an empty answer of it.
        """
        loaded = self._named(task)
        part = (done, self._limit if stop is None else stop - done)
        found = self._pruned(loaded, cell, part)
        score = results.score(found["results"][task], loaded.metrics)
        samples = list({sample["doc_id"]: sample for sample in reversed(found["samples"][task])}.values())[::-1]
        marks = [results.mark(sample, loaded.metrics) for sample in samples]
        numbers = [mark for mark in marks if mark is not None]
        means = score is not None and len(numbers) == len(marks) and math.isclose(fmean(numbers), score, abs_tol=1e-9)
        costs = results.costs(self._wrapper.visits)
        self._scores[task] = len(samples), score
        for sample, mark in zip(samples, marks):
            number, parts = sample["doc_id"], [mark] if means else None
            asked = {"question": str(sample.get("input", "")), "answers": [str(sample.get("target", ""))]}
            answer = results.text(sample["resps"])
            yield {"id": str(number), **asked, "answer": answer, "parts": parts, **costs.get(number, {})}

    def score(self, task: str, lines: Sequence[Line] = ()) -> float | None:
        """What lmms-eval made of the answers that were read last, in the metric's own scale; None if it is no number.

        The lines are not marked again: the metric is lmms-eval's. Of lines that were read in several parts it is the
        mean of their marks, and None where the mean is not what the metric makes of them.
        """
        n, score = self._scores.get(self._named(task).name, (0, None))
        if n == len(lines):
            return score
        marks = [line["parts"][0] for line in lines if line["parts"] is not None]
        return fmean(marks) if marks and len(marks) == len(lines) else None

    def peak_mib(self, task: str, cell: Cell) -> float | None:
        """MiB that the model held at once beyond its weights while it answered; None on a CPU."""
        return self._peaks.get((task, cell.name))

    def vision_flops(self, task: str, cell: Cell) -> None:
        """Nothing: what lmms-eval hands to the model is gone by then."""

    def draw(self, task: str, cell: Cell, folder: ResultFolder) -> None:
        """Nothing: pictures stay with lmms-eval."""

    def _pruned(self, loaded: Loaded, cell: Cell, part: tuple[int, int | None]) -> dict[str, Any]:
        """What lmms-eval makes of a part of a task, its calls of the model recorded one by one."""
        from vtprune.evals.tasks.recorder import MIB, Recorder

        gpu = self.model.device if self.model.device.type == "cuda" else None
        if gpu:
            torch.cuda.reset_peak_memory_stats(gpu)
        held = torch.cuda.memory_allocated(gpu) if gpu else 0
        with _as_raised(), cell.applied(self.model) as handle, Recorder(self.model, handle) as recorder:
            self._wrapper.handle = handle
            self._wrapper.after = lambda: recorder.taken.pop() if recorder.taken else None
            try:
                found = self._evaluate(loaded, part)
            finally:
                self._wrapper.handle = self._wrapper.after = None
        if gpu:
            self._peaks[loaded.name, cell.name] = (torch.cuda.max_memory_allocated(gpu) - held) / MIB
        return found

    def _named(self, task: str) -> Loaded:
        for one in self._loaded:
            if one.name == task:
                return one
        raise ValueError(f"task {task!r} is not loaded; loaded are {', '.join(one.name for one in self._loaded)}")

    def _evaluate(self, loaded: Loaded, part: tuple[int, int | None]) -> dict[str, Any]:
        """What lmms-eval's own evaluator returns for one task. part: its first sample, and how many."""
        from lmms_eval.evaluator import simple_evaluate

        return simple_evaluate(
            self._wrapper,
            tasks=[loaded.task],
            task_manager=self._manager,
            limit=part[1],
            offset=part[0],
            gen_kwargs=None if self._new_tokens is None else f"max_new_tokens={self._new_tokens}",
            batch_size=1,
            bootstrap_iters=0,
            process_docs_parallel=1,
            verbosity="ERROR",
        )


def model_type(model: str) -> str:
    """The model type in a checkpoint's config.json; ValueError where there is none that transformers can read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
    except Exception as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--model {model}: no config.json that transformers can read ({told})") from error


def pruned_class(name: str) -> Any:
    """The class of lmms-eval's registry that prunes a stock model; ValueError with the known ones for another name."""
    if name not in MODELS:
        raise ValueError(f"lmms-eval model {name!r} is not known here; choose one of {', '.join(MODELS)}")
    from lmms_eval.models import get_model

    try:
        return get_model(PREFIX + name)
    except RunFailed as failed:
        raise ValueError(str(failed).removeprefix("vtprune: ")) from failed


def _made(made: Any, model: str, fixed: dict[str, Any], options: dict[str, Any]) -> Any:
    """The wrapper with its weights; of what is fixed a stock class takes what it has a name for, of the options all."""
    known = {name for cls in made.__mro__ for name in inspect.signature(cls.__init__).parameters}
    taken = {name: value for name, value in fixed.items() if name in known}
    with _as_raised():
        return made(**{"pretrained": model, **taken, **options})


@contextmanager
def _as_raised() -> Iterator[None]:
    """What went wrong, in place of the RunFailed that carried it past the `except` clauses of lmms-eval."""
    try:
        yield
    except RunFailed as failed:
        raise (failed.__cause__ or failed) from None


def _quiet() -> None:
    """Keep what lmms-eval tells on standard output out of ours; what it measures is returned."""
    from loguru import logger

    logger.disable("lmms_eval")
