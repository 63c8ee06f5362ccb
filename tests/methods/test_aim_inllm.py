"""AIM inside the LLM: PageRank restated in float64 from eager maps, its schedule, whole models."""

from __future__ import annotations

import families
import oracles
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Visual
from vtprune.methods.in_llm.aim_inllm import IMPORTANCE
from vtprune.methods.in_llm.withdraw import Withdraw

LAYER = 3


def importance(attention: Tensor) -> Tensor:
    """attention [H, N, N] -> [N]: a softmax ten times as sharp is its tenth power, normalised."""
    sharp = attention.double() ** 10
    sharp = sharp / sharp.sum(-1, keepdim=True)
    heads, n = sharp.shape[:2]
    score = torch.full((heads, n), 1 / n, dtype=torch.float64)
    for _ in range(5):
        score = torch.stack([s @ a for s, a in zip(score, sharp)])
    return score.square().mean(0).sqrt()


@pytest.mark.parametrize("rows", [(1,), (1, 2)])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_importance_is_that_of_the_whole_map(family: str, rows: tuple[int, ...]) -> None:
    """Also of a padded row in a batch: its padding is nobody."""
    model, eager = families.model(family), families.model(family, "eager")
    stages, log = reference.spy([vtprune.Stage(LAYER, vtprune.create("aim_inllm"), keep=0.5)])
    with torch.no_grad(), vtprune.patch(model, stages):
        model(**families.inputs(family, rows=rows))
    (call,) = log
    for row, (view, answer) in enumerate(zip(call.units, call.answers, strict=True)):
        alone = families.inputs(family, rows=rows, only=row)
        maps: list[tuple[Tensor, ...]] = []
        attention = eager.get_decoder().layers[LAYER - 1].self_attn
        hook = attention.register_forward_hook(lambda m, a, out, maps=maps: maps.append(out))
        with torch.no_grad():
            eager(**alone)
        hook.remove()
        expected = importance(maps[0][1][0])[[p for unit in alone.units[0] for p in unit]]
        torch.testing.assert_close(view.signals[IMPORTANCE].double(), expected, rtol=1e-3, atol=1e-5)
        assert answer.idx.tolist() == sorted(oracles.top(view.signals[IMPORTANCE], view.budget))


def test_schedule() -> None:
    method = vtprune.create("aim_inllm")
    stages = method.stages(None, 28)
    assert [s.where for s in stages] == list(range(15, 23))
    assert [s.keep for s in stages[:-1]] == pytest.approx([0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert stages[-1].method == Withdraw(None)
    assert [s.keep for s in method.stages(0.5, 28)] == pytest.approx([0.875, 0.75, 0.625, 0.5])
    assert [s.keep for s in method.stages(0.6, 28)] == pytest.approx([0.875, 0.75, 0.625, 0.6])
    assert [(s.where, s.keep) for s in method.stages(1.0, 28)] == [(15, 1.0)], "keep=1.0 changes nothing"
    assert [(s.where, s.keep) for s in method.stages(7, 28)] == [(15, 7)]
    assert [(s.where, s.keep) for s in method.stages(None, 4)] == [(3, pytest.approx(0.125))]


def test_all_visual_tokens_leave_in_the_end() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1, 2))
    stages = [vtprune.Stage(2, vtprune.create("aim_inllm"), keep=0.5), vtprune.Stage(3, Withdraw(None))]
    with torch.no_grad(), vtprune.patch(model, stages) as handle:
        model(**batch)
    lengths = handle.last.lengths
    assert lengths[1] > lengths[2] > lengths[3]


def test_bad_values_and_missing_parts() -> None:
    method = vtprune.create("aim_inllm")
    with pytest.raises(ValueError, match="page_rank"):
        method(Visual(torch.randn(6, 4), 3))
    with pytest.raises(ValueError, match=r"NaN|finite"):
        method(Visual(torch.randn(6, 4), 3, signals={IMPORTANCE: torch.full((6,), torch.nan)}))
    with pytest.raises(ValueError, match=r"can keep 1\.\.6"):
        method(Visual(torch.randn(6, 4), 7, signals={IMPORTANCE: torch.rand(6)}))
    assert len(method(Visual(torch.randn(6, 4), None, signals={IMPORTANCE: torch.rand(6)})).idx) == 3
