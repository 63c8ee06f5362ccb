"""`vtprune.count` says how many tokens `vtprune.select` leaves, or refuses by name where only features can tell."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vtprune
from vtprune import Span, Stage

BEFORE = [cls.name for cls in vtprune.methods() if cls.seam == "pre_llm"]
WIDE = {"hidden", "keys", "mean_keys"}  # kinds of signals that hold a vector for every token

# A mosaic of 4 rows of 5 from four tiles, each row with a newline, behind an overview; then the same with a separator
# between the two and one behind.
ANYRES = (Span(0, (1, 3, 3)), Span(9, (1, 4, 5), newline=True, tiles=((2, 2), (3, 2))))
SEPARATED = (Span(0, (1, 3, 3)), Span(10, (1, 4, 5), newline=True, tiles=((2, 2), (3, 2))))
Layout = dict[str, Any]
LAYOUTS: dict[str, Layout] = {
    "one token": {"grid": [(1, 1, 1)]},
    "a line": {"sizes": [7]},
    "not square": {"grid": [(1, 5, 6)]},
    "a video": {"grid": [(4, 3, 5)]},
    "a mosaic": {"spans": [ANYRES]},
    "separators": {"spans": [SEPARATED], "sizes": [35]},
    "a batch": {"grid": [(1, 4, 4), (1, 2, 7), (3, 2, 2)], "rows": [0, 1, 2]},
    "several in a row": {"grid": [(1, 4, 4), (1, 2, 7), (1, 4, 4)], "rows": [0, 0, 1]},
    "mosaics in rows": {"spans": [ANYRES, (Span(0, (1, 3, 3)),), ANYRES], "rows": [0, 1, 1]},
    "a raster of frames": {"grid": [(6, 2, 3)], "video": True},
}
BUDGETS: list[dict[str, Any]] = [
    {"keep": 0.1},
    {"keep": 1.0},
    {"keep": 5},
    {"keep_total": 0.5},
    {"keep_total": 12},
]
POLICIES = [
    {"per": per, "newlines": newlines}
    for per, newlines in itertools.product(["image", "crop", "frame", "sample"], ["compete", "keep", "drop"])
]


@dataclass
class Encoded:
    """Random features of every image of a layout, and every signal that a method reads of them."""

    sizes: list[int]
    seed: int = 0

    def of(self, stage: Stage) -> dict[str, Any]:
        g = torch.Generator().manual_seed(self.seed)
        features = [torch.randn(n, 8, generator=g) for n in self.sizes]
        kinds = {need.kind for need in stage.needs}
        signals = [
            {kind: torch.rand((n, 8) if kind in WIDE else (n,), generator=g) for kind in sorted(kinds)}
            for n in self.sizes
        ]
        return {"features": features, "signals": signals}


def sizes_of(layout: Layout) -> list[int]:
    if "sizes" in layout:
        return list(layout["sizes"])
    if "grid" in layout:
        return [t * h * w for t, h, w in layout["grid"]]
    return [max(span.start + len(span) for span in spans) for spans in layout["spans"]]


def selected(stages: list[Stage], layout: Layout) -> list[int]:
    """What is left of each image once the methods have chosen."""
    sizes = sizes_of(layout)
    rows = layout.get("rows", [0] * len(sizes))
    text = [torch.randn(4, 8, generator=torch.Generator().manual_seed(row)) for row in range(rows[-1] + 1)]
    there = {key: value for key, value in layout.items() if key != "sizes"}
    signals: list[dict[str, Any]] = [{} for _ in sizes]
    for stage in stages:
        given = Encoded(sizes).of(stage)
        for own, more in zip(signals, given["signals"]):
            own |= more
    found = vtprune.select(given["features"], stages, signals=signals, text=text, **there)
    return [len(image.idx) for image in found]


def agree(stages: list[Stage], layout: Layout) -> bool:
    """Check that `count` tells what `select` keeps, or refuses for a cause that holds; True where it tells."""
    try:
        counted = vtprune.count(stages, **layout)
    except ValueError as error:
        refusal = str(error)
    else:
        assert counted == selected(stages, layout)
        return True
    if "at least one each is needed" in refusal:
        with pytest.raises(ValueError, match=re.escape(refusal)):
            selected(stages, layout)
    elif len(stages) == 1:
        told = re.search(r"images ([\d, ]+) of row (\d+) compete .* keep (\d+) of (\d+) tokens together", refusal)
        assert told, refusal
        images = [int(i) for i in told[1].split(", ")]
        left, sizes = selected(stages, layout), sizes_of(layout)
        assert sum(left[i] for i in images) == int(told[3])
        assert sum(sizes[i] for i in images) == int(told[4])
        assert {layout["rows"][i] for i in images} == {int(told[2])}
    else:
        assert re.search("comes behind a stage that lets|compete for one budget: they keep", refusal)
    return False


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BEFORE)
def test_it_tells_what_select_keeps(name: str, layout: str) -> None:
    method = vtprune.create(name)
    told = 0
    for policy, budget in itertools.product(POLICIES, BUDGETS):
        told += agree([Stage("pre_llm", method, **budget, **policy)], LAYOUTS[layout])
    assert told >= len(POLICIES) * len(BUDGETS) // 2
    for budget in BUDGETS:  # and the policy of the method itself
        agree([Stage("pre_llm", method, **budget)], LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_behind_each_other(layout: str) -> None:
    """Whatever the policies of the two are; a refusal names the stage that would have to know more."""
    told = 0
    for first, second in itertools.product(POLICIES, POLICIES):
        stages = [
            Stage("pre_llm", vtprune.create("divprune"), keep=0.6, **first),
            Stage("pre_llm", vtprune.create("random"), keep=0.3, **second),
        ]
        if agree(stages, LAYOUTS[layout]):
            told += 1
        else:
            assert "sample" in (first["per"], second["per"])
            assert len(LAYOUTS[layout].get("rows", [])) > 1
    assert told > 70


def test_a_stage_behind_parts_that_competed_is_refused() -> None:
    """How many tokens the crops and the newlines of an image lose to each other is known from features alone."""
    kinds = ({"per": "crop", "newlines": "keep"}, {"per": "image", "newlines": "compete"}, {"per": "crop"})
    stages = [Stage("pre_llm", vtprune.create("divprune"), keep=k, **kind) for k, kind in zip((0.9, 0.6, 0.3), kinds)]
    assert vtprune.count(stages[:2], spans=ANYRES) == selected(stages[:2], {"spans": [ANYRES]})[0]
    with pytest.raises(ValueError, match="divprune comes behind a stage that lets parts of an image"):
        vtprune.count(stages, spans=ANYRES)


@pytest.mark.parametrize("cls", vtprune.methods(), ids=lambda cls: cls.name)
def test_every_method_counts_or_refuses_by_name(cls: type[vtprune.Method]) -> None:
    name, method = cls.name, vtprune.create(cls.name)
    if name in BEFORE:
        assert vtprune.count(name, (2, 4, 4), 0.5) == 16
    else:
        with pytest.raises(ValueError, match=f"^{name} acts inside a model"):
            vtprune.count(name, (2, 4, 4), 0.5)
    if method.of == "heads" or "prefill" not in method.phases:
        with pytest.raises(ValueError, match=f"^{name} chooses among"):
            vtprune.count(Stage("pre_llm", method, keep=0.5), (2, 4, 4))
    elif method.exact:
        assert vtprune.count(Stage("pre_llm", method, keep=0.5), (2, 4, 4)) == 16
    with pytest.raises(ValueError, match=f"^{method.resolved.name} at 2 acts inside a model"):
        vtprune.count(Stage(2, method, keep=0.5), (2, 4, 4))
    if method.adaptive and name in BEFORE:
        with pytest.raises(ValueError, match=f"^{name} without a budget decides"):
            vtprune.count(name, (2, 4, 4))


def test_one_image_is_a_number_and_a_list_is_a_list() -> None:
    assert vtprune.count("divprune", (1, 24, 24), 0.25) == 144
    assert vtprune.count("divprune", [(1, 24, 24)], 0.25) == [144]
    assert vtprune.count("divprune", [(1, 24, 24), (1, 12, 20)], keep=64) == [64, 64]
    assert vtprune.count("divprune", keep=0.5, sizes=9) == 4
    assert vtprune.count("divprune", (1, 3, 3), keep=0.5, sizes=[9, 9]) == [4, 4]
    assert vtprune.count("divprune", spans=ANYRES, keep=0.5, newlines="drop") == 14
    recipe = vtprune.Recipe.of(Stage("pre_llm", vtprune.create("divprune"), keep=0.5))
    assert vtprune.count(recipe, [(1, 3, 3)]) == [4]


def test_clips_of_a_row() -> None:
    with pytest.raises(ValueError, match=r"evs .*images 1, 2, 3 of row 0 .* keep 14 of 27 tokens together"):
        vtprune.count("evs", [(1, 3, 3)] * 4, 0.5, per="sample", clips=(1, 3))
    assert vtprune.count("evs", [(1, 3, 3)] * 2, 0.5, per="sample", clips=(1, 1)) == [4, 4]


def test_a_method_that_may_fall_short_counts_only_what_stays_whole() -> None:
    short = vtprune.create("hiprune", exact_budget=False)
    with pytest.raises(ValueError, match=r"^hiprune may keep fewer tokens than its budget"):
        vtprune.count(short, (1, 4, 4), 0.5)
    assert vtprune.count(short, (1, 4, 4), 1.0) == 16


def test_it_counts_where_the_default_device_holds_no_numbers() -> None:
    """An engine builds its models on the device "meta", and asks for counts meanwhile."""
    with torch.device("meta"):
        assert vtprune.count("divprune", (1, 5, 7), 0.5, per="crop") == 18


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"image 0 has neither a grid nor spans nor a size: pass grid=\(t, h, w\)"),
    ({"grid": []}, ValueError, "empty list"),
    ({"grid": [(1, 2, 2), None]}, ValueError, "image 1 has neither"),
    ({"grid": (1, 0, 2)}, TypeError, r"grid=\(1, 0, 2\): pass \(t, h, w\)"),
    ({"grid": "square"}, TypeError, "grid='square'"),
    ({"grid": (1, 2, 2), "sizes": 5}, ValueError, "4 tokens, but the image has 5"),
    ({"grid": [(1, 2, 2)], "sizes": [4, 4]}, ValueError, "sizes holds 2 entries for 1 images"),
    ({"sizes": 0}, TypeError, "sizes=0: pass an int >= 1"),
    ({"sizes": 4.0}, TypeError, "sizes=4.0: pass an int >= 1"),
    ({"spans": ANYRES, "sizes": 12}, ValueError, "stand within its 12 tokens"),
    ({"spans": ANYRES, "grid": (1, 3, 3)}, TypeError, "grid and spans: give one"),
    ({"grid": (1, 2, 2), "keep": 0.0}, ValueError, "keep=0.0 is outside the valid range"),
    ({"grid": (1, 2, 2), "keep": None}, TypeError, "divprune: keep is missing"),
    ({"grid": (1, 2, 2), "rows": [1]}, ValueError, r"rows=\[1\]"),
    ({"grid": (1, 2, 2), "seed": 1}, TypeError, "divprune has no option 'seed'"),
    ({"grid": [(1, 2, 2)] * 3, "keep": None, "keep_total": 2}, ValueError, "gives 2 tokens to 3 units"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        vtprune.count("divprune", **{"keep": 0.5, **change})
