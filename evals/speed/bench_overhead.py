"""What pruning itself costs: `vtprune bench --overhead`.

Overhead is what a patched prefill takes beyond the stock model on as many tokens (`free_cuts`): the hooks, the signals,
the selection, the cut. All forms run in turns in one process and are told by CPU time of one thread, on a GPU by the
clock. A value is the median over rounds of differences within a round; beside it stands the difference of the least
times of all rounds, which says more on a machine whose speed changes from second to second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

import vtprune
from vtprune.evals.report import Row, check_same, environment, resumed, share
from vtprune.evals.speed import geometries
from vtprune.evals.speed.bench import Subject
from vtprune.evals.speed.bench_parts import PartsReport
from vtprune.evals.speed.bench_video import segmentation
from vtprune.evals.speed.free_cuts import FreeCuts, Lengths, continued, lengths_of, plain_cache
from vtprune.evals.speed.geometries import TEXT_TOKENS
from vtprune.evals.speed.growth import NOTE, GrowthReport, growth
from vtprune.evals.speed.limits import SELECTION_SHARE
from vtprune.evals.speed.meter import one_thread, spent
from vtprune.evals.speed.plain_loops import plain_loops
from vtprune.evals.speed.tables import BenchReport
from vtprune.model_adapters.cache_argument import NAME
from vtprune.model_adapters.tower_layout import Modality
from vtprune.parsing import parse_method
from vtprune.types import VtpruneError

if TYPE_CHECKING:
    from rich.table import Table
    from typing_extensions import Self

GRIDS = (24, 48)  # patches of a side: 576 and 2,304 visual tokens
KEEP = 0.11
TURNS = 2  # pruned and limit in each round, the least of which counts
TEXTS = 16  # calls without images in each round, likewise
FILE = "overhead.json"
# What has to be as it was where a run is gone on with.
SETTINGS = ("cpu", "gpu", "device", "dtype", "batch", "versions", "shrunk", "layers", "keep", "repeats", "steps")
NOTES = (
    "overhead: a patched prefill minus the stock model on as many tokens in every layer of tower and LLM, which tokens "
    "chosen for nothing; of dense: as a share of the dense prefill. keep=1.0: a patched prefill that keeps all tokens "
    "against the dense one. decode: a step over that of the unpatched model on an equal cache. text: a call without "
    "images, patched minus unpatched. ! marks an overhead above 2 %.",
    "Times are CPU time of one thread, on a GPU those of the clock; medians over rounds of differences within a round, "
    "and behind the stroke the difference of the least times of all rounds.",
)


def small_llava(grid: int, device: str, dtype: torch.dtype, batch: int = 1) -> Subject:
    """A stock LLaVA of random weights on images of grid x grid patches: CLIP 128 x 6, LLaMA 512 x 12."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    side = 14 * grid
    tower = CLIPVisionConfig(
        image_size=side, patch_size=14, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8,
        max_position_embeddings=8192,
    )  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=1999)
    model: Any = LlavaForConditionalGeneration(config)
    model = model.to(device, dtype).eval()
    pixels = {"pixel_values": torch.randn(batch, 3, side, side).to(device, dtype)}
    return Subject(f"llava-small-{grid**2}", model, geometries.prompt(model, pixels, batch))


@dataclass
class Rounds:
    """Seconds of one method, a value a round.

    full: at keep=1.0. step, text: a decode step and a call without images; plain_step, plain_text: of the unpatched
    model.
    """

    dense: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)
    pruned: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    plain_step: list[float] = field(default_factory=list)
    text: list[float] = field(default_factory=list)
    plain_text: list[float] = field(default_factory=list)


