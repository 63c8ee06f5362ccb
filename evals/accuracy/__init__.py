"""Accuracy of a vision-language model, dense and pruned, by question type, with its controls beside it.

A score alone says little. Beside every one stand: what the model scores without the image (zeroed, or swapped with
another question's), what the same number of random and of evenly spaced tokens score, and a bootstrap interval.
"""

from __future__ import annotations

import hashlib
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
from vtprune.evals.accuracy.plans import CONTROLS, Plan, both_positions, is_random, parse_method, plans
from vtprune.evals.accuracy.probe import CostProbe
from vtprune.evals.accuracy.rows import (
    NOTES,
    AccuracyReport,
    compare,
    interval,
    measured,
    packed,
    with_accuracy_kept,
)
from vtprune.evals.accuracy.rows import _rows as _rows
from vtprune.evals.report import Row, environment, resumed, share
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
SETTINGS = ("asked", "parameters", "device", "dtype", "batch", "seeds", "new_tokens")  # of a run that is gone on with


def evaluate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    methods: Iterable[str],
    keeps: Sequence[float | int] = KEEPS,
    *,
    seeds: int = 3,
    batch: int = 16,
    prompts: int = 16,
    new_tokens: int = 4,
    title: str = "Accuracy",
    progress: bool = True,
    workers: int = 1,
    skip: bool = False,
    finished: Callable[[AccuracyReport], object] | None = None,
    before: AccuracyReport | None = None,
) -> AccuracyReport:
    """Ask every question dense, blind and pruned with every method (controls added) at every keep.

    A method whose layers hold more tokens on average than `keep` says is asked once more, at the keep where their
    average is what was said; what officially renumbers position ids is asked in that way too.

    methods: names, optionally with options ("todre:objective=kcenter"). seeds: draws of a random method. prompts: on
    how many questions, asked one by one, the cost of a pass is measured. workers: processes that share the passes, each
    with a copy of the model and one thread; for models on the CPU. skip: leave out and note methods that this model
    cannot take, instead of raising. finished: is given the report so far whenever a method is done at one keep, so that
    an interrupted run need not lose it. before: such a report, to go on with; ValueError where it is of another model,
    other questions or other settings.

    Returns rows by (method, keep, capability) plus capability "mean", the plain mean over capabilities, which hold the
    costs too (see `CostProbe.cost`).
    """
    if workers < 1 or (workers > 1 and model.device.type != "cpu"):
        raise ValueError(f"workers={workers} on {model.device.type}: choose 1, or more for a model on the CPU")
    # A wrong name fails here, before any heavy work.
    todo = [Plan("dense", None, 1.0), *(Plan(f"blind-{how}", None, 1.0, blind=how) for how in ("zero", "shuffle"))]
    todo += plans(both_positions(methods), keeps, seeds)
    exam = Exam(model, processor, questions, batch, prompts=prompts)
    todo, left_out = _possible(exam, todo) if skip else (todo, [])
    todo, deep = _with_equal_shares(exam.probe, todo)
    asked = np.array([q.capability for q in exam.questions])
    names = list(dict.fromkeys(q.capability for q in questions))
    device, dtype = model.device.type, str(model.dtype).removeprefix("torch.")
    env = environment(device, dtype, batch, questions=len(exam), parameters=model.num_parameters())
    env["video"] = isinstance(questions[0].seen, Video)
    env |= {"asked": _digest(exam.questions), "seeds": seeds, "new_tokens": new_tokens}
    report = AccuracyReport(title, [], env, (*NOTES, *left_out, *deep), kinds=asked.tolist())
    if before is not None:
        report.environment = resumed(before.environment, env, SETTINGS, "eval.json")
        report.rows, report.answers = before.rows, before.answers
        there = {(one["method"], one["keep"]) for one in before.answers}
        todo = [plan for plan in todo if (plan.label, plan.keep) not in there]
    marks: list[tuple[Marks, Marks]] = []
    cost: Row = {}
    with tqdm(total=len(todo), unit="pass", disable=not progress) as bar:
        runs = map(partial(_sit, exam, new_tokens), todo) if workers == 1 else _shared(exam, new_tokens, todo, workers)
        for plan, after, (run, spent) in zip(todo, [*todo[1:], None], runs):
            marks.append(run)
            cost = cost or spent
            if after is None or (after.label, after.keep) != (plan.label, plan.keep):
                fresh = measured({(plan.label, plan.keep): marks}, asked, names)
                fresh[-1].update(cost, equal_share=plan.equal)
                report.rows = with_accuracy_kept([*report.rows, *fresh])
                report.answers = [*report.answers, _answers(plan, marks)]
                compare(report.rows, report.answers, asked, names)
                marks, cost = [], {}
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


