"""Speed and memory, dense against pruned, interleaved in one run, and the share of what is physically possible.

Two limits stand beside every speed-up. Roofline: every kernel at the card's measured peak. Stack: this very software
with an LLM prefill that costs no more than a forward pass of one token, which is what launches and Python leave.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import vtprune
from vtprune.evals import geometries
from vtprune.evals.accuracy import parse_method, share
from vtprune.evals.flops import FORMULA, Card, TextCost, card, counted, ideal_llm
from vtprune.evals.report import Report, Row, environment, show
from vtprune.types import Method

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


@dataclass
class Samples:
    """What was measured of one variant, a value a repeat; seconds unless named otherwise."""

    ttft: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    selector: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    kv_bytes: int = 0
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Variant:
    """One way to run the model: dense (no method), or a method at a keep."""

    label: str
    method: Method | None = None
    keep: float | int | None = None


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
    from vtprune.evals import tiny

    model, processor = tiny.load(device, dtype)
    question = tiny.questions(per_capability=1, capabilities=["color"])[0]
    return from_processor("tiny", model, processor, question.image, question.prompt, batch)


def from_processor(name: str, model: Any, processor: Any, image: Any, text: str, batch: int) -> Subject:
    """A loaded model on `batch` copies of one image and question."""
    from vtprune.evals.accuracy import render

    made = processor(
        text=[render(processor, text)] * batch, images=[[image]] * batch, return_tensors="pt", add_special_tokens=False
    )
    return Subject(name, model, dict(made.to(model.device, dtype=model.dtype)))


def bench(
    what: Subject,
    methods: Iterable[str] = METHODS,
    keeps: Sequence[float | int] = KEEPS,
    *,
    repeats: int = 7,
    new_tokens: int = 16,
    progress: bool = True,
) -> BenchReport:
    """Time dense and every method at every keep, interleaved; medians over `repeats` after one warm-up round."""
    variants = [Variant("dense")]
    for text in methods:
        name, options = parse_method(text)
        variants += [Variant(text, vtprune.create(name, **options), keep) for keep in keeps]
    for variant in variants[1:]:  # a stage this model cannot take fails here, not in the middle of a run
        vtprune.patch(what.model, variant.method, keep=variant.keep).remove()  # type: ignore[arg-type]
    samples = {v: Samples() for v in variants}
    with tqdm(total=(repeats + 1) * len(variants), unit="run", disable=not progress) as bar:
        for repeat in range(repeats + 1):
            for variant in variants:
                bar.set_description(f"{what.name}: {variant.label}")
                _once(what, variant, Samples() if repeat == 0 else samples[variant], new_tokens)
                bar.update()
    return _report(what, samples, repeats)


def _once(what: Subject, variant: Variant, into: Samples, new_tokens: int) -> None:
    """One prefill and `new_tokens` decode steps, appended to `into`."""
    device = what.model.device
    if variant.method is None:
        _generate(what, into, new_tokens, device)
        return
    with vtprune.patch(what.model, variant.method, keep=variant.keep) as handle:
        _generate(what, into, new_tokens, device)
        if handle.last is not None:
            into.selector.append(handle.last.seconds)


def _generate(what: Subject, into: Samples, new_tokens: int, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        start = _now(device)
        out = what.model(**what.inputs, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        into.ttft.append(_now(device) - start)
        cache = out.past_key_values
        stored = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        into.lengths = [layer.keys.shape[-2] for layer in stored]
        into.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in stored)
        start = _now(device)
        for _ in range(new_tokens):
            out = what.model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        into.step.append((_now(device) - start) / max(1, new_tokens))
    if device.type == "cuda":
        into.peak_bytes = torch.cuda.max_memory_allocated(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = _now(device)
        call()
        times.append(_now(device) - start)
    return median(times[1:])


def _report(what: Subject, samples: dict[Variant, Samples], repeats: int) -> BenchReport:
    model, device = what.model, what.model.device
    text = TextCost.of(model.config.get_text_config(), width=torch.finfo(model.dtype).bits // 8)
    one = what.inputs["input_ids"][:, :1]
    with torch.inference_mode():
        vision = _timed(what.encode, device, repeats)
        floor = _timed(lambda: model(input_ids=one, use_cache=True), device, repeats)
    vision_flops = counted(what.encode)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    limits = Limits(card(gpu), text, vision_flops, vision + floor, what.batch)
    dense = samples[Variant("dense")]
    rows = [_row(what, variant, s, dense, limits) for variant, s in samples.items()]
    dtype = str(model.dtype).removeprefix("torch.")
    env = environment(
        device.type,
        dtype,
        what.batch,
        geometry=what.name,
        shrunk=what.shrunk or None,
        parameters=model.num_parameters(),
        attention=model.config._attn_implementation,
        tokens=what.tokens,
        visual_tokens=what.visual,
        vision_ms=1e3 * vision,
        one_token_forward_ms=1e3 * floor,
        vision_tflop=vision_flops / 1e12,
        repeats=repeats,
        formula=FORMULA,
    )
    title = f"{what.name}, {what.visual} visual + {what.tokens - what.visual} text tokens, batch {what.batch}, {dtype}"
    notes = tuple(filter(None, (what.shrunk, *NOTES, FORMULA)))
    return BenchReport(title, rows, env, notes)


NOTES = (
    "TTFT: vision, selection and LLM prefill up to the first token on the host, median of interleaved repeats.",
    "of roofline: speed-up / speed-up if every kernel ran at the card's measured peak. "
    "of stack: speed-up / (dense TTFT / (vision + a forward pass of one token)).",
)


@dataclass(frozen=True)
class Limits:
    """What the speed-up of a row is divided by; `stack` = seconds of vision plus a one-token forward pass."""

    gpu: Card | None
    text: TextCost
    vision_flops: int
    stack: float
    batch: int

    def ideal(self, lengths: Sequence[int]) -> float | None:
        """Seconds to the first token at the card's peak, or None on an unknown card."""
        if self.gpu is None:
            return None
        return self.vision_flops / self.gpu.flops + ideal_llm(self.gpu, self.text, lengths, self.batch)

    def selection_budget(self, dense: Sequence[int], pruned: Sequence[int]) -> float | None:
        """Seconds a selector may take: 2 % of the ideal dense prefill or 5 % of the ideal pruned TTFT."""
        if self.gpu is None:
            return None
        return min(0.02 * ideal_llm(self.gpu, self.text, dense, self.batch), 0.05 * (self.ideal(pruned) or 0))