def overhead(
    subjects: Sequence[Callable[[], Subject]],
    methods: Sequence[str],
    keep: float | int = KEEP,
    *,
    repeats: int = 5,
    steps: int = 16,
    grow: Sequence[str] = (),
    loops: bool = False,
    progress: bool = True,
    finished: Callable[[OverheadReport], object] = lambda _: None,
    before: OverheadReport | None = None,
) -> OverheadReport:
    """A row for each model and method; the methods that a model refuses stand in `refused` with the reason.

    subjects: what makes each model when its turn comes, so that one at a time is in memory. keep: below 1. grow: the
    methods whose growth is measured (`growth`), on Linux. loops: also the selections against plain loops. finished: is
    given the report so far whenever a method is done. before: such a report, to go on with; ValueError where it is of
    another machine or other settings.
    """
    report = before or OverheadReport(f"What pruning costs, {share(keep)} kept", [])
    settings: Row = {"keep": keep, "repeats": repeats, "steps": steps}
    for make in subjects:
        runs = len(methods) * (repeats + 1)
        with one_thread(), torch.inference_mode(), tqdm(total=runs, desc="model", disable=not progress) as bar:
            what = make()
            there = report.enter(what, settings)
            for name in methods:
                bar.set_description(f"{what.name}: {name}")
                if name in there:
                    bar.update(repeats + 1)
                    continue
                try:
                    forms = Forms(what, name, keep, steps)
                except (VtpruneError, ValueError) as error:
                    report.refuse(what, name, error)
                    finished(report)
                    bar.update(repeats + 1)
                    continue
                bar.update()
                rounds = Rounds()
                for _ in range(repeats):
                    forms.measure(rounds)
                    bar.update()
                report.rows.append(_row(what, name, keep, forms.lengths, rounds))
                finished(report)
        del what
    grown = {row["method"] for row in report.growth}
    for name in grow if sys.platform == "linux" else ():
        if name not in grown:
            report.growth += growth(name, keep, progress=progress)
            finished(report)
    if loops and not report.loops:
        report.loops = [*plain_loops(progress=progress), segmentation()]
        finished(report)
    return report


