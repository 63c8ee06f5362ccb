"""MMTok against sums over all words and tokens in float64, where its words come from, and input meant to break it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Signal, UnsupportedModel, Visual
from vtprune.methods.shared.text import keywords

HIDDEN = Signal("hidden", None, optional=True)
TABLE = {word: i for i, word in enumerate(("colour", "of", "car", "what", "is", "it", "cat", "What", "it?"))}


def unit(n: int, k: int | None, words: int | None = 4, seed: int = 0, **fields: Any) -> Visual:
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, 5, generator=g), torch.randn(n, 7, generator=g)
    text = None if words is None else torch.randn(words, 5, generator=g)
    return Visual(x, k, signals={HIDDEN: z}, text=text, **fields)


def embed(words: Sequence[str]) -> Tensor:
    return torch.randn(len(TABLE), 5, generator=torch.Generator().manual_seed(7))[[TABLE[word] for word in words]]


def oracle(
    v: Visual, words: Tensor | None, k: int, alpha: float = 0.5, image: float = 0.2, text: float = 0.02,
    excluded: Sequence[int] = (),
) -> list[int]:  # fmt: skip
    rows = []
    for w in () if words is None else words.double():
        e = [float(torch.tensor(oracles.cosine(w, x) / text, dtype=torch.float64).exp()) for x in v.x.double()]
        rows.append([value / sum(e) / len(words) for value in e])  # type: ignore[arg-type]
    given = torch.tensor(rows, dtype=torch.float64) if rows else None
    m = oracles.facility_matrix(v.signals.get(HIDDEN, v.x), given, image, alpha)
    return oracles.facility(m, k, excluded=excluded)


def order(v: Visual, **options: Any) -> list[int]:
    found = vtprune.create("mmtok", **options)(v)
    assert found.order is not None
    assert found.idx.tolist() == sorted(set(found.order.tolist()))
    return found.order.tolist()


@pytest.mark.parametrize("words", [1, 6, None])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 2.0, "image_temperature": 0.1}, {"text_temperature": 0.01, "memory": "low"}]
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (29, 9), (40, 20)])
def test_it_equals_the_oracle(n: int, k: int, options: dict[str, Any], words: int | None) -> None:
    v = unit(n, k, words)
    named = {"alpha": "alpha", "image_temperature": "image", "text_temperature": "text"}
    expected = oracle(v, v.text, k, **{named[o]: value for o, value in options.items() if o in named})
    assert order(v, **options) == expected


def test_without_text_the_image_alone_decides() -> None:
    v = unit(30, 8)
    alone = oracle(v, None, 8)
    assert order(v) != alone
    assert order(v, use_text=False) == alone
    assert vtprune.create("mmtok").reads_text is True
    assert vtprune.create("mmtok", use_text=False).reads_text is False
    for words in (None, 0):
        bare = unit(30, 8, words)
        assert order(bare) == oracle(bare, None, 8)
        assert "no text" in bare.state["note"]


def test_a_question_in_words_takes_the_place_of_the_prompt() -> None:
    v = unit(30, 8)
    asked = {"question": "<image>\nWhat is the colour of the car?", "embed": embed}
    assert order(v, **asked) == oracle(v, embed(["colour", "of", "car"]), 8)
    assert order(v, **asked, stop_words=("the", "what", "is", "of")) == oracle(v, embed(["colour", "car"]), 8)
    only = {"question": "What is it?", "embed": embed}
    assert order(v, **only) == oracle(v, embed(["What", "is", "it?"]), 8)


def test_each_prompt_has_its_own_question() -> None:
    """Two crops of one prompt and one of another; as many questions as prompts, or an error: none is guessed."""
    first, second = unit(20, 6, seed=1), unit(25, 6, seed=2)
    crop = Visual(second.x, 6, signals=second.signals, text=first.text)
    units = [first, crop, second]
    each = [vtprune.create("mmtok").batch(units)[i].order for i in range(3)]
    assert [o.tolist() for o in each if o is not None] == [oracle(v, v.text, 6) for v in units]
    method = vtprune.create("mmtok", question=("car", "cat"), embed=embed)
    found = [answer.order.tolist() for answer in method.batch(units) if answer.order is not None]
    assert found == [oracle(v, embed([word]), 6) for v, word in zip(units, ("car", "car", "cat"))]
    for question in ("car", ("car", "cat", "cat")):
        with pytest.raises(ValueError, match=r"mmtok has \d questions for 2 prompts: pass question=.*question=None"):
            vtprune.create("mmtok", question=question, embed=embed).batch(units)


@pytest.mark.parametrize("size", [(100, 200), (200, 100), (480, 640), (100, 100)])
def test_tokens_of_the_border_are_picked_last(size: tuple[int, int]) -> None:
    side = 8
    v = unit(side * side, 12, grid=(1, side, side))
    pixels = side * 14
    border = (pixels - round(pixels * min(size) / max(size))) // 2 // 14
    lines = [*range(border), *range(side - border, side)]
    at = [(i, j) for i in range(side) for j in range(side)]
    out = [n for n, (i, j) in enumerate(at) if (i if size[1] > size[0] else j) in lines]
    assert order(v, padding=size) == oracle(v, v.text, 12, excluded=out)
    mask = torch.zeros(side * side, dtype=torch.bool)
    mask[out] = True
    assert order(v, padding=lambda _: mask) == oracle(v, v.text, 12, excluded=out)


def test_a_border_that_leaves_too_few_tokens_fills_the_budget() -> None:
    v = unit(16, 10, grid=(1, 4, 4))
    assert order(v, padding=lambda _: torch.ones(16, dtype=torch.bool)) == order(v)
    few = order(v, padding=lambda _: torch.arange(16) > 4)
    assert sorted(few[:5]) == [0, 1, 2, 3, 4]
    assert len(set(few)) == 10
    for bad in (unit(16, 4), unit(15, 4, grid=(1, 3, 5)), unit(32, 4, grid=(2, 4, 4))):
        with pytest.raises(ValueError, match=r"padding=\(3, 4\).*square raster"):
            order(bad, padding=(3, 4))
    with pytest.raises(ValueError, match=r"padding answered torch.int64 \[3\]: it owes one bool to each of 16"):
        order(v, padding=lambda _: torch.zeros(3, dtype=torch.int64))


def test_what_cannot_be_read_is_replaced_or_refused() -> None:
    v = unit(20, 5)
    bare = Visual(v.x, 5, text=v.text)
    assert order(bare) == oracle(bare, v.text, 5)
    assert "projected tokens are compared" in bare.state["note"]
    with pytest.raises(UnsupportedModel, match=r"mmtok needs hidden.*features_fallback='features'"):
        order(bare, features_fallback="error")
    with pytest.raises(ValueError, match="text embeddings of unit 0 hold 1 NaN or Inf"):
        order(Visual(v.x, 5, text=torch.tensor([[1.0, 2, 3, 4, torch.inf]])))
    with pytest.raises(ValueError, match=r"words are \[2, 3\], expected \[M, 5\] embeddings"):
        order(Visual(v.x, 5, text=torch.ones(2, 3)))


def test_keywords() -> None:
    assert keywords("Is the cat NOT on a mat?") == ["cat", "NOT", "on", "mat"]
    assert keywords("What is it?\nAnswer the question using a single word or phrase.") == ["What", "is", "it?"]
    assert keywords("a cat?", ()) == ["a", "cat?"]
    request = "Answer with the option's letter from the given choices directly."
    assert keywords(request) == request.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0: use a finite number > 0"),
        ({"image_temperature": -1.0}, "image_temperature=-1.0"),
        ({"text_temperature": float("inf")}, "text_temperature=inf"),
        ({"question": "a cat"}, r"question='a cat' with embed=None.*embed=\.\.\."),
        ({"question": "a cat", "embed": embed, "use_text": False}, "use_text=False"),
        ({"question": " ?", "embed": embed}, r"question=' \?' has no words.*use_text=False"),
        ({"question": ("a cat", ""), "embed": embed}, "question='' has no words"),
        ({"features_fallback": "none"}, "features_fallback='none'"),
        ({"memory": "much"}, "memory='much'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create("mmtok", **options)
