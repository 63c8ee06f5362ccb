"""Pictures of kept tokens: every cell lies where its token looked."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from vtprune.evals.pictures import gallery
from vtprune.evals.toys import image as tiny
from vtprune.evals.video import Video
from vtprune.show import (
    Kept,
    contact_sheet,
    draw,
    draw_groups,
    film,
    joined,
    kept_units,
    overlay,
    panels,
    rasters,
    record,
    segments,
    tile_grid,
)
from vtprune.types import Span

RED, BLUE = (255, 0, 0), (0, 0, 255)


def _halves(width: int = 96, height: int = 64) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def _faded(pixel: tuple[int, int, int]) -> bool:
    return min(pixel) > 150


def test_one_raster_is_one_panel_and_kept_cells_stay_bright() -> None:
    kept = Kept(6, torch.tensor([0, 4]), (1, 2, 3), ())
    (panel,) = panels(kept, 1.5)
    assert (panel.rows, panel.cols) == (2, 3)
    picture = draw(_halves(), panel, side=90)
    assert picture.size == (90, 60)
    centres = [picture.getpixel((15 + 30 * c, 15 + 30 * r)) for r in range(2) for c in range(3)]
    assert centres[0] == RED
    assert [_faded(p) for p in centres] == [False, True, True, True, False, True]


def test_newline_tokens_are_no_cells() -> None:
    base, mosaic = Span(0, (1, 2, 2)), Span(4, (1, 2, 3), newline=True)
    kept = Kept(12, torch.tensor([3, 4, 7, 8, 11]), None, (base, mosaic))
    first, second = panels(kept, 1.0)
    assert first.kept == [False, False, False, True]
    assert (second.rows, second.cols) == (2, 3)
    assert second.kept == [True, False, False, True, False, False]  # 7 and 11 end a row


def test_equal_crops_are_put_together_and_the_thumbnail_apart() -> None:
    spans = tuple(Span(4 * i, (1, 2, 2)) for i in range(7))  # 2 x 3 crops and a thumbnail
    kept = Kept(28, torch.tensor([4 * 1 + 2, 4 * 5 + 1, 4 * 6]), None, spans)
    crops, thumbnail = panels(kept, 1.5)
    assert (crops.rows, crops.cols, crops.tiles) == (4, 6, (2, 3))
    assert [divmod(i, 6) for i, on in enumerate(crops.kept) if on] == [(1, 2), (2, 5)]
    assert thumbnail.kept == [True, False, False, False]


@pytest.mark.parametrize(
    ("count", "aspect", "expected"), [(6, 1.5, (2, 3)), (6, 0.6, (3, 2)), (4, 1.0, (2, 2)), (5, 4.0, (1, 5))]
)
def test_tile_grid_follows_the_shape_of_the_image(count, aspect, expected) -> None:
    assert tile_grid(count, aspect) == expected


def test_tokens_without_a_raster_are_not_drawn_somewhere() -> None:
    with pytest.raises(ValueError, match="7 visual tokens of this image form no known grid"):
        panels(Kept(7, torch.tensor([0]), None, ()), 1.0)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "smolvlm", "mistral3"])
def test_every_kind_of_family_can_be_drawn(family: str) -> None:
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    unit = record(model, dict(batch), vtprune.create("divprune"), 0.5)[0]
    cells = sum(sum(p.kept) for p in panels(unit, 1.0))
    separators = unit.n - sum(p.rows * p.cols for p in panels(unit, 1.0))
    assert separators >= 0
    assert len(unit.idx) - separators <= cells <= len(unit.idx)
    assert overlay(_halves(), unit, family).size[0] > 300


def test_stages_compose_in_one_picture() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    from vtprune.types import Method, Stage

    class Both(Method):
        def __call__(self, v):
            raise AssertionError("only its stages run")

        def stages(self, keep, depth):
            first = Stage("llm", vtprune.create("divprune"), keep=0.5)
            return [first, Stage(1, vtprune.create("fastv", layer=1), keep=keep)]

    (unit,) = record(model, dict(batch), Both(), 0.25)
    with vtprune.patch(model, [Stage("llm", vtprune.create("divprune"), keep=0.5)]) as handle, torch.inference_mode():
        model(**batch)
        before = set(handle.last.units[0].idx.tolist())
    assert len(unit.idx) == round(0.25 * unit.n)
    assert set(unit.idx.tolist()) <= before


def test_gallery_shows_every_method_beside_the_whole_image() -> None:
    model, processor = tiny.load()
    questions = tiny.questions(per_capability=1, capabilities=["color", "ocr"])
    sheet = gallery(model, processor, questions, ["divprune", "uniform"], 0.11, side=64)
    assert sheet.width >= 3 * 64
    assert sheet.height >= 2 * 64


def _chained() -> Kept:
    """Four time steps of 2 x 2 tokens: the second merged into the first, the fourth into the third, one place lost."""
    into = torch.tensor([0, 1, 2, -1] * 2 + [8, 9, 10, -1] * 2)
    return Kept(16, torch.tensor([0, 1, 2, 8, 9, 10]), (4, 2, 2), (), into)


def test_a_video_is_a_panel_a_time_step_and_segments_are_what_no_merge_crosses() -> None:
    kept = _chained()
    assert [sum(p.kept) for p in film([kept])] == [3, 0, 3, 0]
    assert [list(p.merged) for p in film([kept])][1] == [True, True, True, False]
    assert segments(kept) == [2]
    assert segments(Kept(16, kept.idx, (4, 2, 2), (), None)) == []
    alone = torch.full((16,), -1)
    alone[kept.idx] = kept.idx
    assert segments(Kept(16, kept.idx, (4, 2, 2), (), alone)) == []  # nothing was merged over time


def test_the_contact_sheet_tells_kept_merged_and_lost_apart() -> None:
    frames = np.zeros((8, 40, 40, 3), np.uint8)
    frames[..., 2] = 255  # blue
    video = Video(frames, np.arange(8) / 4, np.arange(8), 8, 4.0)
    sheet = contact_sheet(video, [_chained()], "chain", side=40, columns=4)
    top = 22 + 5 + 22

    def cell(step: int, place: int) -> tuple[int, int, int]:
        return sheet.getpixel((10 + step * 50 + 10 + 20 * (place % 2), top + 10 + 20 * (place // 2)))

    assert cell(0, 0) == BLUE
    assert not _faded(cell(1, 0))
    assert cell(1, 0) != BLUE
    assert _faded(cell(1, 3))
    bar = {t for t in range(1, 4) if sheet.getpixel((10 + t * 50 - 6, top)) == (31, 119, 180)}
    assert bar == {2}


def test_merged_tokens_are_followed_through_the_seam() -> None:
    model, inputs = families.model("qwen2_5_vl"), families.inputs("qwen2_5_vl-video", rows=(1,))
    (kept,) = record(model, inputs, vtprune.create("average_pool"), 0.25)
    assert kept.into is not None
    assert (kept.into >= 0).all()
    assert torch.equal(kept.into[kept.idx], kept.idx)
    assert set(kept.into.tolist()) == set(kept.idx.tolist())


def test_groups_of_a_vision_transformer_have_their_mean_colour_and_a_line_around_them() -> None:
    slots = torch.tensor([0, 0, 1, -1])  # the upper row together: one patch red, one blue
    sheet = draw_groups(_halves(48, 48), slots, (2, 2), "tome")
    left = 10 + 48 + 10  # the right picture of the strip
    top = sheet.height - 10 - 48
    assert sheet.getpixel((left + 6, top + 6)) == sheet.getpixel((left + 30, top + 6)) == (128, 0, 128)
    assert sheet.getpixel((left + 6, top + 40)) == RED
    assert _faded(sheet.getpixel((left + 40, top + 40)))
    assert sheet.getpixel((left + 24, top + 40)) == (40, 40, 40)
    with pytest.raises(ValueError, match="3 patches do not fill a grid of 2 x 2"):
        draw_groups(_halves(), slots[:3], (2, 2), "tome")


def test_every_tile_of_an_image_is_drawn_where_text_stands_between_them() -> None:
    model, batch = families.model("smolvlm"), families.build("smolvlm", [families.turn("smolvlm", 1, seed=1)])
    units = record(model, dict(batch), vtprune.create("uniform"), 3)
    unit = joined(units)
    assert unit.n == 9 * len(units)
    assert len(units) == len(rasters(unit)) == 3
    assert unit.idx.tolist() == [9 * i + j for i, part in enumerate(units) for j in part.idx.tolist()]
    places = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)]
    tiles, whole = panels(unit, 2.0, places)
    assert (tiles.rows, tiles.cols, sum(tiles.kept), sum(whole.kept)) == (3, 6, 6, 3)


def test_nothing_pruned_is_drawn_whole_and_merged_tokens_of_an_image_half_faded() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    (unit,) = record(model, dict(batch), vtprune.create("divprune"), 1.0)
    assert unit.idx.tolist() == list(range(25))
    (pooled,) = record(model, dict(batch), vtprune.create("average_pool"), 0.25)
    (panel,) = panels(pooled, 1.0)
    assert sum(panel.kept) + sum(panel.merged) == 25
    assert sum(panel.merged) > 12
    with pytest.raises(ValueError, match="2 places for 1 rasters"):
        panels(pooled, 1.0, [(0.0, 0.0, 1.0, 1.0)] * 2)


def test_crops_and_rows_are_placed_as_one_image() -> None:
    """A stage that looks at crops divides the mosaic; the drawing is of the whole image all the same."""
    from vtprune.types import Stage

    model, batch = families.model("llava_next"), families.inputs("llava_next", rows=(1,))
    stage = Stage("llm", vtprune.create("divprune"), keep=2, per="crop", newlines="keep")
    with vtprune.patch(model, [stage]) as handle, torch.inference_mode():
        model(**batch)
        (unit,) = kept_units(handle.last)
    assert unit.n == len(batch.units[0][0])
    crops = len(unit.spans[1].tiles[0]) * len(unit.spans[1].tiles[1])
    assert sum(sum(p.kept) for p in panels(unit, 1.0)) == 2 * (1 + crops)
