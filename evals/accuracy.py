"""Accuracy of a vision-language model, dense and pruned, by question type, with its controls beside it.

A score alone says little. Beside every one stand: what the model scores without the image (zeroed, or swapped with
another question's), what the same number of random and of evenly spaced tokens score, and a bootstrap interval.
"""

from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import re
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import vtprune
from vtprune.evals.marking import mark
from vtprune.evals.report import Report, Row, environment
from vtprune.evals.video import Video
from vtprune.types import Method

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.evals.tiny import Visible as Question

CONTROLS = ("random", "uniform")
KEEPS = (0.5, 0.25, 0.11, 0.05)
VIDEO_KEEPS = (0.25, 0.15, 0.1)
Marks = NDArray[np.float64]


class Exam:
    """Questions made ready for one model: prompts rendered, images processed, image features kept where they fit.

    The features do not depend on what is pruned behind them. They are computed once and handed to `generate` as
    `mm_encoder_outputs`, with the grids beside them, unless a stage acts inside the tower or reads a signal from it (or
    the model cannot take them).
    """

    def __init__(
        self, model: Any, processor: Any, questions: Sequence[Question], batch: int = 16, memory: int = 2 << 30
    ) -> None:
        """memory: bytes of prepared inputs to hold; a larger exam prepares its batches anew in every pass."""
        if not questions:
            raise ValueError("no questions: raise --limit or name a capability that exists")
        self.model, self.processor, self.batch = model, processor, batch
        # Prompts of one length need no padding; a stable sort keeps runs comparable.
        self.questions = sorted(questions, key=lambda q: len(q.prompt.split()))
        size = sum(self._tensor_bytes(self._prepare(self.questions[:1])).values())
        self._held: list[dict[str, Any]] | None = [] if size * len(questions) <= memory else None
        self._features: list[Any] = []

    def __len__(self) -> int:
        return len(self.questions)

    def answers(self, needs_tower: bool = False, new_tokens: int = 4) -> list[tuple[str, bool]]:
        """Greedy `generate` on every question: (text, whether the end token came), in `self.questions` order."""
        said: list[tuple[str, bool]] = []
        ends = _end_tokens(self.model)
        for i, inputs in enumerate(self._batches()):
            if not needs_tower:
                inputs = self._with_features(i, inputs)
            with torch.inference_mode():
                ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, num_beams=1)
            fresh = ids[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(fresh, skip_special_tokens=True)
            said += [(text, bool(ends.intersection(row))) for text, row in zip(texts, fresh.tolist())]
        return said

    def run(self, needs_tower: bool = False, new_tokens: int = 4) -> tuple[Marks, Marks]:
        """(answer right, stopped right) of every question, 0. or 1. each."""
        said = self.answers(needs_tower, new_tokens)
        marks = [mark(text, ended, q.answer) for (text, ended), q in zip(said, self.questions)]
        right, stopped = np.array(marks, dtype=np.float64).T
        return right, stopped

    def _batches(self) -> Iterator[dict[str, Any]]:
        if self._held:
            yield from self._held
            return
        for start in range(0, len(self.questions), self.batch):
            inputs = self._prepare(self.questions[start : start + self.batch])
            if self._held is not None:
                self._held.append(inputs)
            yield inputs

    def _prepare(self, questions: Sequence[Question]) -> dict[str, Any]:
        return prepare(self.model, self.processor, [q.prompt for q in questions], [q.seen for q in questions])

    def _with_features(self, i: int, inputs: dict[str, Any]) -> dict[str, Any]:
        modality = "video" if isinstance(self.questions[0].seen, Video) else "image"
        encode = getattr(self.model.base_model, f"get_{modality}_features")
        takes = inspect.signature(encode).parameters
        if self._held is None or "mm_encoder_outputs" not in inspect.signature(self.model.forward).parameters:
            return inputs
        if i == len(self._features):
            with torch.inference_mode():
                out = encode(**{k: v for k, v in inputs.items() if k in takes}, return_dict=True)
            slim = {k: v for k, v in out.items() if k in ("pooler_output", "deepstack_features")}
            self._features.append(type(out)(**slim))
        # Sizes and grids stay: M-RoPE counts positions from them, and rules about rows and frames read them.
        rest = {k: v for k, v in inputs.items() if not (k in takes and k.startswith("pixel_values"))}
        return {**rest, "mm_encoder_outputs": {modality: self._features[i]}}

    @staticmethod
    def _tensor_bytes(inputs: dict[str, Any]) -> dict[str, int]:
        return {k: v.nbytes for k, v in inputs.items() if isinstance(v, torch.Tensor)}


def prepare(model: Any, processor: Any, prompts: Sequence[str], seen: Sequence[Image.Image | Video]) -> dict[str, Any]:
    """What `generate` takes for a batch of prompts, each about one picture or one video (all of a kind).

    Padded on the left, on the model's device and in its dtype.
    """
    return dict(process(processor, prompts, seen).to(model.device, dtype=model.dtype))


def process(processor: Any, prompts: Sequence[str], seen: Sequence[Image.Image | Video]) -> Any:
    """What the processor makes of such a batch, on the host, pixels in float32."""
    processor.tokenizer.padding_side = "left"
    video = isinstance(seen[0], Video)
    media: dict[str, Any] = {"images": [[image] for image in seen]}
    if video:
        clips = cast(Sequence[Video], seen)
        media = {"videos": [[v.frames] for v in clips], "video_metadata": [[v.metadata] for v in clips]}
        media["do_sample_frames"] = False  # they have been chosen
    texts = [render(processor, prompt, video) for prompt in prompts]
    return processor(text=texts, **media, padding=True, return_tensors="pt", add_special_tokens=False)


def render(processor: Any, prompt: str, video: bool = False) -> str:
    """The text of one turn: through the chat template if the processor has one, else as the embedded models read it."""
    question = words_of(prompt)
    if getattr(processor, "chat_template", None):
        content = [
            {"type": "video" if video else "image"},
            {"type": "text", "text": f"{question}\nAnswer with one or two words."},
        ]
        turn = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    start = processor.tokenizer.bos_token or ""
    place = f"<|vision_start|> {processor.video_token} <|vision_end|>" if video else processor.image_token
    return f"{start} {place} {question} answer:".strip()


def words_of(prompt: str) -> str:
    """The question alone, without the embedded models' frame, as `<s> <image> ... answer:`."""
    return re.split(r"<image>|<\|vision_end\|>", prompt)[-1].removesuffix("answer:").strip()


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


@dataclass(frozen=True)
class Plan:
    """One pass over the questions: a label for the table, the method and how much it keeps (no method: dense).

    blind: how the images are hidden ("zero" or "shuffle"), None if they are not.
    """

    label: str
    method: Method | None
    keep: float | int
    seed: int | None = None
    blind: str | None = None

    @property
    def needs_tower(self) -> bool:
        """Whether the pass must run the vision tower: a stage acts inside it, or reads a signal from it."""
        stages = self.method.stages(self.keep, depth=0) if self.method else []
        return any(isinstance(s.where, tuple) or (s.where == "llm" and s.method.needs) for s in stages)

    def applied(self, model: Any) -> AbstractContextManager[Any]:
        """The model, patched inside a `with` block."""
        return vtprune.patch(model, self.method, keep=self.keep) if self.method else nullcontext()


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """'todre:objective=kcenter,pivot=center' -> ('todre', {...}); values are read as int, float, bool or text."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method {text!r}: {item!r} is not an option; write name:option=value,option=value")
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def plans(methods: Iterable[str], keeps: Sequence[float | int], seeds: int = 3) -> list[Plan]:
    """Every method at every keep, the controls first; a method with a `seed` option is run with `seeds` seeds."""
    made: list[Plan] = []
    for text in dict.fromkeys([*CONTROLS, *methods]):
        name, options = parse_method(text)
        method = vtprune.create(name, **options)
        draws: list[int | None] = list(range(seeds)) if is_random(method) and "seed" not in options else [None]
        for keep in keeps:
            for seed in draws:
                drawn = method if seed is None else dataclasses.replace(method, seed=seed)  # type: ignore[type-var]
                made.append(Plan(text, drawn, keep, seed))
    return made


def is_random(method: Method) -> bool:
    """Whether the result depends on the seed: another seed is asked and another answer comes."""
    if not any(f.name == "seed" for f in dataclasses.fields(method)):  # type: ignore[arg-type]
        return False
    generator = torch.Generator().manual_seed(0)
    signals = {s: torch.rand(64, generator=generator) for s in method.needs}
    v = vtprune.Visual(torch.randn(64, 8, generator=generator), budget=16, grid=(1, 8, 8), signals=signals)
    first, second = (dataclasses.replace(method, seed=s)(v).idx for s in (0, 1))  # type: ignore[type-var]
    return not torch.equal(first, second)


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
                fresh = _measured({(plan.label, plan.keep): marks}, asked, names)
                report.rows, marks = _with_accuracy_kept([*report.rows, *fresh]), []
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
    from vtprune.evals.tiny import blind

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


NOTES = (
    "answer right: generation begins with the answer; stopped right: it is exactly the answer, then the end token.",
    "blind: the dense model with the image (or clip) zeroed, or shuffled between questions.",
    "accuracy kept = (pruned - blind) / (full - blind), with the better of the two blind scores.",
    "± half of the 95 % bootstrap interval over questions (scipy.stats.bootstrap, percentile, 2000 resamples; "
    "0 where every resample is the same, as when all answers are right).",
)


def _rows(
    marks: dict[tuple[str, float | int], list[tuple[Marks, Marks]]], asked: NDArray[np.str_], names: list[str]
) -> list[Row]:
    return _with_accuracy_kept(_measured(marks, asked, names))


def _measured(
    marks: dict[tuple[str, float | int], list[tuple[Marks, Marks]]], asked: NDArray[np.str_], names: list[str]
) -> list[Row]:
    """A row for every method, keep and capability, and one for their mean."""
    rows = []
    for (method, keep), runs in marks.items():
        right, stopped = (np.mean([run[i] for run in runs], axis=0) for i in (0, 1))
        for name in [*names, "mean"]:
            groups = [right[asked == c] for c in (names if name == "mean" else [name])]
            halted = [stopped[asked == c].mean() for c in (names if name == "mean" else [name])]
            low, high = interval(groups)
            row: Row = {
                "method": method,
                "keep": keep,
                "capability": name,
                "n": sum(len(g) for g in groups),
                "right": float(np.mean([g.mean() for g in groups])),
                "low": low,
                "high": high,
                "stopped": float(np.mean(halted)),
            }
            if len(runs) > 1:
                each = [[r[asked == c].mean() for c in names if name in ("mean", c)] for r, _ in runs]
                row["right_by_seed"] = [float(np.mean(values)) for values in each]
            rows.append(row)
    return rows


def _with_accuracy_kept(rows: list[Row]) -> list[Row]:
    """The rows beside the dense and blind scores, where these are known yet: a run may have been interrupted."""
    known = {(row["method"], row["capability"]): row["right"] for row in rows if row["keep"] == 1.0}
    for row in rows:
        name = row["capability"]
        zero, shuffled, full = (known.get((who, name)) for who in ("blind-zero", "blind-shuffle", "dense"))
        row.update(blind_zero=zero, blind_shuffle=shuffled, full=full, accuracy_kept=None)
        if zero is None or shuffled is None or full is None:
            continue
        blind = max(zero, shuffled)
        seeing = full - blind
        row["accuracy_kept"] = (row["right"] - blind) / seeing if seeing > 0.05 else None
    return rows


def interval(groups: Sequence[Marks], resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over groups of the mean over questions."""
    from scipy.stats import bootstrap

    if all(len(g) < 2 or g.min() == g.max() for g in groups):
        centre = float(np.mean([g.mean() for g in groups]))
        return centre, centre
    usable = [g if len(g) > 1 else np.repeat(g, 2) for g in groups]

    def mean(*samples: Marks, axis: int = -1) -> Marks:
        return np.mean([s.mean(axis=axis) for s in samples], axis=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one constant group among varying ones is no problem
        found = bootstrap(
            usable, mean, n_resamples=resamples, vectorized=True, method="percentile", rng=np.random.default_rng(0)
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


class AccuracyReport(Report):
    """Accuracy by method, keep and capability."""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        names = list(dict.fromkeys(row["capability"] for row in self.rows))
        header = ["method", "kept", *names, "stopped", "acc. kept"]
        lines: dict[tuple[str, Any], dict[str, Row]] = {}
        for row in self.rows:
            lines.setdefault((row["method"], row["keep"]), {})[row["capability"]] = row
        return header, [self._line(method, keep, by, names) for (method, keep), by in lines.items()]

    @staticmethod
    def _line(method: str, keep: float | int, by: dict[str, Row], names: list[str]) -> list[str]:
        def cell(row: Row) -> str:
            return f"{100 * row['right']:.1f}±{50 * (row['high'] - row['low']):.0f}"

        mean = by["mean"]
        kept = "–" if mean["accuracy_kept"] is None else f"{100 * mean['accuracy_kept']:.1f}"
        if method.startswith("blind"):
            kept = "–"
        return [method, share(keep), *(cell(by[n]) for n in names), f"{100 * mean['stopped']:.1f}", kept]

    def plot(self, path: str | Path) -> Path:
        """Accuracy against kept visual tokens: the mean large, every capability small beside it."""
        from vtprune.evals.figures import pareto

        return pareto(self.rows, self.title, path)


def share(keep: float | int) -> str:
    """0.25 -> '25 %', 64 -> '64'."""
    return f"{100 * keep:.3g} %" if isinstance(keep, float) else str(keep)