def _with_equal_shares(probe: CostProbe, todo: Sequence[Plan]) -> tuple[list[Plan], list[str]]:
    """The passes and, behind each whose average share is not its keep, one at which it is; a note where there is none.

    A pass that is planned already, with the keep that was found, is only marked.
    """
    made: dict[tuple[str, float | int, int | None], Plan] = {(p.label, p.keep, p.seed): p for p in todo}
    shares = {key: probe.share(plan) for key, plan in made.items() if plan.method and plan.label not in CONTROLS}
    deep: dict[float | int, list[str]] = {}
    order: list[tuple[str, float | int, int | None]] = []
    for plan in todo:
        order.append((plan.label, plan.keep, plan.seed))
        if plan.method is None or plan.label in CONTROLS:
            continue
        planned = [p for key, p in made.items() if key in shares and key[::2] == (plan.label, plan.seed)]
        found = probe.equal(plan, {p.keep: shares[p.label, p.keep, p.seed] for p in planned})
        if isinstance(found, float):
            deep.setdefault(plan.keep, []).append(f"{plan.label} ({100 * found:.0f} % at least)")
        elif found is not None:
            key = found.label, found.keep, found.seed
            order += [] if key in made else [key]
            made[key] = found
    notes = [
        f"Out of reach: an average share of {share(keep)} over the LLM's layers by {', '.join(names)}."
        for keep, names in deep.items()
    ]
    return [made[key] for key in order], notes


def _sit(exam: Exam, new_tokens: int, plan: Plan) -> tuple[tuple[Marks, Marks], Row]:
    """One pass, and what it costs; of several seeds the first one tells."""
    from vtprune.evals.toys.questions import blind

    cost = exam.probe.cost(plan) if not plan.seed else {}
    if plan.blind is not None:
        exam = Exam(exam.model, exam.processor, blind(exam.questions, plan.blind), exam.batch)
    with plan.applied(exam.model):
        return exam.run(plan.needs_tower, new_tokens), cost


def _answers(plan: Plan, marks: Sequence[tuple[Marks, Marks]]) -> Row:
    return {"method": plan.label, "keep": plan.keep, "right": packed(marks)}


def _digest(questions: Sequence[Question]) -> str:
    """Tells these questions, with what they are about, from others."""
    found = hashlib.sha1()
    for q in questions:
        seen: Any = q.seen
        pixels = seen.frames if isinstance(seen, Video) else seen
        found.update(f"{q.capability}\n{q.prompt}\n{q.answer}\n".encode() + pixels.tobytes())
    return found.hexdigest()[:16]


_exam: Exam | None = None  # of this worker process


def _enter(parts: tuple[Any, ...], processor: Any, questions: Sequence[Question], batch: int, prompts: int) -> None:
    """Build the model anew: transformers hangs closures on a used one, which cannot be sent to another process."""
    global _exam
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process, and the first one tells the others
    torch.set_num_threads(1)
    kind, config, generation, attention, dtype, weights = parts
    model = kind._from_config(config, attn_implementation=attention, dtype=dtype)
    model.load_state_dict(weights)
    model.generation_config = generation
    _exam = Exam(model.eval(), processor, questions, batch, prompts=prompts)


def _sit_here(new_tokens: int, plan: Plan) -> tuple[tuple[Marks, Marks], Row]:
    assert _exam is not None
    return _sit(_exam, new_tokens, plan)


def _shared(exam: Exam, new_tokens: int, todo: list[Plan], workers: int) -> Iterator[tuple[tuple[Marks, Marks], Row]]:
    """The passes in order, made by several processes."""
    m = exam.model
    parts = type(m), m.config, m.generation_config, m.config._attn_implementation, m.dtype, m.state_dict()
    arguments = (parts, exam.processor, exam.questions, exam.batch, exam.prompts)
    with multiprocessing.get_context("spawn").Pool(workers, _enter, arguments) as pool:
        yield from pool.imap(partial(_sit_here, new_tokens), todo)
