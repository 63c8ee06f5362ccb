"""Patched models on the Triton kernels (interpreted without a GPU): the tokens and logits of the reference."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

import vtprune
from vtprune.kernels import use
from vtprune.model_adapters.towers import has_cls, tower_of

METHODS = ("divprune", "hiprune", "visionzip", "fastv")


def expected_to_run(model: Any, method: str) -> set[str]:
    """VisionZip reads the row of the CLS token, or what every token receives where the tower has none."""
    row = "attention_rows" if has_cls(tower_of(model.base_model, "image")) else "attention_received"
    return {
        "divprune": {"farthest_point", "compact"},
        "hiprune": {"attention_received", "compact"},
        "visionzip": {row, "merge", "compact"},
        "fastv": {"attention_rows"},
    }[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_triton_answers_as_the_reference(family: str, method: str) -> None:
    """A ragged batch: pads, and for Qwen3-VL three rows of position ids and features added after the first layers."""
    model, batch = families.model(family), families.inputs(family, rows=(1, 2))
    options = {"fastv": {"layer": 3}, "visionzip": {"contextual": 0.5}}.get(method, {})
    seen = {}
    for backend in ("reference", "triton"):
        with vtprune.patch(model, method, keep=0.3, **options) as handle, use(backend), torch.no_grad():  # type: ignore[arg-type]
            seen[backend] = model(**batch).logits, handle.last
    (expected, plain), (logits, last) = seen["reference"], seen["triton"]
    assert torch.equal(last.index, plain.index)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert set(last.kernels.values()) == {"triton"}
    assert set(plain.kernels.values()) == {"reference"}
    assert last.kernels.keys() == plain.kernels.keys()
    assert set(last.kernels) == expected_to_run(model, method)
