"""Cells of the grid on the tasks of lmms-eval, scored by lmms-eval itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from vtprune.evals.tasks.cells import Cell
from vtprune.evals.tasks.folder import Line
from vtprune.evals.tasks.harness import Harness, Loaded
from vtprune.integrations.lmms_eval import MODELS, PREFIX, RunFailed, stock_model


class Benchmarks:
    """A model loaded once by a stock class of lmms-eval, to be asked the questions of its tasks cell by cell.

    missing: by name, why a task could not be loaded; it is left out.
    """

    def __init__(
        self,
        model_name: str | None,
        model: str,
        tasks: Sequence[str],
        *,
        include: str | Path | None = None,
        limit: int | None = None,
        new_tokens: int | None = None,
        device: str = "cpu",
        batch: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """model_name: a model of lmms-eval, "llava_hf"; None: the one for checkpoints like `model`, a folder or hub id.

        include: a folder with tasks of one's own. limit: samples of a task at most. new_tokens: in place of the length
        of answers that each task sets. options: further arguments of the stock class. Answers come one by one, batch=1,
        as most stock classes want it and as times are measured.

        Raises ValueError for an unknown model or task, and if no task can be loaded, before any weights are loaded.
        """
        if batch != 1:
            raise ValueError(f"batch={batch}: the tasks of lmms-eval are run one sample at a time; use 1")
        _quiet()
        name = (model_name or stock_model(model_type(model))).removeprefix(PREFIX)
        made = pruned_class(name)
        harness = Harness(name, "simple" if made.is_simple else "chat", include)
        self._loaded, self.missing = harness.load(harness.named(tasks), limit)
        if not self._loaded:
            told = "; ".join(f"{task} ({why})" for task, why in self.missing.items())
            raise ValueError(f"no task could be loaded: {told}")
        self._manager, self._limit, self._new_tokens = harness.manager, limit, new_tokens
        given = {"device": device, "device_map": device, "batch_size": 1, **(options or {})}
        self._wrapper = _made(made, model, given, set(options or ()))
        self._wrapper.clean = lambda: None  # the evaluator lets go of a model behind its last task; ours goes on
        self._scores: dict[str, float | None] = {}

    @property
    def model(self) -> Any:
        """The transformers model that the stock class has loaded."""
        return self._wrapper.model

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks that are run, as run.json lists them: name, metric, n samples, source."""
        told = [(one.name, one.metric, one.n, "lmms-eval") for one in self._loaded]
        return [dict(zip(("name", "metric", "n", "source"), one)) for one in told]

    def answers(self, task: str, cell: Cell) -> Iterator[Line]:
        """Run one task with the model pruned as the cell says; a line for every sample, once all are answered.

        `parts` holds the sample's own mark where the mean of those is the task's score, None elsewhere.
        Raises what the model raises, also where lmms-eval would have made an empty answer of it.
        """
        from vtprune.evals.tasks.recorder import Recorder

        loaded = self._named(task)
        with _as_raised(), cell.applied(self.model) as handle, Recorder(self.model, handle) as recorder:
            self._wrapper.handle = handle
            self._wrapper.after = lambda: recorder.taken.pop() if recorder.taken else None
            try:
                found = self._evaluate(loaded)
            finally:
                self._wrapper.handle = self._wrapper.after = None
        score = self._scores[task] = _score(found["results"][task], loaded.metrics)
        samples = list({sample["doc_id"]: sample for sample in reversed(found["samples"][task])}.values())[::-1]
        marks = [_mark(sample, loaded.metrics) for sample in samples]
        means = score is not None and None not in marks and math.isclose(fmean(marks), score, abs_tol=1e-9)  # type: ignore[arg-type]
        costs = _costs(self._wrapper.visits)
        for sample, mark in zip(samples, marks):
            number, parts = sample["doc_id"], [mark] if means else None
            yield {"id": str(number), "answer": _text(sample["resps"]), "parts": parts, **costs.get(number, {})}

    def score(self, task: str) -> tuple[str, float | None]:
        """(metric, score in the metric's own scale) of the cell whose answers were read last; None if there is none."""
        return self._named(task).metric, self._scores.get(task)

    def _named(self, task: str) -> Loaded:
        for one in self._loaded:
            if one.name == task:
                return one
        raise ValueError(f"task {task!r} is not loaded; loaded are {', '.join(one.name for one in self._loaded)}")

    def _evaluate(self, loaded: Loaded) -> dict[str, Any]:
        """What lmms-eval's own evaluator returns for one task."""
        from lmms_eval.evaluator import simple_evaluate

        return simple_evaluate(
            self._wrapper,
            tasks=[loaded.task],
            task_manager=self._manager,
            limit=self._limit,
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


def _made(made: Any, model: str, given: dict[str, Any], wanted: set[str]) -> Any:
    """The wrapper with its weights; of what is given, each stock class takes what it has, and all that is wanted."""
    known = {name for cls in made.__mro__ for name in inspect.signature(cls.__init__).parameters}
    with _as_raised():
        return made(pretrained=model, **{key: value for key, value in given.items() if key in known | wanted})


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


def _score(results: Mapping[str, Any], metrics: Sequence[str]) -> float | None:
    """The sum of the metrics, by the first of a task's filters; None where one of them is no number."""
    values = [next((v for key, v in results.items() if key.split(",")[0] == metric), None) for metric in metrics]
    numbers = [float(v) for v in values if isinstance(v, (int, float))]
    return sum(numbers) if values and len(numbers) == len(values) and all(map(math.isfinite, numbers)) else None


def _mark(sample: Mapping[str, Any], metrics: Sequence[str]) -> float | None:
    """The sample's own mark, as many tasks write it down: a number, or a number called score."""
    value = sample.get(metrics[0]) if len(metrics) == 1 else None
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, (int, float)) else None


def _text(answer: Any) -> str:
    """The text in the lists of responses that lmms-eval nests by request and by repeat."""
    while isinstance(answer, (list, tuple)) and answer:
        answer = answer[0]
    return answer if isinstance(answer, str) else str(answer)


def _costs(visits: Any) -> dict[Any, Line]:
    """By number of the document: its tokens and seconds, where the calls of the model could be told apart."""
    order = None if visits is None else visits.order
    if order is None or len(order) != len(visits.kept):
        return {}
    rows = zip(order, visits.fed, visits.lengths, visits.kept)
    bare = {"visual_tokens": [0, 0], "seconds": {}}  # a question without a picture
    return {
        key[2]: {**bare, "prompt_tokens": [fed, left]} if call is None else call.line() for key, fed, left, call in rows
    }
