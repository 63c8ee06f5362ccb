"""The poolings of LLaVA's video models."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.evals.parity.compare import close, grid_of
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("video_llava_pool")
def llava_pool(arrays: Arrays, folder: Path) -> str:
    """The two fixed-stride poolings of LLaVA's video models, features only; the stride is 2 if the file names none."""
    x = torch.from_numpy(arrays["x"])
    frames, n, channels = x.shape
    height, width = grid_of(arrays, n)
    stride, worst = int(arrays["stride"]) if "stride" in arrays else 2, []
    for mode in ("average", "bilinear"):
        answer = create("average_pool", mode=mode, stride=stride)(
            Visual(x.reshape(-1, channels), None, grid=(frames, height, width))
        )
        pooled = answer.apply(x.reshape(-1, channels)).reshape(frames, -1, channels)
        worst.append(close(mode, pooled, arrays[f"out_{mode}"]))
    return f"{frames} frames of {height}x{width}, average and bilinear: features within {max(worst):.1g}"
