"""DART against a plain restatement, and the order in which its pivots take tokens."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Visual
from vtprune.methods.in_llm.dart import SIZE, STATES, TEXT_SIZE, TEXT_STATES


def unit(n: int, t: int, budget: int | None, seed: int = 0, equal: bool = False) -> Visual:
    """n visual tokens and t of text; equal: sizes of keys come in three kinds only, and states repeat."""
    g = torch.Generator().manual_seed(seed)
    states, words = torch.randn(n, 6, generator=g), torch.randn(t, 6, generator=g)
    sizes, said = torch.rand(n, generator=g), torch.rand(t, generator=g)
    if equal:
        sizes, said, states = (3 * sizes).floor(), (3 * said).floor(), states[torch.arange(n) // 2]
    signals = {SIZE: sizes, STATES: states, TEXT_SIZE: said, TEXT_STATES: words}
    return Visual(torch.zeros(n, 2), budget, signals=signals)


def cosine(a: list[float], b: list[float]) -> float:
    length = sum(x * x for x in a) ** 0.5 * sum(x * x for x in b) ** 0.5
    return sum(x * y for x, y in zip(a, b)) / length


def by_hand(v: Visual, takes: list[int], pivots: int, text_pivots: int, order: list[int] | None = None) -> list[int]:
    """takes: tokens of each pivot in turn; order: of the pivots, visual ones first, which is "rank"."""

    def top(x: Tensor, count: int) -> list[int]:
        return sorted(range(len(x)), key=lambda i: (-x[i].item(), i))[:count]

    image, text = top(v.signals[SIZE], pivots), top(v.signals[TEXT_SIZE], text_pivots)
    x, words = v.signals[STATES].double().tolist(), v.signals[TEXT_STATES].double().tolist()
    rows = [x[i] for i in image] + [words[i] for i in text]
    left, kept = [i for i in range(v.n) if i not in image], list(image)
    for pivot, count in zip(order or range(len(rows)), takes, strict=True):
        # Float32 knows no more than seven digits of a cosine: equal ones to the lower index.
        taken = sorted(left, key=lambda i: (round(cosine(rows[pivot], x[i]), 6), i))[:count]
        kept += taken
        left = [i for i in left if i not in taken]
    return sorted(kept)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize(("n", "t", "budget"), [(40, 9, 20), (63, 2, 30), (9, 5, 9), (9, 5, 6), (5, 1, 2), (1, 1, 1)])
def test_exact_budgets(n: int, t: int, budget: int, equal: bool) -> None:
    v = unit(n, t, budget, seed=n, equal=equal)
    image = min(4, n, budget)
    number = image + min(4, t)
    takes = [(budget - image) // number + (i < (budget - image) % number) for i in range(number)]
    answer = vtprune.create("dart")(v)
    assert answer.idx.tolist() == by_hand(v, takes, image, 4)
    assert answer.order is not None
    assert len(answer.idx) == budget


@pytest.mark.parametrize(
    ("n", "options", "kept"),
    [
        (576, {}, 132),
        (576, {"count": None, "reduction": 0.889}, 60),
        (576, {"count": 192}, 196),
        (64, {"count": None, "reduction": 0.778, "pivots": 3, "text_pivots": 1}, 15),
        (64, {"count": None, "reduction": 0.0}, 60),  # what the pivots can share out evenly
        (3, {}, 3),
        (7, {"text_pivots": 0}, 4),
    ],
)
def test_official_counts(n: int, options: dict[str, Any], kept: int) -> None:
    """4 + 8 * (128 // 8) = 132, and so on; never more than there are."""
    assert len(vtprune.create("dart", **options)(unit(n, 20, None)).idx) == kept


@pytest.mark.parametrize("start", [0, 5, 35, 100])
def test_the_order_of_a_cpython_set(start: int) -> None:
    v = unit(60, 12, 24, seed=start)
    v.signals[STATES].add_(1)  # all alike, so that who takes first matters
    method: Any = vtprune.create("dart", pivot_order="cpython_set", image_start=start)
    image = sorted(range(60), key=lambda i: -v.signals[SIZE][i].item())[:4]
    text = sorted(range(12), key=lambda i: -v.signals[TEXT_SIZE][i].item())[:4]
    places = [start + i for i in image] + [start + 60 + i for i in text]
    walked: set[int] = set()
    for place in places:
        walked.add(place)
    order = [places.index(place) for place in walked]
    takes = [3, 3, 3, 3, 2, 2, 2, 2]
    assert method(v).idx.tolist() == by_hand(v, takes, 4, 4, order)
    assert vtprune.create("dart")(v).idx.tolist() == by_hand(v, takes, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "layer=0"),
        ({"pivots": 0}, "pivots=0"),
        ({"text_pivots": -1}, "text_pivots=-1: use an int >= 0"),
        ({"count": 0}, "count=0"),
        ({"reduction": 1.5}, "reduction=1.5"),
        ({"pivot_order": "hash"}, "pivot_order='hash': choose 'rank' or 'cpython_set'"),
        ({"image_start": -1}, "image_start=-1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create("dart", **options)


def test_states_and_keys_are_the_models_own() -> None:
    """In a stock LLaMA: what leaves layer 1 through the final norm, and keys behind their rotary embedding."""
    model, batch = families.fresh("llava"), families.inputs("llava")
    seen: list[Visual] = []

    class Watch(type(vtprune.create("dart"))):  # type: ignore[misc]
        def __call__(self, v: Visual) -> Any:
            seen.append(v)
            return super().__call__(v)

    with torch.no_grad():
        out = model.model(**batch, output_hidden_states=True, use_cache=True)
        with vtprune.patch(model, vtprune.Stage(2, Watch(), keep=8)):
            model(**batch)
    (v,), (image,) = seen, batch.units[0]
    states = model.get_decoder().norm(out.hidden_states[2][0])
    keys = out.past_key_values.layers[1].keys[0].abs().sum((0, 2))
    text = slice(image[-1] + 1, None)
    for need, want in (
        (STATES, states[image]),
        (SIZE, keys[image]),
        (TEXT_STATES, states[text]),
        (TEXT_SIZE, keys[text]),
    ):
        torch.testing.assert_close(v.signals[need], want, rtol=1e-5, atol=1e-5)