def _row(what: Subject, variant: Variant, s: Samples, dense: Samples, limits: Limits) -> Row:
    ttft, step = median(s.ttft), median(s.step)
    speedup = median(dense.ttft) / ttft
    ideal, ideal_dense = limits.ideal(s.lengths), limits.ideal(dense.lengths)
    flops = limits.batch * limits.text.prefill(s.lengths) + limits.vision_flops
    row: Row = {
        "method": variant.label,
        "keep": variant.keep if variant.keep is not None else 1.0,
        "kept_by_layer": [n - (what.tokens - what.visual) for n in s.lengths],
        "ttft_ms": 1e3 * ttft,
        "ttft_ms_all": [1e3 * t for t in s.ttft],
        "decode_ms_per_token": 1e3 * step,
        "selector_ms": 1e3 * median(s.selector) if s.selector else None,
        "kv_bytes": s.kv_bytes,
        "peak_bytes": s.peak_bytes,
        "flops": flops,
        "ttft_speedup": speedup,
        "decode_speedup": median(dense.step) / step,
        "of_stack_limit": speedup / (median(dense.ttft) / limits.stack),
        "ideal_ttft_ms": None,
        "of_roofline_limit": None,
        "selector_budget_ms": None,
    }
    if ideal is not None and ideal_dense is not None:
        budget = limits.selection_budget(dense.lengths, s.lengths)
        row["ideal_ttft_ms"] = 1e3 * ideal
        row["of_roofline_limit"] = speedup / (ideal_dense / ideal)
        row["selector_budget_ms"] = 1e3 * budget if budget is not None and variant.method is not None else None
    return row


