"""Speed and memory, dense against pruned, interleaved in one run, and the share of what is physically possible.

Two limits stand beside every speed-up. Roofline: every kernel at the measured peak of the processor. Stack: this very
software with an LLM prefill that costs no more than a forward pass of one token, which is what launches and Python
leave. What the numbers mean: the notes in `tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import vtprune
from vtprune.evals.report import environment
from vtprune.evals.speed import geometries
from vtprune.evals.speed.flops import Card, TextCost, counted, peak
from vtprune.evals.speed.limits import Limits, Samples, Variant, row_of
from vtprune.evals.speed.meter import Allocated, Phases, now, seconds
from vtprune.evals.speed.prefill import MODES, Bucketed
from vtprune.evals.speed.tables import BenchReport, notes_of
from vtprune.model_adapters.cache_argument import NAME
from vtprune.parsing import parse_method
from vtprune.types import VtpruneError

KEEPS = (0.33, 0.22, 0.11)
METHODS = ("divprune", "random", "fastv")
PIXELS = ("pixel_values", "pixel_values_videos", "image_sizes", "image_grid_thw", "video_grid_thw")


@dataclass(frozen=True)
class Subject:
    """A model and one batch of equal samples to run it on."""

    name: str
    model: Any
    inputs: dict[str, Any]
    modality: str = "image"
    shrunk: str = ""

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.inputs["input_ids"].shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of one row before pruning, text included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def visual(self) -> int:
        """Visual tokens of one row before pruning."""
        wanted = getattr(self.model.config, f"{self.modality}_token_id")
        return int((self.inputs["input_ids"][0] == wanted).sum())

    def encode(self) -> Any:
        """Vision tower and projector alone."""
        pixels = {k: v for k, v in self.inputs.items() if k in PIXELS}
        with torch.inference_mode():
            return geometries.encode(self.model, pixels, self.modality)

    def one_token(self) -> Any:
        """The forward pass of one token of text."""
        with torch.inference_mode():
            return self.model(input_ids=self.inputs["input_ids"][:, :1], use_cache=True)


def subject(
    name: str, device: str, dtype: torch.dtype, batch: int = 1, layers: int | None = None, scale: float = 1.0
) -> Subject:
    """A geometry by name; "tiny" is the embedded model."""
    if name == "tiny":
        return _embedded(device, dtype, batch)
    model, inputs = geometries.build(name, device, dtype, batch, layers, scale)
    cuts = [f"{layers} layer(s)"] if layers is not None else []
    cuts += [f"widths x {scale:g}"] if scale != 1 else []
    shrunk = f"SHRUNK to {' and '.join(cuts)}: not the model of that name" if cuts else ""
    return Subject(name, model, inputs, geometries.GEOMETRIES[name].modality, shrunk)


def _embedded(device: str, dtype: torch.dtype, batch: int) -> Subject:
    from vtprune.evals.toys import image as tiny

    model, processor = tiny.load(device, dtype)
    question = tiny.questions(per_capability=1, capabilities=["color"])[0]
    return from_processor("tiny", model, processor, question.image, question.prompt, batch)


def from_processor(name: str, model: Any, processor: Any, seen: Any, text: str, batch: int) -> Subject:
    """A loaded model on `batch` copies of one question about a picture or a `Video`."""
    from vtprune.evals.accuracy import process
    from vtprune.evals.video import Video

    made = process(processor, [text] * batch, [seen] * batch)
    modality = "video" if isinstance(seen, Video) else "image"
    return Subject(name, model, dict(made.to(model.device, dtype=model.dtype)), modality)


def bench(
    what: Subject,
    methods: Iterable[str] = METHODS,
    keeps: Sequence[float | int] = KEEPS,
    *,
    recipes: Sequence[str | Path] = (),
    prefill: Sequence[str] = ("eager",),
    bucket: int = 64,
    repeats: int = 7,
    new_tokens: int = 16,
    skip: bool = False,
    progress: bool = True,
    finished: Callable[[BenchReport], object] = lambda _: None,
) -> BenchReport:
    """Time dense, every method at every keep and every recipe, interleaved; medians over `repeats` after one warm-up.

    recipes: files that `Recipe.load` reads.
    prefill: ways to run the text model's prefill, of "eager", "graph" (CUDA graphs) and "compile"; the latter two at
    lengths rounded up to `bucket`. A way that a method does not allow is left out and noted.
    skip: leave out and note methods that this model cannot take, instead of raising. finished: is given the report so
    far after every round, which holds all methods once.

    Raises ValueError for an unknown way, UnsupportedModel or UnsupportedCall as `vtprune.patch` does.
    """
    variants = list(_variants(methods, keeps, recipes, prefill))
    runners = {mode: Bucketed(what.model, mode, bucket) for mode in prefill if mode != "eager"}
    samples: dict[Variant, Samples] = {}
    left_out: list[str] = []
    for variant in variants:  # what this model cannot take fails here, not in the middle of a run
        try:
            with _ready(what, variant, runners):
                samples[variant] = Samples()
        except (VtpruneError, ValueError) as error:
            if variant.prefill == "eager" and not skip:
                raise
            left_out.append(f"Not run: {variant.label} at {variant.keep}, {variant.prefill}: {error}")
    report = _without_rows(what, left_out)
    card = peak(what.model.device, what.model.dtype)
    floors = Floors({mode: [] for mode in ("eager", *runners)})
    with tqdm(total=(repeats + 1) * len(samples), unit="run", disable=not progress) as bar:
        for repeat in range(repeats + 1):
            for variant, into in samples.items():
                bar.set_description(f"{what.name}: {variant.label}, {variant.prefill}")
                with _ready(what, variant, runners) as handle:
                    if repeat == 0:
                        _generate(what, Samples(), 1)
                        _weigh(what, variant, into)
                    else:
                        _generate(what, into, new_tokens, handle)
                bar.update()
            floors.measure(what, runners, keep=repeat > 0)
            if repeat > 0:
                _tell(report, what, samples, floors, card, repeat)
                finished(report)
    return report


@dataclass
class Floors:
    """Seconds, a value a round: forward passes of one token by way of prefill, and the vision side alone."""

    one_token: dict[str, list[float]]
    vision: list[float] = field(default_factory=list)

    def measure(self, what: Subject, runners: dict[str, Bucketed], keep: bool) -> None:
        """One round; keep=False warms up."""
        device = what.model.device
        took = seconds(what.encode, device)
        self.vision += [took] * keep
        for mode, times in self.one_token.items():
            with runners.get(mode, nullcontext()):
                took = seconds(what.one_token, device)
            times += [took] * keep


def _variants(
    methods: Iterable[str], keeps: Sequence[float | int], recipes: Sequence[str | Path], prefill: Sequence[str]
) -> Iterator[Variant]:
    read = [(Path(path).stem, vtprune.Recipe.load(path)) for path in recipes]
    named = [(text, *parse_method(text)) for text in methods]
    rules = [(text, vtprune.create(name, **options)) for text, name, options in named]
    for mode in prefill:
        if mode not in MODES:
            raise ValueError(f"prefill mode {mode!r}: choose one of {', '.join(MODES)}")
        yield Variant("dense", prefill=mode)
        for text, rule in rules:
            yield from (Variant(text, rule, keep, mode) for keep in keeps)
        yield from (Variant(name, recipe, None, mode) for name, recipe in read)


@contextmanager
def _ready(what: Subject, variant: Variant, runners: dict[str, Bucketed]) -> Iterator[Any]:
    """The model made to run as `variant` says; yields the handle, None if dense."""
    rule, keep = variant.method, variant.keep
    patched = vtprune.patch(what.model, rule, keep=keep) if rule is not None else nullcontext()
    with patched as handle, runners.get(variant.prefill, nullcontext()):
        yield handle


def _generate(what: Subject, into: Samples, new_tokens: int, handle: Any = None) -> None:
    """One prefill and `new_tokens` decode steps, appended to `into`."""
    device = what.model.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        start = now(device)
        with Phases(what.model.get_decoder(), device) as phases:
            out = what.model(**what.inputs, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            into.ttft.append(now(device) - start)
        for times, seconds in zip((into.encode, into.cut, into.prefill), phases.seconds):
            times.append(seconds)
        if handle is not None and handle.last is not None:
            into.selector.append(handle.last.seconds)
        cache = out.past_key_values
        stored = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        into.lengths = [layer.keys.shape[-2] for layer in stored]
        into.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)
        start = now(device)
        for _ in range(new_tokens):
            out = what.model(input_ids=token, use_cache=True, **{NAME: cache})
            token = out.logits[:, -1:].argmax(-1)
        into.step.append((now(device) - start) / max(1, new_tokens))
    if device.type == "cuda":
        into.peak_bytes = torch.cuda.max_memory_allocated(device) - held


def _weigh(what: Subject, variant: Variant, into: Samples) -> None:
    """What needs no clock: FLOPs of the vision side as this variant runs it, and on a CPU the peak of memory."""
    into.vision_flops = counted(what.encode)
    if what.model.device.type == "cpu" and variant.prefill == "eager":
        with Allocated() as allocated:
            _generate(what, Samples(), 1)
        into.peak_bytes = allocated.peak


def _without_rows(what: Subject, left_out: list[str]) -> BenchReport:
    model, device = what.model, what.model.device
    dtype = str(model.dtype).removeprefix("torch.")
    env = environment(
        device.type,
        dtype,
        what.batch,
        geometry=what.name,
        shrunk=what.shrunk or None,
        parameters=model.num_parameters(),
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        attention=model.config._attn_implementation,
        tokens=what.tokens,
        visual_tokens=what.visual,
    )
    text_tokens = what.tokens - what.visual
    title = f"{what.name}, {what.visual} visual + {text_tokens} text tokens, batch {what.batch}, {dtype}"
    return BenchReport(title, [], env, notes_of(what.shrunk, device.type, left_out))


def _tell(
    report: BenchReport, what: Subject, samples: dict[Variant, Samples], floors: Floors, card: Card, rounds: int
) -> None:
    """Write what that many rounds have shown into the report."""
    model = what.model
    text = TextCost.of(model.config.get_text_config(), width=torch.finfo(model.dtype).bits // 8)
    one_token = {mode: median(times) for mode, times in floors.one_token.items()}
    vision_flops = next(iter(samples.values())).vision_flops
    limits = Limits(card, text, vision_flops, median(floors.vision), one_token, what.batch)
    text_tokens = what.tokens - what.visual
    report.rows = [
        row_of(v, s, samples[Variant("dense", prefill=v.prefill)], limits, text_tokens) for v, s in samples.items()
    ]
    report.environment |= {"repeats": rounds, "limits": limits.to_json()}
