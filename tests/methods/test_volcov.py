"""`volcov` and `auto` against the float64 oracle, on clips, and where there is nothing to read of the tower."""

from __future__ import annotations

import oracles
import pytest
import torch

import vtprune
from vtprune import Signal, Visual
from vtprune.methods.pre_llm.auto import RECOMMENDED
from vtprune.methods.pre_llm.volcov import VolCov

RECEIVED = Signal("received", None, optional=True)


def unit(n: int, k: int, **given: object) -> Visual:
    return Visual(torch.randn(n, 24), k, signals={RECEIVED: torch.rand(n) + 0.01}, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (35, 9), (40, 20)])
def test_volcov(n: int, k: int, alpha: float) -> None:
    v = unit(n, k)
    expected = oracles.volume_coverage(v.x, k, (v.signals[RECEIVED].double() ** alpha).tolist())
    answer = vtprune.create("volcov", alpha=alpha)(v)
    assert answer.order is not None
    assert answer.order.tolist() == expected
    assert answer.idx.tolist() == sorted(expected)


def test_no_frame_of_a_clip_is_a_favourite() -> None:
    """Frames in another order: the same tokens are kept, wherever their frames stand now."""
    v = unit(4 * 9, 10, grid=(4, 3, 3), video=True)
    moved = torch.arange(36).view(4, 9)[[2, 3, 1, 0]].flatten()
    other = Visual(v.x[moved], 10, v.grid, video=True, signals={RECEIVED: v.signals[RECEIVED][moved]})
    kept = [vtprune.create("volcov")(some).idx for some in (v, other)]
    assert torch.equal(kept[0], moved[kept[1]].sort().values)


def test_without_the_attention_features_decide_or_it_is_refused() -> None:
    v = unit(30, 7)
    blind = Visual(v.x, 7)
    alone = vtprune.create("volcov", alpha=0)(v)
    for name in ("volcov", "auto"):
        assert torch.equal(vtprune.create(name)(blind).idx, alone.idx)
    assert "features alone decide" in blind.state["note"]
    assert not vtprune.create("volcov", alpha=0).needs
    with pytest.raises(vtprune.UnsupportedModel, match=r"volcov needs received.*alpha=0 or fallback='features'"):
        vtprune.create("volcov", fallback="error")(blind)


def test_auto_is_the_recommended_method() -> None:
    """A stage and a recipe hold the method that `auto` stands for, and a recipe may name `auto`."""
    auto = vtprune.create("auto")
    assert not auto.reads_text
    assert auto.seam == "pre_llm"
    assert auto.resolved == RECOMMENDED
    recipe = vtprune.Recipe.of(vtprune.Stage("pre_llm", auto, keep=0.25))
    assert recipe.stages[0].method == VolCov()
    assert vtprune.Recipe.from_json(recipe.to_json()) == recipe
    named = recipe.to_json().replace('"method": "volcov"', '"method": "auto"')
    start, end = named.index('"options": {'), named.index("}", named.index('"options": {'))
    assert vtprune.Recipe.from_json(f'{named[:start]}"options": {{{named[end:]}') == recipe
    (kept,) = vtprune.select(torch.randn(30, 8), "auto", keep=7)
    assert len(kept.idx) == 7
    assert any("features alone decide" in said for said in kept.notes)
    assert vtprune.count("auto", (1, 6, 5), 7) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0: use a finite number >= 0"),
        ({"ridge": 0.0}, "ridge=0.0"),
        ({"fallback": "none"}, "fallback='none': choose 'features' or 'error'"),
        ({"memory": "much"}, "memory='much'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtprune.create("volcov", **options)
