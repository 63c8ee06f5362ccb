"""Accuracy and speed of a plain vision transformer, dense against each method: `vtprune eval-vit`.

Every test batch runs dense and by every method in turn, so that all of them share whatever else the machine does, and
the same passes give accuracy and time. Time is CPU time, which other processes do not lengthen; on a GPU that of the
clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import vtprune
from vtprune.evals.accuracy import parse_method
from vtprune.evals.accuracy.vit_data import nearest, pixels, probe
from vtprune.evals.report import Report, Row, environment
from vtprune.evals.speed.flops import counted
from vtprune.evals.speed.meter import spent

METHODS = ("tome", "diffrate", "zero_tprune", "topk_cls", "token_transforming", "random")
KEEPS = (0.5, 0.25)
LOSS = 1.0  # points of probe accuracy that count as matched
NOTES = (
    "images/s and speed are medians over test batches, each run dense and by every method in turn, the order reversed "
    "every time; speed is against the dense pass of the same batch. Seconds are of CPU time, on a GPU of the clock.",
    "flops_ratio is the limit of speed: GFLOPs of one image, dense over pruned, counted by torch.utils.flop_counter "
    "(matrix products and convolutions, 2 x MAC; those of the method itself count too).",
    "probe: logistic regression on standardised CLS features of dense training images; 10-NN by cosine.",
)


class VitReport(Report):
    """Rows of dense and methods; `matched` says for each method the fastest row within the allowed loss."""

    kind = "eval-vit"

    def matched(self) -> dict[str, Row | None]:
        """By method the row of highest speed among those that lose at most LOSS points of probe accuracy."""
        dense, names = self.rows[0], dict.fromkeys(row["method"] for row in self.rows[1:])
        found: dict[str, Row | None] = {}
        for name in names:
            rows = [r for r in self.rows if r["method"] == name and r["probe"] >= dense["probe"] - LOSS - 1e-9]
            found[name] = max(rows, key=lambda r: r["speed"], default=None)
        return found


def evaluate(
    model: Any,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    methods: Sequence[str] = METHODS,
    keeps: Sequence[float | int] = KEEPS,
    *,
    side: int = 224,
    batch: int = 32,
    title: str = "",
    progress: bool = True,
) -> VitReport:
    """Probe, k-NN, images/s and GFLOPs of a transformers vision model whose `pooler_output` is its CLS feature.

    train, test: images [N, 28, 28] uint8 and labels [N] int64; those of training run dense only. Methods that bring
    their own schedule (tome:r=8) ignore `keeps`. Test images beyond the last whole batch are left out.
    """
    (known, known_labels), (images, labels) = train, test
    count = len(images) // batch * batch
    if not count:
        raise ValueError(f"{len(images)} test images make no batch of {batch}: use more, or --batch")
    runs = [("dense", None), *_runs(methods, keeps)]
    features: dict[tuple[str, Any], list[Tensor]] = {run: [] for run in runs}
    times: dict[tuple[str, Any], list[float]] = {run: [] for run in runs}
    with torch.inference_mode():
        _run(model, runs[0], _input(model, known[:batch], side))
        parts = tqdm(known.split(batch), desc="train", disable=not progress)
        reference = torch.cat([_run(model, ("dense", None), _input(model, part, side))[0] for part in parts])
        for i, part in enumerate(tqdm(images[:count].split(batch), desc="test", disable=not progress)):
            x = _input(model, part, side)
            for run in runs if i % 2 else runs[::-1]:
                out, seconds = _run(model, run, x)
                features[run].append(out)
                times[run].append(seconds)
        costs = {run: _flops(model, run, _input(model, images[:1], side)) for run in runs}
    mean, std = reference.mean(0), reference.std(0).clamp(min=1e-6)
    w, b = probe((reference - mean) / std, known_labels)
    rows: list[Row] = []
    for run in runs:
        out = torch.cat(features[run])
        said = ((out - mean) / std @ w.T + b).argmax(1)
        voted = nearest(out, reference, known_labels)
        gflops, left = costs[run]
        rows.append(
            {
                "method": run[0],
                "keep": run[1],
                "left": left,
                "probe": 100 * float((said == labels[:count]).float().mean()),
                "knn": 100 * float((voted == labels[:count]).float().mean()),
                "images_s": batch / median(times[run]),
                "speed": median(a / b for a, b in zip(times[runs[0]], times[run])),
                "gflops": gflops,
                "flops_ratio": costs[runs[0]][0] / gflops,
            }
        )
    env = environment(model.device.type, str(model.dtype).removeprefix("torch."), batch, side=side)
    env |= {"clock": "wall" if model.device.type == "cuda" else "CPU time"}
    env |= {"train": len(known), "test": count, "attention": model.config._attn_implementation}
    return VitReport(title, rows, env, NOTES)


def _runs(methods: Sequence[str], keeps: Sequence[float | int]) -> list[tuple[str, Any]]:
    """(method, keep) of every run; keep None where the method has its own schedule."""
    runs: list[tuple[str, Any]] = []
    for text in methods:
        name, options = parse_method(text)
        own = vtprune.create(name, **options).adaptive
        runs += [(text, None)] if own else [(text, keep) for keep in keeps]
    return runs


def _input(model: Any, images: Tensor, side: int) -> Tensor:
    return pixels(images, side).to(model.device, model.dtype)


def _run(model: Any, run: tuple[str, Any], x: Tensor) -> tuple[Tensor, float]:
    """CLS features [B, C] float32 on the host, and seconds as `spent` tells them."""
    text, keep = run
    if text == "dense":
        return _timed(model, x)
    name, options = parse_method(text)
    with vtprune.patch(model, vtprune.create(name, **options), keep=keep):
        return _timed(model, x)


def _timed(model: Any, x: Tensor) -> tuple[Tensor, float]:
    found: list[Tensor] = []
    seconds = spent(lambda: found.append(model(pixel_values=x).pooler_output), x.device)
    return found[0].float().cpu(), seconds


def _flops(model: Any, run: tuple[str, Any], x: Tensor) -> tuple[float, int]:
    """GFLOPs of one image and the tokens that leave the last block."""
    text, keep = run
    name, options = parse_method(text)
    patched = nullcontext() if text == "dense" else vtprune.patch(model, vtprune.create(name, **options), keep=keep)
    left: list[int] = []
    with patched:
        flops = counted(lambda: left.append(model(pixel_values=x).last_hidden_state.shape[1]))
    return flops / 1e9, left[0]
