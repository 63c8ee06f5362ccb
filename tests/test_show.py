"""Pictures of kept tokens: every cell lies where its token looked."""

from __future__ import annotations

import families
import pytest
import torch
from PIL import Image

import vtprune
from vtprune.evals import tiny
from vtprune.show import Kept, draw, gallery, overlay, panels, record, tile_grid
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
