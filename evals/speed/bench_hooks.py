"""What the hooks cost while decoding: `vtprune bench --hooks`."""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import vtprune
from vtprune.evals.report import Report, Row, environment
from vtprune.evals.speed.bench import Subject
from vtprune.evals.speed.meter import now
from vtprune.evals.speed.tables import BenchReport
from vtprune.model_adapters.cache_argument import NAME
from vtprune.parsing import parse_method


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
                start = now(device)
                model(input_ids=token, use_cache=True, **{NAME: cache})
                times.append(now(device) - start)
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

    kind = "bench-hooks"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        return Report.cells(self)

    def file_name(self) -> str:
        return f"hooks_{super().file_name()}"
