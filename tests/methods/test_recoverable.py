"""Recoverable Compression against slow restatements in float64, and the local outlier factor by its definition."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from oracles import cosine, top
from torch import Tensor

import vtprune
from vtprune import Assignment, Signal, Visual
from vtprune.evals import parity
from vtprune.methods.lof import outliers
from vtprune.methods.shared import nearest
from vtprune.methods.text import prompt_similarity

CLS, KEYS, RECEIVED = Signal("cls_full", -1), Signal("keys", -1), Signal("received", -1, without_cls=True)
GOLDEN = ("n64_c32", "n576_c64", "n576_c128", "g18x26_c48")

# Restatements


def flagged(values: list[float], k: int) -> list[bool]:
    """Local outlier factor above 1.5; https://doi.org/10.1145/342009.335388 with exactly k neighbours."""
    n, k = len(values), min(k, len(values) - 1)
    if k < 1:
        return [False] * n
    near = [
        sorted((j for j in range(n) if j != i), key=lambda j: (abs(values[j] - values[i]), values[j]))[:k]
        for i in range(n)
    ]
    distance = [[abs(values[j] - values[i]) for j in near[i]] for i in range(n)]
    reach = [[max(d, distance[j][-1]) for d, j in zip(distance[i], near[i])] for i in range(n)]
    density = [1 / (sum(r) / k + 1e-10) for r in reach]
    return [sum(density[j] for j in near[i]) / k / density[i] > 1.5 for i in range(n)]


