"""Budgets of crops, separators and rows: per="crop", newlines=..., keep_total=..., on real any-resolution packings."""

from __future__ import annotations

from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Span, Stage
from vtprune.types import budget
from vtprune.units import kept_by_crop, parts_of

MOSAIC = (Span(0, (1, 2, 2)), Span(4, (1, 3, 3), newline=True, tiles=((2, 1), (2, 1))))
#  0  1 |  4  5  6 .7     overview, then the mosaic: four tiles, three newlines
#  2  3 |  8  9 10 .11
#       | 12 13 14 .15


def tokens(*args: Any) -> list[list[int]]:
    return [part.tokens.tolist() for part in parts_of(*args)]


def test_tiles_of_a_mosaic() -> None:
    tiles = [[0, 1, 2, 3], [4, 5, 8, 9], [6, 10], [12, 13], [14]]
    assert tokens(MOSAIC, 16, "crop", "drop", False) == [*tiles, [7, 11, 15]]
    assert tokens(MOSAIC, 16, "crop", "keep", False) == [*tiles, [7, 11, 15]]
    with_ends = [[0, 1, 2, 3], [4, 5, 8, 9], [6, 7, 10, 11], [12, 13], [14, 15]]
    assert tokens(MOSAIC, 16, "crop", "compete", False) == with_ends
    spans = [part.spans for part in parts_of(MOSAIC, 16, "crop", "compete", False)]
    assert spans[2] == (Span(0, (1, 2, 1), newline=True),)
    assert spans[3] == (Span(0, (1, 1, 2)),)


def test_separators_leave_the_image() -> None:
    whole, rest = parts_of(MOSAIC, 16, "image", "drop", False)
    assert whole.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 14]
    assert whole.spans == (Span(0, (1, 2, 2)), Span(4, (1, 3, 3), tiles=MOSAIC[1].tiles))
    assert rest.separator
    assert rest.tokens.tolist() == [7, 11, 15]
    assert tokens(MOSAIC, 16, "image", "compete", False) == [list(range(16))]
    assert tokens((), 16, "crop", "drop", False) == [list(range(16))], "without a raster there is nothing to divide"


def test_frames_of_a_video() -> None:
    video = (Span(0, (2, 1, 2)),)
    assert tokens(video, 5, "frame", "compete", True) == [[0, 1], [2, 3], [4]]
    assert tokens(video, 4, "frame", "compete", False) == [[0, 1, 2, 3]], "an image is its own frame"
    marked = (Span(1, (1, 1, 2)), Span(4, (1, 1, 2)))  # a class token before each frame
    assert tokens(marked, 6, "frame", "compete", True) == [[1, 2], [4, 5], [0, 3]]


def test_kept_by_crop() -> None:
    assert kept_by_crop(MOSAIC, 16, torch.tensor([0, 5, 7, 10, 13, 14])) == [1, 1, 1, 1, 1]
    assert kept_by_crop(MOSAIC, 16, torch.tensor([8, 9])) == [0, 2, 0, 0, 0]


def test_one_total_is_dealt_out_by_size() -> None:
    def dealt(total: float | int, sizes: list[int]) -> list[int | None]:
        return Stage("llm", vtprune.create("divprune"), keep_total=total).budgets(sizes)

    assert dealt(10, [10, 10]) == [5, 5]
    assert dealt(0.5, [30, 10]) == [15, 5]
    assert dealt(4, [100, 1, 1]) == [2, 1, 1]
    assert dealt(2, [7, 7]) == [1, 1]
    assert dealt(99, [4, 3]) == [4, 3]
    with pytest.raises(ValueError, match=r"keep_total=2 gives 2 tokens to 3 units \(per='image'\).*per='sample'"):
        dealt(2, [5, 5, 5])
    with pytest.raises(TypeError, match=r"keep=0\.5 and keep_total=3"):
        Stage("llm", vtprune.create("divprune"), keep=0.5, keep_total=3)
    with pytest.raises(ValueError, match="keep_total=0 keeps nothing"):
        vtprune.patch(families.model("llava"), "divprune", keep_total=0)


class Spy:
    """The units that a patched model shows to its method."""

    def __init__(self, model: Any, **options: Any) -> None:
        (self.stage,), self.log = reference.spy([Stage("llm", vtprune.create("divprune"), **options)])
        self.model = model

    def run(self, batch: Any) -> tuple[list[Any], Any, Tensor]:
        self.log.clear()
        with vtprune.patch(self.model, [self.stage]) as handle, torch.no_grad():
            logits = self.model(**batch).logits
        return [unit for call in self.log for unit in call.units], handle.last, logits


@torch.no_grad()
def crop_features(model: Any, batch: Any) -> Tensor:
    """[crops, N, D] projected features of one image's crops, before the model packs them."""
    base = model.base_model
    hidden = base.vision_tower(batch["pixel_values"][0], output_hidden_states=True).hidden_states
    layer = base.config.vision_feature_layer
    return base.multi_modal_projector(
        hidden[layer][:, 1 if base.config.vision_feature_select_strategy == "default" else 0 :]
    )


