"""V2Drop and what a layer changes, against plain restatements."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

import vtprune
from vtprune import Stage, Visual
from vtprune.methods.in_llm.v2drop import CHANGE


@pytest.mark.parametrize(("n", "budget"), [(1, 1), (9, 4), (64, 13), (64, 64)])
def test_the_most_changed_stay(n: int, budget: int) -> None:
    for change in (torch.rand(n, generator=torch.Generator().manual_seed(n)), (torch.arange(n) % 3).float()):
        answer = vtprune.create("v2drop")(Visual(torch.zeros(n, 2), budget, signals={CHANGE: change}))
        assert answer.idx.tolist() == sorted(sorted(range(n), key=lambda i: (-change[i].item(), i))[:budget])


def test_published_schedule() -> None:
    """576 -> 288 -> 144 -> 1; int(100 * 0.5), int(50 * 0.5), and one."""
    method = vtprune.create("v2drop")
    stages = method.stages(None, 32)
    assert [s.where for s in stages] == [3, 17, 22]
    assert [s.budgets([576])[0] for s in stages] == [288, 144, 1]
    assert [s.budgets([99])[0] for s in stages] == [49, 24, 1]
    assert [s.where for s in method.stages(None, 28)] == [3, 15, 19]
    assert [s.where for s in method.stages(0.5, 4)] == [2, 3]
    assert [s.keep for s in method.stages(0.2, 32)] == pytest.approx([0.6, 0.4, 0.2])
    assert [s.keep for s in method.stages(32, 32)] == [128, 64, 32]
    assert [s.keep for s in method.stages(1.0, 32)] == [1.0, 1.0, 1.0]
    own = vtprune.create("v2drop", layers=(2, 5), ratios=(0.7, 0.0)).stages(None, 8)
    assert [(s.where, s.budgets([10])[0]) for s in own] == [(2, 7), (5, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 2)}, "use >= 1"),
        ({"layers": (3, 2)}, "ascending"),
        ({"ratios": (0.5,)}, "3 stages"),
        ({"ratios": (0.5, 0.6, 0.0)}, "none above the one before"),
        ({"ratios": (1.5, 0.6, 0.0)}, r"shares in \[0, 1\]"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create("v2drop", **options)
    with pytest.raises(TypeError, match="give one of them"):
        vtprune.create("v2drop", ratios=(0.5, 0.2, 0.0)).stages(0.3, 32)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_5"])
def test_changes_equal_the_unpruned_models(family: str) -> None:
    """In a left-padded batch every row has the changes it has alone; a layer of linear attention has them too."""
    model, rows, seen = families.fresh(family), (2, 1), []
    text = model.get_decoder()

    class Watch(type(vtprune.create("v2drop"))):  # type: ignore[misc]
        def __call__(self, v: Visual) -> Any:
            seen.append(v.signals[CHANGE])
            return super().__call__(v)

    expected = []
    for row in range(len(rows)):
        single, held = families.inputs(family, rows=rows, only=row), []
        hook = text.layers[1].register_forward_hook(
            lambda m, a, k, out, held=held: held.append((a[0] if a else k["hidden_states"], out)), with_kwargs=True
        )
        with torch.no_grad():
            model(**single)
        hook.remove()
        before, after = held[0][0][0], (held[0][1][0] if isinstance(held[0][1], tuple) else held[0][1])
        after = after[0] if after.dim() == 3 else after
        change = (after.double() - before.double()).square().sum(-1).sqrt()
        expected += [change[unit] for unit in single.units[0]]
    with vtprune.patch(model, Stage(2, Watch(), keep=3)), torch.no_grad():
        model(**families.inputs(family, rows=rows))
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-6)
