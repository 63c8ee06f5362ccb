"""Dropping a token inside the LLM equals hiding its key from there on, where kept tokens keep their positions.

The oracle is the unpatched eager model, whole, with one mask a layer; it knows which tokens a method dropped and
nothing of how. A method that merges changes the tokens that stay, so it has no place here (`reference.pruned_logits`
has it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import families
import pytest
import reference
import torch

import vtprune
from vtprune import Stage
from vtprune.methods.in_llm.withdraw import Withdraw

FAMILIES = ("llava", "llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_5_vl-video", "qwen3_vl", "qwen3_vl-video")
DEPTH = 4
ROWS = (2, 0, 1)
STEPS = 4
TOLERANCE = 1e-5


def schedule(name: str, keep: float, **options: Any) -> Callable[[], list[Stage]]:
    return lambda: vtprune.create(name, **options).stages(keep, DEPTH)


METHODS: dict[str, Callable[[], list[Stage]]] = {
    "fastv": schedule("fastv", 0.4),
    "pyramiddrop": schedule("pyramiddrop", 0.3),
    "sparsevlm plus": schedule("sparsevlm", 0.3, version="plus"),
    "transprune": schedule("transprune", 0.3),
    "spatten": schedule("spatten", 0.3),
    "aim_inllm": schedule("aim_inllm", 0.3),
    "flowcut_llm": schedule("flowcut_llm", 0.4),
    "withdraw": lambda: [Stage(2, Withdraw(None))],
    "withdraw, tested": lambda: [Stage(2, Withdraw(0.5)), Stage(3, Withdraw(0.99))],
    "todre": lambda: [*vtprune.create("todre").stages(0.5, DEPTH), Stage(3, Withdraw(0.99))],
}


def single_axis(family: str) -> bool:
    """False where layers get rotary embeddings of several axes, which `rope_weight` refuses (tested elsewhere)."""
    full = reference.dense(families.model(family), families.inputs(family))
    return full.layers[0]["position_embeddings"][0].dim() == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode(family: str, method: str) -> None:
    """Logits of a ragged batch, prefill and every decode step."""
    if method == "sparsevlm plus" and not single_axis(family):
        pytest.skip(f"{family} has no single-axis rotary embedding")
    model = families.model(family)
    stages, log = reference.spy([replace(stage, positions="keep") for stage in METHODS[method]()])
    with vtprune.patch(model, stages) as handle:
        tokens, ours = reference.greedy(model, families.inputs(family, rows=ROWS), STEPS)
    last: Any = handle.last
    assert last.lengths[-1] < last.lengths[0], "nothing was dropped inside the LLM"
    assert not any(answer.merges for call in log for answer in call.answers)
    compare(family, log, tokens, ours)


def compare(family: str, log: Sequence[Any], tokens: Any, ours: Any) -> None:
    eager = families.model(family, "eager")
    units = [families.inputs(family, rows=ROWS, only=row).units[0] for row in range(len(ROWS))]
    cuts = reference.cuts_of_row(log, range(len(ROWS)), units)
    for row in range(len(ROWS)):
        single, answer = families.inputs(family, rows=ROWS, only=row), tokens[row][:-1].tolist()
        theirs = reference.masked_logits(eager, single, cuts[row], answer)[-STEPS:]
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=TOLERANCE)


def test_the_oracle_sees_a_key_that_should_be_hidden() -> None:
    """Of one unit a single dropped key is shown: logits move by far more than the tolerance."""
    family, model = "qwen2_5_vl", families.model("qwen2_5_vl")
    stages, log = reference.spy(vtprune.create("fastv").stages(0.4, DEPTH))
    with vtprune.patch(model, stages):
        tokens, ours = reference.greedy(model, families.inputs(family, rows=ROWS), STEPS)
    (answer, *others) = log[0].answers
    idx = answer.idx
    dropped = next(i for i in range(log[0].units[0].n) if i not in idx)
    log[0].answers = [replace(answer, idx=torch.cat([idx, torch.tensor([dropped])]).sort().values), *others]
    with pytest.raises(AssertionError, match="not close"):
        compare(family, log, tokens, ours)
