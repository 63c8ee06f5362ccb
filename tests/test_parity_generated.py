"""The parity tool on files made here: plain restatements of the official codes at other layers, shares and sizes."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import oracles_decoder as decoder
import pytest

from vtprune.evals import parity

Arrays = dict[str, Any]


def check(folder: Path, name: str, arrays: Arrays, **weights: Arrays) -> None:
    """The file passes under its name."""
    for model, values in weights.items():
        np.savez(folder / f"{model}.npz", **values)
    np.savez(folder / f"{name}.npz", **arrays)
    (row,) = parity.run(folder)
    assert row.status == "passed", row.detail


def differ(n: int, share: float) -> bool:
    """True where cutting off, rounding and rounding up give at least two counts, and cutting off is not rounding."""
    return int(n * share) != round(n * share) and int(n * share) != ceil(n * share)


@pytest.mark.parametrize(
    ("depth", "sizes", "layers", "ratios"),
    [
        (5, (3, 21, 4), (1, 3), (0.7, 0.37)),  # 14.7, 7.77
        (6, (1, 35, 2), (0, 2, 3, 5), (0.85, 5 / 7, 0.62, 0.22)),  # 29.75, 25, 21.7, 7.7
        (4, (5, 50, 6), (2,), (0.31,)),  # 15.5, which round() takes up
        (4, (2, 100, 5), (1, 2), (0.57, 0.29)),  # 56.99.. and 28.99.. in float64
    ],
)
def test_pyramiddrop(depth: int, sizes: Any, layers: Any, ratios: Any, tmp_path: Path) -> None:
    assert any(differ(sizes[1], share) for share in ratios)
    weights = decoder.weights(depth, depth)
    arrays = decoder.renumbering(weights, decoder.prompt(1, 32, *sizes), layers, ratios)
    check(tmp_path, "pyramiddrop_made", arrays, model_llama=weights)


@pytest.mark.parametrize(
    ("depth", "sizes", "layers", "ratios", "ttv"),
    [
        (6, (3, 21, 4), (2, 4), (0.7, 0.37), (1, 2, 3, 4)),  # from a layer before the one before the first stage
        (6, (1, 35, 2), (3, 4, 5), (0.85, 0.62, 0.22), (1, 3, 5)),  # with gaps
        (5, (2, 30, 5), (2, 3), (0.93, 0.29), (2, 3)),  # the default
        (5, (2, 30, 5), (2, 3), (0.93, 0.29), (1, 4, 5)),  # layers behind the last stage
    ],
)
def test_transprune(depth: int, sizes: Any, layers: Any, ratios: Any, ttv: Any, tmp_path: Path) -> None:
    assert any(differ(sizes[1], share) for share in ratios)
    weights = decoder.weights(depth + 10, depth)
    arrays = decoder.renumbering(weights, decoder.prompt(2, 32, *sizes), layers, ratios, ttv)
    check(tmp_path, "transprune_made", arrays, model_llama=weights)


@pytest.mark.parametrize(
    ("sizes", "layer", "gone"),
    [((3, 21, 4), 1, 0.5), ((1, 35, 2), 3, 0.7), ((2, 30, 5), 2, 0.85), ((4, 7, 3), 2, 1 / 3)],
)
def test_fastv(sizes: Any, layer: int, gone: float, tmp_path: Path) -> None:
    weights = decoder.weights(layer, 4, heads=2, kv=2)
    arrays = decoder.fastv(weights, decoder.prompt(3, 32, *sizes), layer, gone)
    check(tmp_path, "fastv_prefill_made", arrays, model_llama=weights)
    (tmp_path / "fastv_prefill_made.npz").unlink()
    check(tmp_path, "fastv_kvcache_decode_made", arrays)


@pytest.mark.parametrize(
    ("sizes", "rates"),
    [
        ((3, 21, 4), (1.0, 0.7, 0.7, 0.37, 0.1)),
        ((1, 35, 2), (0.85, 0.62, 0.22, 0.0, 0.0, 0.0)),
        ((2, 30, 5), (1.0, 1.0, 5 / 6, 1 / 3)),
    ],
)
def test_aim_inllm(sizes: Any, rates: Any, tmp_path: Path) -> None:
    weights = decoder.weights(len(rates), len(rates), kv=2, bias=True, scale=0.5)
    arrays = decoder.aim(weights, decoder.prompt(4, 32, *sizes), rates)
    check(tmp_path, "aim_inllm_made", arrays, model_qwen2_28l=weights)