@pytest.mark.parametrize("newlines", ["compete", "keep", "drop"])
@pytest.mark.parametrize("row", range(3))
def test_every_crop_of_llava_next_is_a_unit(row: int, newlines: str) -> None:
    """Told by content: each token of unit i is a feature of crop i, in its order, and all of them come."""
    model, batch = (
        families.model("llava_next"),
        families.build("llava_next", [families.turn("llava_next", 1, seed=row)]),
    )
    whole = len(batch.units[0][0])
    seen, last, _ = Spy(model, keep=0.5, per="crop", newlines=newlines).run(batch)
    features = crop_features(model, batch)
    newline = model.base_model.image_newline
    found = 0
    assert len(seen) == len(features), "one unit for each crop"
    for unit, crop in zip(seen, features, strict=True):
        rows = unit.x[~(unit.x == newline).all(1)]
        distance = torch.cdist(rows, crop)
        at = distance.argmin(1)
        assert float(distance.amin(1).max()) < 1e-5
        assert torch.equal(at, at.sort().values)
        assert unit.budget == budget(0.5, unit.n)
        _, h, w = unit.spans[0].grid
        assert h * w == len(rows)
        found += unit.n
    ends = whole - sum(int((~(u.x == newline).all(1)).sum()) for u in seen)
    assert found == whole - (0 if newlines == "compete" else ends)
    assert [r.part for r in last.units] == list(range(len(seen)))
    kept = sum(unit.budget for unit in seen) + (ends if newlines == "keep" else 0)
    assert last.index.shape[1] == batch["input_ids"].shape[1] - whole + kept
    policy = {"compete": "compete", "keep": "kept", "drop": "dropped"}[newlines]
    assert f"newlines {policy}" in last.policies[0]


@pytest.mark.parametrize("newlines", ["compete", "keep", "drop"])
@pytest.mark.parametrize("per", ["image", "crop", "sample"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_exact_and_alone_as_in_a_batch(family: str, per: str, newlines: str) -> None:
    """Logits are those of the hand-cut sequence, and a batch keeps in every row what the row keeps alone."""
    rows = (1, 2)
    model = families.model(family)
    spy = Spy(model, keep=0.4, per=per, newlines=newlines)
    _, last, logits = spy.run(families.inputs(family, rows=rows))
    for row in range(len(rows)):
        single = families.inputs(family, rows=rows, only=row)
        _, alone, _ = spy.run(single)
        kept = last.index[row] if last.valid is None else last.index[row][last.valid[row]]
        shift = logits.shape[1] - single["input_ids"].shape[1]
        assert torch.equal(kept - shift, alone.index[0])
        visual = torch.tensor(sorted(p for unit in single.units[0] for p in unit))
        stay = torch.isin(visual, alone.index[0]).nonzero().flatten()
        cut = reference.Cut(visual, vtprune.Assignment(stay))
        theirs = reference.pruned_logits(model, reference.dense(model, single), {"llm": [cut]})
        torch.testing.assert_close(logits[row, -3:], theirs[-3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("per", ["image", "crop"])
def test_keep_all_drops_no_separator(per: str) -> None:
    model, batch = families.model("llava_next"), families.inputs("llava_next", rows=(2, 1))
    with torch.no_grad():
        dense = model(**batch).logits
    _, _, logits = Spy(model, keep=1.0, per=per, newlines="drop").run(batch)
    assert torch.equal(logits, dense)


def test_one_total_for_all_crops_of_a_row() -> None:
    model, batch = families.model("llava_next"), families.inputs("llava_next", rows=(2,))
    visual = sum(len(unit) for unit in batch.units[0])
    for per in ("image", "crop"):
        seen, last, _ = Spy(model, keep_total=20, per=per, newlines="drop").run(batch)
        assert sum(unit.budget for unit in seen) == 20
        assert last.index.shape[1] == batch["input_ids"].shape[1] - visual + 20
        assert "one total a row" in last.policies[0]
    with pytest.raises(ValueError, match="keep_total=2 gives 2 tokens"):
        Spy(model, keep_total=2, per="crop").run(batch)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all(), "the refused call left the model usable"


def test_a_later_stage_sees_the_image_again() -> None:
    """Crops first, then the whole image: its tokens come in the order they stand in the prompt."""
    model, batch = families.model("llava_next"), families.inputs("llava_next", rows=(1, 1))
    stages, log = reference.spy(
        [
            Stage("llm", vtprune.create("divprune"), keep=0.6, per="crop", newlines="keep"),
            Stage("llm", vtprune.create("divprune"), keep=0.3),
            Stage(2, vtprune.create("fastv"), keep=0.2, per="crop"),
        ]
    )
    with vtprune.patch(model, stages) as handle, torch.no_grad():
        model(**batch)
        last = handle.last
    sizes = [len(unit) for row in batch.units for unit in row]
    image = [call for call in log if call.stage.keep == 0.3]
    assert [v.budget for v in image[0].units] == [budget(0.3, n) for n in sizes]
    with torch.no_grad():
        embeds = reference.dense(model, families.inputs("llava_next", rows=(1, 1), only=0)).hidden
    first = image[0].units[0].x
    first = first[~(first == model.base_model.image_newline).all(1)]
    at = torch.cdist(first, embeds).argmin(1)
    assert (at.diff() > 0).all()
    assert last.units[-1].where == 2
    assert batch["input_ids"].shape[1] > last.lengths[0] > last.lengths[2]
