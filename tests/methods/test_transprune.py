"""TransPrune and the transitions of tokens in decoder layers, against plain float64 restatements."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import families
import pytest
import reference
import test_seam_calls as calls
import torch
from torch import Tensor

import vtprune
from vtprune import Assignment, Method, Signal, Stage, Visual

FROM_TEXT = Signal("from_text", 0)


def by_hand(transitions: list[list[float]], looked: list[float], budget: int) -> list[int]:
    """TTV and IGA, each as a share of its sum; the `budget` best, an equal one to the lower index; ascending."""
    n = len(looked)
    moved = [sum(layer[i] for layer in transitions) for i in range(n)]
    scores = [moved[i] / (sum(moved) + 1e-8) + looked[i] / (sum(looked) + 1e-8) for i in range(n)]
    return sorted(sorted(range(n), key=lambda i: (-scores[i], i))[:budget])


def transition_by_hand(modules: list[tuple[Tensor, Tensor]]) -> list[float]:
    """modules: what entered and what left the attention and the MLP of one layer, [n, D] each."""
    out = [0.0] * len(modules[0][0])
    for before, after in modules:
        pairs = list(zip(before.double().tolist(), after.double().tolist()))
        norms = [(math.hypot(*x), math.hypot(*y)) for x, y in pairs]
        turned = [1 - sum(a * b for a, b in zip(x, y)) / (p * q) for (x, y), (p, q) in zip(pairs, norms)]
        whole = sum(math.exp(t) for t in turned)
        for i, ((p, q), t) in enumerate(zip(norms, turned)):
            out[i] += q / p * math.exp(t) / whole
    return out


@pytest.mark.parametrize(("n", "budget", "history"), [(1, 1, 1), (9, 4, 1), (60, 13, 3)])
def test_selection_equals_the_oracle(n: int, budget: int, history: int) -> None:
    generator = torch.Generator().manual_seed(n)
    method: Any = vtprune.create("transprune", history=history)
    signals = {need: torch.rand(n, generator=generator) for need in method.needs}
    transitions = [signals[Signal("transition", -back)].tolist() for back in range(1, history + 1)]
    answer = method(Visual(torch.zeros(n, 2), budget, signals=signals))
    assert answer.idx.tolist() == by_hand(transitions, signals[FROM_TEXT].tolist(), budget)


def test_published_schedule() -> None:
    method = vtprune.create("transprune")
    for keep in (None, 0.125):
        stages = method.stages(keep, 32)
        assert [s.where for s in stages] == [7, 9, 12]
        assert [s.budgets([576])[0] for s in stages] == [504, 360, 72]
        assert [s.method.history for s in stages] == [1, 3, 6]  # type: ignore[attr-defined]
    assert [s.keep for s in method.stages(72, 32)] == [504, 360, 72]
    assert [s.keep for s in method.stages(1.0, 32)] == [1.0] * 3
    assert [s.where for s in method.stages(0.5, 4)] == [2, 3]
    assert [s.keep for s in vtprune.create("transprune", layers=(1, 2, 3, 4)).stages(0.2, 8)] == pytest.approx(
        [0.8, 0.6, 0.4, 0.2]
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": (0, 2)}, ValueError, "use >= 1"),
        ({"history": 0}, ValueError, "history=0"),
        ({"layers": (3, 2)}, ValueError, "ascending"),
        ({"ratios": (0.5,)}, ValueError, "3 stages"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vtprune.create("transprune", **options)


class Moved(Method):
    """Keeps the first tokens and remembers how the layers before moved them."""

    name = "moved"
    seen: ClassVar[list[dict[Signal, Tensor]]] = []

    @property
    def needs(self) -> tuple[Signal, ...]:
        return Signal("transition", -2), Signal("transition", -1)

    def __call__(self, v: Visual) -> Assignment:
        self.seen.append(dict(v.signals))
        return Assignment(torch.arange(v.budget))


@torch.no_grad()
def modules_of(model: Any, batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """What enters and leaves the attention and the MLP of layers 0 and 1, in this order, [L, D] each."""
    held: list[tuple[Tensor, Tensor]] = []

    def hold(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        held.append((before[0], (out[0] if isinstance(out, tuple) else out)[0]))

    layers = model.get_decoder().layers[:2]
    modules = [module for layer in layers for module in (layer.self_attn, layer.mlp)]
    hooks = [module.register_forward_hook(hold, with_kwargs=True) for module in modules]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return held


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "glm4v", "paligemma"])
def test_transitions_equal_the_unpruned_models(family: str) -> None:
    """In a left-padded batch every row has the transitions it has alone, computed by hand from what modules hold."""
    model, rows = families.fresh(family), (2, 1)
    expected = []
    for row in range(len(rows)):
        single = families.inputs(family, rows=rows, only=row)
        held = modules_of(model, single)
        moved = [torch.tensor(transition_by_hand(held[2 * i : 2 * i + 2])) for i in (0, 1)]
        expected += [[m[unit] for m in moved] for unit in single.units[0]]
    method = Moved()
    method.seen.clear()
    with vtprune.patch(model, Stage(2, method, keep=1)), torch.no_grad():
        model(**families.inputs(family, rows=rows))
    assert len(method.seen) == len(expected)
    for seen, theirs in zip(method.seen, expected):
        for need, values in zip(method.needs, theirs):
            torch.testing.assert_close(seen[need], values.float(), rtol=1e-4, atol=1e-6)


def test_history_follows_the_tokens_that_stay() -> None:
    """A stage behind a stage sees the transitions of the layers before both, for what is left."""
    model, batch = families.model("llava"), families.inputs("llava")
    stages, log = reference.spy(vtprune.create("transprune", layers=(1, 3), ratios=(0.6, 0.3)).stages(None, 4))
    with vtprune.patch(model, stages), torch.no_grad():
        model(**batch)
    (before,), (after,) = (call.units for call in log)
    kept = log[0].answers[0].idx
    early = before.signals[Signal("transition", -1)][kept]
    torch.testing.assert_close(after.signals[Signal("transition", -3)], early, rtol=0, atol=0)


def test_the_layer_itself_has_not_moved_anything_yet() -> None:
    class Early(Moved):
        @property
        def needs(self) -> tuple[Signal, ...]:
            return (Signal("transition", 0),)

    with pytest.raises(ValueError, match="negative offset"):
        vtprune.patch(families.model("llava"), Stage(1, Early(), keep=3))


def test_positions_option_reaches_every_stage() -> None:
    with vtprune.patch(families.model("llava"), "transprune", keep=0.3, positions="compact") as handle:
        assert [stage.compact for stage in handle.stages] == [True] * len(handle.stages)


@pytest.mark.parametrize("check", [calls.test_static_cache_equals_dynamic, calls.test_no_cache_equals_cache])
def test_every_way_of_calling(check: Any) -> None:
    check("llava", "transprune")
