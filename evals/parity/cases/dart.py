"""DART: pivots by the size of their keys, and the tokens that are least like them."""

from __future__ import annotations

from pathlib import Path

from vtprune.evals.parity.compare import listed, real, same, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.registry import create
from vtprune.types import Visual


@case("leaders_dart")
def dart(arrays: Arrays, folder: Path) -> str:
    """Kept tokens of every run, from the stored keys and normalised states; pivots in the order of a CPython set."""
    from vtprune.methods.in_llm.dart import SIZE, STATES, TEXT_SIZE, TEXT_STATES

    hidden, keys = tensor(arrays, "hidden")[0], tensor(arrays, "keys")[0]
    start, n = int(arrays["image_start"]), int(arrays["image_len"])
    image, text = slice(start, start + n), slice(start + n, None)
    size = keys.abs().sum((0, 2))
    signals = {SIZE: size[image], STATES: hidden[image], TEXT_SIZE: size[text], TEXT_STATES: hidden[text]}
    runs = zip(*(arrays[name] for name in ("reduction_ratio", "max_num_trunction", "pivot_image", "pivot_text")))
    counts = []
    for i, (reduction, most, pivots, text_pivots) in enumerate(runs):
        method = create(
            "dart",
            reduction=real(reduction),
            count=int(most) if most > 0 else None,
            pivots=int(pivots),
            text_pivots=int(text_pivots),
            pivot_order="cpython_set",
            image_start=start,
        )
        answer = method(Visual(hidden[image], None, signals=signals))
        same(f"kept of run {i}", answer.idx + start, arrays[f"kept_{i}"])
        counts.append(len(answer.idx))
    return f"kept tokens of {len(counts)} runs, {listed(counts)} of {n}"
