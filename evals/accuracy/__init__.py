"""Accuracy of a vision-language model, dense and pruned, by question type, with its controls beside it.

A score alone says little. Beside every one stand: what the model scores without the image (zeroed, or swapped with
another question's), what the same number of random and of evenly spaced tokens score, and a bootstrap interval.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import vtprune
from vtprune.evals.accuracy.exam import Exam, Marks, prepare, process, render, words_of
from vtprune.evals.accuracy.marking import mark
from vtprune.evals.accuracy.plans import CONTROLS, Plan, is_random, parse_method, plans
from vtprune.evals.accuracy.rows import NOTES, AccuracyReport, interval, measured, with_accuracy_kept
from vtprune.evals.accuracy.rows import _rows as _rows
from vtprune.evals.report import environment, share
from vtprune.evals.video import Video

if TYPE_CHECKING:
    from vtprune.evals.toys.questions import Visible as Question

__all__ = [
    "CONTROLS",
    "KEEPS",
    "NOTES",
    "VIDEO_KEEPS",
    "AccuracyReport",
    "Exam",
    "Marks",
    "Plan",
    "evaluate",
    "interval",
    "is_random",
    "mark",
    "parse_method",
    "plans",
    "prepare",
    "process",
    "render",
    "share",
    "words_of",
]

KEEPS = (0.5, 0.25, 0.11, 0.05)
VIDEO_KEEPS = (0.25, 0.15, 0.1)


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    methods: Iterable[str],
    keeps: Sequence[float | int] = KEEPS,
    *,
    seeds: int = 3,
    batch: int = 16,
    new_tokens: int = 4,
    title: str = "Accuracy",
    progress: bool = True,
    workers: int = 1,
    skip: bool = False,
    finished: Callable[[AccuracyReport], None] | None = None,
) -> AccuracyReport:
    """Ask every question dense, blind and pruned with every method (controls added) at every keep.

    methods: names, optionally with options ("todre:objective=kcenter"). seeds: draws of a random method. workers:
    processes that share the passes, each with a copy of the model and one thread; for models on the CPU. skip: leave
    out and note methods that this model cannot take, instead of raising. finished: is given the report so far whenever
    a method is done at one keep, so that an interrupted run need not lose it.
    Returns rows by (method, keep, capability) plus capability "mean", the plain mean over capabilities.
    """
    if workers < 1 or (workers > 1 and model.device.type != "cpu"):
        raise ValueError(f"workers={workers} on {model.device.type}: choose 1, or more for a model on the CPU")
    # A wrong name fails here, before any heavy work.
    todo = [Plan("dense", None, 1.0), *(Plan(f"blind-{how}", None, 1.0, blind=how) for how in ("zero", "shuffle"))]
    todo += plans(methods, keeps, seeds)
    exam = Exam(model, processor, questions, batch)
    todo, left_out = _possible(exam, todo) if skip else (todo, [])
    asked = np.array([q.capability for q in exam.questions])
    names = list(dict.fromkeys(q.capability for q in questions))
    device, dtype = model.device.type, str(model.dtype).removeprefix("torch.")
    env = environment(device, dtype, batch, questions=len(exam), parameters=model.num_parameters())
    env["video"] = isinstance(questions[0].seen, Video)
    report = AccuracyReport(title, [], env, (*NOTES, *left_out))
    marks: list[tuple[Marks, Marks]] = []
    with tqdm(total=len(todo), unit="pass", disable=not progress) as bar:
        runs = map(partial(_sit, exam, new_tokens), todo) if workers == 1 else _shared(exam, new_tokens, todo, workers)
        for plan, after, run in zip(todo, [*todo[1:], None], runs):
            marks.append(run)
            if after is None or (after.label, after.keep) != (plan.label, plan.keep):
                fresh = measured({(plan.label, plan.keep): marks}, asked, names)
                report.rows, marks = with_accuracy_kept([*report.rows, *fresh]), []
                if finished is not None:
                    finished(report)
            bar.set_description(f"{plan.label} at {plan.keep}")
            bar.update()
    return report


def _possible(exam: Exam, todo: list[Plan]) -> tuple[list[Plan], list[str]]:
    """The passes that this model can take, found out with one question each, and a note on every other method."""
    first = exam.questions[0]
    one = prepare(exam.model, exam.processor, [first.prompt], [first.seen])
    possible: list[Plan] = []
    reasons: dict[str, str] = {}
    for plan in todo:
        try:
            with plan.applied(exam.model), torch.inference_mode():
                exam.model(**one)
            possible.append(plan)
        except (vtprune.VtpruneError, ValueError) as error:
            reasons.setdefault(plan.label, f"Not run: {plan.label}: {error}")
    return possible, list(reasons.values())


def _sit(exam: Exam, new_tokens: int, plan: Plan) -> tuple[Marks, Marks]:
    """One pass."""
    from vtprune.evals.toys.questions import blind

    if plan.blind is not None:
        exam = Exam(exam.model, exam.processor, blind(exam.questions, plan.blind), exam.batch)
    with plan.applied(exam.model):
        return exam.run(plan.needs_tower, new_tokens)


_exam: Exam | None = None  # of this worker process


def _enter(parts: tuple[Any, ...], processor: Any, questions: Sequence[Question], batch: int) -> None:
    """Build the model anew: transformers hangs closures on a used one, which cannot be sent to another process."""
    global _exam
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process, and the first one tells the others
    torch.set_num_threads(1)
    kind, config, generation, attention, dtype, weights = parts
    model = kind._from_config(config, attn_implementation=attention, dtype=dtype)
    model.load_state_dict(weights)
    model.generation_config = generation
    _exam = Exam(model.eval(), processor, questions, batch)


def _sit_here(new_tokens: int, plan: Plan) -> tuple[Marks, Marks]:
    assert _exam is not None
    return _sit(_exam, new_tokens, plan)


def _shared(exam: Exam, new_tokens: int, todo: list[Plan], workers: int) -> Iterator[tuple[Marks, Marks]]:
    """The passes in order, made by several processes."""
    m = exam.model
    parts = type(m), m.config, m.generation_config, m.config._attn_implementation, m.dtype, m.state_dict()
    arguments = (parts, exam.processor, exam.questions, exam.batch)
    with multiprocessing.get_context("spawn").Pool(workers, _enter, arguments) as pool:
        yield from pool.imap(partial(_sit_here, new_tokens), todo)