class BenchReport(Report):
    """Timings by method and keep."""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        timed = ["TTFT ms", "speed-up", "of stack", "of roofline", "selector ms", "decode ms"]
        header = ["method", "kept", *timed, "KV MiB", "TFLOP"]
        return header, [self._line(row) for row in self.rows]

    @staticmethod
    def _line(row: Row) -> list[str]:
        def times(name: str, unit: str = "") -> str:
            return show(row[name]) + (unit if row[name] is not None else "")

        def percent(name: str) -> str:
            return "–" if row[name] is None else f"{100 * row[name]:.0f} %"

        return [
            row["method"],
            share(row["keep"]),
            times("ttft_ms"),
            f"{row['ttft_speedup']:.2f}x",
            percent("of_stack_limit"),
            percent("of_roofline_limit"),
            times("selector_ms"),
            times("decode_ms_per_token"),
            f"{row['kv_bytes'] / 2**20:.1f}",
            f"{row['flops'] / 1e12:.3g}",
        ]

    def file_name(self) -> str:
        """geometry_device_dtype_batch_time.json"""
        env = self.environment
        stamp = "".join(c for c in env["time"][:19] if c.isalnum())
        shrunk = "_shrunk" if env.get("shrunk") else ""
        return f"{env['geometry']}{shrunk}_{env['device']}_{env['dtype']}_b{env['batch']}_{stamp}.json"

    def write(self, folder: str | Path) -> Path:
        """Save under `folder`, one file a run."""
        return self.save(Path(folder) / self.file_name())


def hooks(
    what: Subject, method: str = "divprune", keep: float | int = 0.25, steps: int = 200, progress: bool = True
) -> BenchReport:
    """Cost of the hooks while decoding: a patched model on its pruned cache against an unpatched one that has as many.

    Both copies share their weights, and each layer of the plain cache is cut to as many keys as its pruned twin holds.
    Steps alternate, and the order alternates too.
    """
    name, options = parse_method(method)
    twin = copy.deepcopy(what.model, {id(p): p for p in what.model.parameters()})
    device = what.model.device
    with vtprune.patch(what.model, vtprune.create(name, **options), keep=keep), torch.inference_mode():
        pruned = what.model(**what.inputs, use_cache=True, logits_to_keep=1).past_key_values
        lengths = [layer.keys.shape[-2] for layer in pruned.layers]
        text = what.inputs["input_ids"][:, -1:].repeat(1, max(lengths))
        plain = twin(input_ids=text, use_cache=True, logits_to_keep=1).past_key_values
        for layer, n in zip(plain.layers, lengths):
            layer.keys, layer.values = layer.keys[:, :, :n].clone(), layer.values[:, :, :n].clone()
        token = what.inputs["input_ids"][:, -1:]
        sides: list[tuple[Any, Any, list[float]]] = [(what.model, pruned, []), (twin, plain, [])]
        for i in tqdm(range(steps + 10), unit="step", desc="decode", disable=not progress):
            for model, cache, times in sides if i % 2 else reversed(sides):
                start = _now(device)
                model(input_ids=token, past_key_values=cache, use_cache=True)
                times.append(_now(device) - start)
    patched, unpatched = (sorted(times[10:]) for _, _, times in sides)
    rows: list[Row] = [
        {
            "method": method,
            "keep": keep,
            "cached_tokens": sum(lengths) / len(lengths),
            "steps": steps,
            "patched_ms": 1e3 * median(patched),
            "unpatched_ms": 1e3 * median(unpatched),
            "ratio": median(patched) / median(unpatched),
        }
    ]
    dtype = str(what.model.dtype).removeprefix("torch.")
    env = environment(device.type, dtype, what.batch, geometry=what.name, shrunk=what.shrunk or None)
    env["layers"] = what.model.config.get_text_config().num_hidden_layers
    title = f"Decode with hooks against without, {what.name}, {sum(lengths) / len(lengths):g} cached tokens a layer"
    return HooksReport(title, rows, env, tuple(filter(None, (what.shrunk,))))


class HooksReport(BenchReport):
    """One row: medians with and without hooks, and their ratio."""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        return Report.cells(self)

    def file_name(self) -> str:
        return f"hooks_{super().file_name()}"