def recover(
    x: Tensor, a: Tensor, sim: Tensor, keys: Tensor, faithful: bool, budget: int | None = None, nearest: int = 32
) -> tuple[list[int], Tensor]:
    """https://arxiv.org/abs/2409.01179: tokens in the official order and their features."""
    n, scores, text = len(a), a.double(), sim.double()

    def split(vision: int, words: int) -> tuple[list[int], list[int], Tensor]:
        v = top(scores, vision)
        rest = [j for j in range(n) if j not in v]
        t = [rest[i] for i in top(text[rest], words)]
        hidden = text.clone()
        hidden[v] = text.min()
        return sorted(v + t), [j for j in rest if j not in t], hidden

    vision = sum(flagged(scores.tolist(), 20))
    words = (n - vision) * sum(flagged(split(vision, 0)[2].tolist(), 20)) // n
    main, rest, _ = split(vision, words)
    odd = sum(flagged(scores[rest].tolist(), 10))
    centres = min(keys.shape[1] * odd // max(len(rest), 1) if faithful else odd, len(rest) - 1)
    counts = [vision, words, centres + 1 if centres > 0 else 0]
    counts[0] += not any(counts)
    if budget is not None:
        shares = [Fraction(sum(counts[:i]), sum(counts)) * budget for i in range(4)]
        edges = [int(share + Fraction(1, 2)) for share in shares]
        counts = [b - a for a, b in pairwise(edges)]
        over = max(0, counts[2] - max(1, budget // 8))
        counts = [counts[0] + over, counts[1], counts[2] - over]
    main, rest, _ = split(counts[0], counts[1])
    best = [rest[i] for i in top(scores[rest], counts[2])]
    order, features = main + best, [x[j].double() for j in main]
    for c in best[:-1]:
        others = [j for j in rest if j != c]
        key = {j: keys[rest.index(j) if faithful else j].double() for j in rest}
        like = torch.tensor([cosine(key[c], key[j]) + 50 * float(text[j]) for j in others], dtype=torch.float64)
        taken = [others[i] for i in top(like, nearest)]
        features.append(x[c].double() + sum(scores[j] * x[j].double() for j in taken))
    if best:
        features.append(sum((scores[j] * x[j].double() for j in rest if j not in best[:-1]), torch.zeros_like(x[0])))
    return order, torch.stack(features)


def unit(n: int, seed: int = 0, budget: int | None = None, words: int = 4, **fields: Any) -> Visual:
    """Skewed CLS scores, so that there are outliers."""
    g = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(n, generator=g)).softmax(0)
    keys = torch.randn(n, 12, generator=g)
    return Visual(
        torch.randn(n, 8, generator=g),
        budget,
        **{"signals": {CLS: scores, KEYS: keys}, "text": torch.randn(words, 8, generator=g), **fields},
    )


def restated(v: Visual, faithful: bool) -> tuple[list[int], Tensor]:
    sim = prompt_similarity(replace(v, state={}))
    return recover(v.x, v.signals[CLS], sim, v.signals[KEYS], faithful, v.budget)


def ordered(answer: Assignment, x: Tensor) -> Tensor:
    assert answer.order is not None
    return answer.apply(x)[torch.searchsorted(answer.idx, answer.order)]


# Local outlier factor


@pytest.mark.parametrize("k", [1, 2, 10, 20, 100])
@pytest.mark.parametrize("n", [1, 2, 3, 21, 150])
@pytest.mark.parametrize("kind", ["normal", "skewed", "ties", "repeats", "constant"])
def test_outliers(kind: str, n: int, k: int) -> None:
    values = torch.randn(n)
    values = {
        "normal": values,
        "skewed": (2 * values).softmax(0),
        "ties": (6 * values).round(),
        "repeats": torch.where(torch.arange(n) % 3 == 0, values.min(), values),
        "constant": torch.ones(n),
    }[kind]
    assert outliers(values, k).tolist() == flagged(values.double().tolist(), k)


def test_outliers_as_in_scikit_learns_documentation() -> None:
    """LocalOutlierFactor(n_neighbors=2).fit_predict([[-1.1], [0.2], [101.1], [0.3]]) is [1, 1, -1, 1]."""
    assert outliers(torch.tensor([-1.1, 0.2, 101.1, 0.3]), 2).tolist() == [False, False, True, False]


def test_equal_distances_do_not_depend_on_the_order_of_values() -> None:
    values = torch.tensor([0.0, 0.0, 5.0, 8.0, 9.0, 20.0, -3.0, 10.0, 5.0])
    mixed = torch.randperm(9)
    for k in range(1, 9):
        assert torch.equal(outliers(values[mixed], k), outliers(values, k)[mixed])


@pytest.mark.parametrize("left", [0, 1, 2, 8, 60])
def test_outliers_among_some(left: int) -> None:
    values = torch.randn(60).exp()
    among = torch.zeros(60, dtype=torch.bool)
    among[torch.randperm(60)[:left]] = True
    found = outliers(values, 10, among)
    assert not found[~among].any()
    assert torch.equal(found[among], outliers(values[among], 10))


@pytest.mark.parametrize("name", GOLDEN)
def test_outlier_ratios_of_the_official_code(name: str, shared: Path) -> None:
    with np.load(shared / "golden" / f"recoverable_{name}.npz") as stored:
        q, k = (torch.from_numpy(stored[p])[0] for p in ("q_proj_out", "k_proj_out"))
        row = (q[0] @ k.T / q.shape[1] ** 0.5).softmax(0)[1:]
        text = torch.from_numpy(stored["text_similarity"]).flatten()
        text[stored["idx_vision"]] = text.min()
        rest = torch.ones(len(row), dtype=torch.bool)
        rest[stored["kept_main"]] = False
        for which, values, k, among in (
            ("vision", row, 20, None),
            ("text", text, 20, None),
            ("rest", row, 10, rest),
        ):
            of = len(row) if among is None else int(among.sum())
            assert int(outliers(values, k, among).sum()) / of == stored[f"lof_ratio_{which}"]


# The method


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize(("n", "seed"), [(20, 0), (33, 1), (64, 2), (64, 3), (150, 4), (150, 5)])
def test_adaptive(n: int, seed: int, faithful: bool) -> None:
    v = unit(n, seed)
    answer = vtprune.create("recoverable", faithful=faithful)(v)
    order, features = restated(v, faithful)
    assert answer.order is not None
    assert answer.order.tolist() == order
    assert torch.allclose(ordered(answer, v.x).double(), features, atol=1e-5)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("budget", [1, 2, 3, 9, 16, 40, 59])
def test_budget(budget: int, faithful: bool) -> None:
    for seed in range(3):
        v = unit(60, seed, budget)
        answer = vtprune.create("recoverable", faithful=faithful)(v)
        order, features = restated(v, faithful)
        assert answer.order is not None
        assert answer.order.tolist() == order
        assert torch.allclose(ordered(answer, v.x).double(), features, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 150, 500])
def test_blocks_of_centres_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    v = unit(150, 4)
    whole = vtprune.create("recoverable")(v).apply(v.x)
    monkeypatch.setattr(nearest, "CELLS", cells)
    assert torch.allclose(vtprune.create("recoverable")(v).apply(v.x), whole, atol=1e-6)


def test_the_cases_above_recover_and_merge() -> None:
    """Else they would test little: text tokens, several centres, and a difference between the variants."""
    v = unit(150, 4)
    none = vtprune.create("recoverable", text_similarity=lambda v: torch.zeros(v.n))(v)
    plain, official = (vtprune.create("recoverable", faithful=f)(v) for f in (False, True))
    assert plain.src is not None
    assert len(plain.src) > len(plain.idx) + 2 * 32 + 150 - 1
    assert not torch.equal(plain.idx, none.idx)
    assert len(plain.idx) > len(official.idx)


def test_parity_with_the_official_outputs(shared: Path) -> None:
    rows = parity.run(shared / "golden", ["recoverable"])
    assert [row.case for row in rows] == sorted(f"recoverable_{name}" for name in GOLDEN)
    assert {row.status for row in rows} == {"passed"}, rows


@pytest.mark.parametrize("name", GOLDEN)
def test_corrected_variant_differs_where_it_should(name: str, shared: Path) -> None:
    """The tokens kept for image and text are the official ones; the number of centres follows the tokens left."""
    with np.load(shared / "golden" / f"recoverable_{name}.npz") as stored:
        q, k = (torch.from_numpy(stored[p])[0] for p in ("q_proj_out", "k_proj_out"))
        row = (q[0] @ k.T / q.shape[1] ** 0.5).softmax(0)[1:]
        x, text = torch.from_numpy(stored["hidden"])[0, 1:], torch.from_numpy(stored["text_similarity"]).flatten()
        main, ratio = stored["kept_main"], float(stored["lof_ratio_rest"])
    v = Visual(x, None, signals={CLS: row, KEYS: k[1:]})
    answer = vtprune.create("recoverable", text_similarity=lambda _: text)(v)
    order, features = recover(x, row, text, k[1:], faithful=False)
    assert answer.order is not None
    assert answer.order.tolist() == order
    assert order[: len(main)] == main.tolist()
    assert len(order) == len(main) + round(ratio * (len(x) - len(main))) + 1
    assert torch.allclose(ordered(answer, x).double(), features, atol=1e-4)


def test_bare_cases() -> None:
    """No outliers, no text, a single token, a nearest= larger than what is left: all keep something."""
    method = vtprune.create("recoverable")
    flat = unit(50, signals={CLS: torch.full((50,), 0.02), KEYS: torch.randn(50, 4)}, text=None)
    assert method(flat).idx.tolist() == [0]
    assert not method(flat).merges
    for n in (1, 2, 3):
        for budget in (None, *range(1, n + 1)):
            answer = method(unit(n, budget=budget))
            assert len(answer.idx) == (budget or len(answer.idx)) >= 1
            assert answer.apply(torch.ones(n, 8)).isfinite().all()
    for text in (None, torch.empty(0, 8)):
        v = unit(150, 4, text=text)
        assert torch.equal(
            method(v).idx, vtprune.create("recoverable", text_similarity=lambda v: torch.zeros(v.n))(v).idx
        )
        assert "no text" in v.state["note"]


def test_everything_kept_is_left_alone() -> None:
    v = unit(60, budget=60)
    answer = vtprune.create("recoverable")(v)
    assert torch.equal(answer.apply(v.x), v.x)


def test_says_where_the_text_similarity_is_from() -> None:
    v = unit(60)
    vtprune.create("recoverable")(v)
    assert "LLM's own embeddings" in v.state["note"]
    given = unit(60)
    vtprune.create("recoverable", text_similarity=lambda v: torch.rand(v.n))(given)
    assert "note" not in given.state


def test_text_recovers_what_it_names() -> None:
    """A token whose feature is a word's embedding stays, whatever the CLS token thinks of it."""
    v = unit(150, 4)
    lowest = int(v.signals[CLS].argmin())
    named = replace(v, text=torch.cat([v.text, 3 * v.x[lowest : lowest + 1]]))  # type: ignore[list-item]
    assert lowest not in vtprune.create("recoverable")(v).idx
    assert lowest in vtprune.create("recoverable")(named).idx


def test_without_cls_token() -> None:
    received, keys = torch.rand(60), torch.randn(60, 4)
    v = unit(60, budget=9, signals={RECEIVED: received, KEYS: keys})
    same = unit(60, budget=9, signals={CLS: received, KEYS: keys})
    method = vtprune.create("recoverable")
    assert torch.equal(method(v).idx, method(same).idx)
    assert "no CLS token" in v.state["note"]
    assert "LLM's own embeddings" in v.state["note"]
    with pytest.raises(vtprune.UnsupportedModel, match="fallback='received'"):
        vtprune.create("recoverable", fallback="error")(v)
    assert RECEIVED not in vtprune.create("recoverable", fallback="error").needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nearest": 0}, "nearest=0"),
        ({"neighbours": (20, 0, 10)}, r"neighbours=\(20, 0, 10\)"),
        ({"fallback": "mean"}, "fallback='mean'"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create("recoverable", **options)


def test_bad_similarities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text_similarity answered \[1, 60\]"):
        vtprune.create("recoverable", text_similarity=lambda v: torch.rand(1, v.n))(unit(60))
    with pytest.raises(ValueError, match="text similarities of unit 0 hold 60 NaN"):
        vtprune.create("recoverable", text_similarity=lambda v: torch.rand(v.n) / 0 * 0)(unit(60))


def test_one_read_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    tolist = Tensor.tolist
    units = [unit(60, seed) for seed in range(4)] + [unit(40, 9, budget=5)]
    one_by_one = [vtprune.create("recoverable")(v) for v in units]
    with vtprune.kernels.deferring():  # type: ignore[attr-defined]
        monkeypatch.setattr(Tensor, "tolist", lambda t: (reads.append(t), tolist(t))[1])
        together = vtprune.create("recoverable").batch(units)
    assert len(reads) == 1
    for a, b in zip(one_by_one, together):
        assert torch.equal(a.idx, b.idx)


@torch.no_grad()
def test_in_a_model() -> None:
    """The method decides how many tokens stay, image by image; a batch equals its rows."""
    model, batch = families.model("llava"), families.inputs("llava", rows=(2, 1))
    with vtprune.patch(model, "recoverable") as handle:
        model(**batch)
        last = handle.last
        assert last is not None
        kept = [u.idx.tolist() for u in last.units]
        assert all(1 <= len(idx) < u.n for idx, u in zip(kept, last.units))
        assert any("LLM's own embeddings" in note for note in last.notes)
        alone = []
        for row in range(2):
            model(**families.inputs("llava", rows=(2, 1), only=row))
            assert handle.last is not None
            alone += [u.idx.tolist() for u in handle.last.units]
    assert kept == alone


@torch.no_grad()
@pytest.mark.parametrize("family", families.NAMES)
@pytest.mark.parametrize("method", ["recoverable", "token_correlation"])
def test_images_change_places(family: str, method: str) -> None:
    """Two images keep the same tokens in either order, with a budget and without; text alone passes through."""
    generator, known = torch.Generator().manual_seed(5), families.FAMILIES[family]
    shared_row = [known.visual(size, generator, True) for size in (known.sizes[0], known.sizes[-1])]
    model, words = families.model(family), [families.text(1), families.text(2)]
    dense = model(**families.build(family, [words])).logits
    for keep in (None, 0.3):
        kept = []
        with vtprune.patch(model, method, keep=keep) as handle:
            for first, second in (shared_row, shared_row[::-1]):
                pieces = [first, second] if known.visual_first else [words[0], first, words[0], second]
                model(**families.build(family, [[*pieces, words[1]]]))
                assert handle.last is not None
                kept.append([u.idx.tolist() for u in handle.last.units])
            assert torch.equal(model(**families.build(family, [words])).logits, dense)
        units = len(families.build(family, [[shared_row[0]]]).units[0])  # of the first image: tiles, in some families
        assert kept[1] == kept[0][units:] + kept[0][:units]