class Forms:
    """All forms in which one method is measured on one model. Raises what `vtprune.patch` and the limit raise."""

    def __init__(self, what: Subject, method: str, keep: float | int, steps: int) -> None:
        self.what, self.keep, self.steps = what, keep, steps
        name, options = parse_method(method)
        self.method = vtprune.create(name, **options)
        model, ids = what.model, what.inputs["input_ids"]
        modality = cast(Modality, what.modality)
        self.words = ids[:, : TEXT_TOKENS // 3]
        self.token = ids[:, -1:]
        with vtprune.patch(model, self.method, keep=keep) as handle:
            self.lengths = lengths_of(handle, model, modality, self.prefill)
        self.limit = FreeCuts(model, modality, self.lengths)
        with self.limit:
            self.prefill()

    def prefill(self) -> Any:
        """The prompt, up to the logits of its last token."""
        return self.what.model(**self.what.inputs, use_cache=True, logits_to_keep=1)

    def measure(self, into: Rounds) -> None:
        """One round: dense, keep=1.0, pruned and its limit, decode steps, calls of text alone."""
        model, device = self.what.model, self.what.model.device
        into.dense.append(spent(self.prefill, device))
        with vtprune.patch(model, self.method, keep=1.0):
            into.full.append(spent(self.prefill, device))
        pruned, limit = [], []
        for turn in range(TURNS):
            with vtprune.patch(model, self.method, keep=self.keep):
                took, cache = self._timed_prefill()
                pruned.append(took)
                if turn == TURNS - 1:
                    plain = plain_cache(cache, model.config.get_text_config())
                    into.step.append(self._step(cache))
                    into.text.append(self._text())
            if turn == TURNS - 1:
                into.plain_step.append(self._step(plain))
                into.plain_text.append(self._text())
            with self.limit:
                limit.append(spent(self.prefill, device))
        into.pruned.append(min(pruned))
        into.limit.append(min(limit))

    def _timed_prefill(self) -> tuple[float, Any]:
        """Seconds of one prefill, and the cache that it filled."""
        out: list[Any] = []
        took = spent(lambda: out.append(self.prefill()), self.what.model.device)
        return took, getattr(out[0], NAME)

    def _step(self, cache: Any) -> float:
        """Seconds of a decode step on this cache, the least of several behind two that do not count."""

        def step() -> None:
            self.what.model(input_ids=self.token, **continued(cache))

        return min([spent(step, self.what.model.device) for _ in range(2 + self.steps)][2:])

    def _text(self) -> float:
        """Seconds of a call without images, the least of several."""

        def call() -> None:
            self.what.model(input_ids=self.words, use_cache=True)

        return min(spent(call, self.what.model.device) for _ in range(TEXTS))


def _row(what: Subject, method: str, keep: float | int, lengths: Lengths, seen: Rounds) -> Row:
    text = what.tokens - what.visual
    dense, least = median(seen.dense), min(seen.dense)
    over = _over(seen.pruned, seen.limit)
    of_dense = over / dense
    return {
        "geometry": what.name,
        "visual": what.visual,
        "method": method,
        "keep": keep,
        "kept_by_layer": [n - text for n in lengths.llm],
        "tower_lengths": lengths.tower,
        "dense_ms": 1e3 * dense,
        "pruned_ms": 1e3 * median(seen.pruned),
        "limit_ms": 1e3 * median(seen.limit),
        "overhead_ms": 1e3 * over,
        "overhead": of_dense,
        "affordable": of_dense <= SELECTION_SHARE,
        "full": median(full / one - 1 for full, one in zip(seen.full, seen.dense)),
        "decode_us": 1e6 * _over(seen.step, seen.plain_step),
        "decode": median(ours / plain - 1 for ours, plain in zip(seen.step, seen.plain_step)),
        "text_us": 1e6 * _over(seen.text, seen.plain_text),
        "least": {
            "overhead": (min(seen.pruned) - min(seen.limit)) / least,
            "full": min(seen.full) / least - 1,
            "decode_us": 1e6 * (min(seen.step) - min(seen.plain_step)),
            "decode": min(seen.step) / min(seen.plain_step) - 1,
            "text_us": 1e6 * (min(seen.text) - min(seen.plain_text)),
        },
        "rounds_ms": {name: [1e3 * seconds for seconds in values] for name, values in vars(seen).items()},
    }


def _over(ours: Sequence[float], plain: Sequence[float]) -> float:
    return median(one - other for one, other in zip(ours, plain))


@dataclass
class OverheadReport(BenchReport):
    """A row for each model and method. refused: the methods that a model does not take, with the reason.

    growth: a row for each method before the LLM and clip. loops: a row for each comparison with a plain loop.
    """

    refused: list[Row] = field(default_factory=list)
    growth: list[Row] = field(default_factory=list)
    loops: list[Row] = field(default_factory=list)

    kind = "bench-overhead"

    @property
    def body(self) -> Row:
        return super().body | {"refused": self.refused, "growth": self.growth, "loops": self.loops}

    @classmethod
    def of_body(cls, body: Row) -> Self:
        report = super().of_body(body)
        report.refused, report.growth, report.loops = body["refused"], body["growth"], body["loops"]
        return report

    def enter(self, what: Subject, settings: Row) -> set[str]:
        """Begin with a model, or go on with it; the methods that are done with there."""
        dtype = str(what.model.dtype).removeprefix("torch.")
        layers = what.model.config.get_text_config().num_hidden_layers
        shape = {"shrunk": what.shrunk or None, "layers": layers}
        now = environment(
            what.model.device.type, dtype, what.batch, geometry="overhead", geometries=[], **shape, **settings
        )
        if self.environment:
            self.environment = resumed(self.environment, now, SETTINGS, FILE)
        else:
            self.environment, self.notes = now, (*filter(None, (what.shrunk,)), *NOTES)
        if what.name not in self.environment["geometries"]:
            self.environment["geometries"].append(what.name)
        rows = [row for row in self.rows if row["geometry"] == what.name]
        for row in rows:
            check_same(row, {"visual": what.visual}, ("visual",), FILE)
        return {row["method"] for row in [*rows, *(row for row in self.refused if row["geometry"] == what.name)]}

    def refuse(self, what: Subject, method: str, error: Exception) -> None:
        """Write down that a model does not take a method, and why."""
        reason = " ".join(str(error).split())
        self.refused.append({"geometry": what.name, "method": method, "reason": reason})
        self.notes = (*self.notes, f"Not run: {method} on {what.name}: {reason}")

    def tables(self) -> list[Table]:
        tables = super().tables()
        if self.growth:
            tables.append(GrowthReport("How the selection grows with the clip", self.growth, {}, (NOTE,)).to_table())
        if self.loops:
            tables.append(PartsReport("Selections against plain loops", self.loops).to_table())
        return tables

    def cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["method", "tokens", "dense ms", "pruned ms", "limit ms", "overhead ms", "of dense", "keep=1.0"]
        header += ["decode us", "decode", "text us"]
        return header, [_line(row) for row in self.rows]

    def plot(self, path: str | Path) -> Path:
        """Bars of overhead by method, a panel a model."""
        from vtprune.evals.figures import overhead as bars

        return bars(self.rows, self.title, path)

    def file_name(self) -> str:
        """Of every run the same: a run that stopped goes on there."""
        return FILE


def _line(row: Row) -> list[str]:
    least = row["least"]
    return [
        row["method"],
        str(row["visual"]),
        *(f"{row[name]:.1f}" for name in ("dense_ms", "pruned_ms", "limit_ms", "overhead_ms")),
        f"{100 * row['overhead']:.1f} / {100 * least['overhead']:.1f} %" + ("" if row["affordable"] else " !"),
        f"{100 * row['full']:+.1f} / {100 * least['full']:+.1f} %",
        f"{row['decode_us']:.0f} / {least['decode_us']:.0f}",
        f"{100 * row['decode']:+.1f} / {100 * least['decode']:+.1f} %",
        f"{row['text_us']:.0f} / {least['text_us']:.0f}",
    ]
