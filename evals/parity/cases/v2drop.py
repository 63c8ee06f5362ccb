"""V2Drop: the tokens that a layer changed most."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import listed, real, same, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.methods.in_llm.v2drop import CHANGE
from vtprune.registry import create
from vtprune.signals import LayerPass, kind_of
from vtprune.types import Stage, Visual


@case("leaders_v2drop")
def v2drop(arrays: Arrays, folder: Path) -> str:
    """Kept positions of every stored layer, from the states that entered the layer before and those that left it."""
    before, after = tensor(arrays, "prev"), tensor(arrays, "cur")
    start, n = int(arrays["image_start"]), int(arrays["image_len"])
    # This signal asks neither for the norm behind the last layer nor for the prompt.
    change = kind_of(CHANGE)(LayerPass(before, after, torch.nn.Identity(), None))  # type: ignore[arg-type]
    image, method, counts = slice(start, start + n), create("v2drop"), []
    names = sorted((name for name in arrays if name.startswith("keep_layer")), key=lambda name: int(name[10:]))
    for name, ratio in zip(names, arrays["keep_ratio"], strict=True):
        (budget,) = Stage(int(name[10:]), method, keep=real(ratio) or 1).budgets([n])
        answer = method(Visual(after[0, image], budget, signals={CHANGE: change[0, image]}))
        text = torch.arange(start), torch.arange(start + n, before.shape[1])
        same(name, torch.cat([text[0], start + answer.idx, text[1]]), arrays[name])
        counts.append(len(answer.idx))
    return f"kept tokens of {len(counts)} layers, {listed(counts)} of {n}"
