"""What a handle tells of the last prompt: a table, a document for JSON, a picture; and help that fits a screen."""

from __future__ import annotations

import json
import pydoc
from dataclasses import fields
from itertools import pairwise

import families
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import vtprune
from vtprune import Stage
from vtprune.core.cost import TextCost
from vtprune.evals.toys import image as tiny

PICTURE = Image.new("RGB", (96, 64), (200, 30, 30))


def ran(family: str, stages: object, rows: tuple[int, ...] = (1,), **options: object) -> vtprune.Handle:
    """A handle of a patch that has run one prompt and is removed."""
    model = families.model(family)
    with vtprune.patch(model, stages, **options) as handle, torch.inference_mode():
        model(**families.inputs(family, rows=rows))
    return handle


@pytest.mark.parametrize("thing", [vtprune.patch, vtprune.Handle])
def test_help_fits_a_screen(thing: object) -> None:
    told = pydoc.render_doc(thing, renderer=pydoc.plaintext)
    told = told.partition(" |  Data and other attributes")[0]  # `__slotnames__`, once another test has copied a handle
    assert len(told.splitlines()) <= 48


def test_every_field_is_documented() -> None:
    """By a text below it, which readers of the source and tools for documentation find."""
    import ast
    import inspect

    for cls in (vtprune.Last, vtprune.UnitResult, vtprune.VitLast):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        told = {
            before.target.id
            for before, after in pairwise(body)
            if isinstance(before, ast.AnnAssign) and isinstance(getattr(after, "value", None), ast.Constant)
        }
        assert told == {f.name for f in fields(cls)}, cls


def test_repr_is_one_line_and_a_summary_waits_for_a_prompt() -> None:
    with vtprune.patch(families.model("llava"), "divprune", keep=0.25) as handle:
        assert repr(handle) == "<vtprune.Handle of LlavaForConditionalGeneration: divprune at 'llm'>"
        assert handle.summary().splitlines()[1] == "no prompt with visual tokens has run yet"
        assert "no prompt" in handle._repr_html_()


def test_summary_counts_tokens_by_image_and_layer_and_what_is_saved() -> None:
    stages = [Stage("llm", vtprune.create("divprune"), keep=0.5), Stage(2, vtprune.create("fastv"), keep=0.25)]
    handle = ran("llava", stages, rows=(2, 1))
    last, told = handle.last, handle.summary()
    lines = told.splitlines()
    counts = [line.split() for line in lines[2:5]]
    assert [row[2:5] for row in counts] == [[str(n), "25", "6"] for n in (0, 0, 1)]
    before, inner = last.lengths[0], last.lengths[2]
    assert f"LLM, layers 0-1: {before} of {last.src.shape[1]} tokens" in lines
    assert f"LLM, layers 2-3: {inner} of {last.src.shape[1]} tokens" in lines
    cost = TextCost.of(families.model("llava").config.get_text_config(), width=4)
    share = 1 - cost.kv_bytes(last.lengths) / cost.kv_bytes(last.src.shape[1])
    assert f"({share:.1%} saved)" in lines[-1]
    looked = cost.look(before - inner)  # the keys of what a stage drops that reads the layer it stands at
    now = cost.prefill(last.lengths) + looked * any(need.layer == 0 for need in stages[1].needs)
    assert f"({1 - now / cost.prefill(last.src.shape[1]):.1%} saved)" in lines[-2]
    assert any(line.startswith("selector: ") for line in lines)


def test_summary_tells_of_the_tower_and_of_fallbacks() -> None:
    handle = ran("llava", [Stage(("vit", 1), vtprune.create("random"), keep=0.5)])
    told = handle.summary()
    (lengths,) = handle.last.tower_lengths.values()
    assert f"tower, image, layers 1-2: {lengths[-1]} of {lengths[0]} tokens" in told
    notes = ran("qwen2_5_vl", "visionzip", keep=0.5)
    assert notes.last.notes
    assert all(f"note: {note}" in notes.summary() for note in notes.last.notes)


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llava_next", "visionzip"),
        ("qwen2_5_vl-video", "divprune"),
        ("idefics3", "fastv"),
        ("llava", Stage(("vit", 1), vtprune.create("tome"), keep=0.5)),
    ],
)
def test_to_dict_is_json_and_says_what_last_says(family: str, stages: object) -> None:
    last = ran(family, stages, rows=(1, 1), **({"keep": 0.25} if isinstance(stages, str) else {})).last
    told = json.loads(json.dumps(last.to_dict(), allow_nan=False))
    assert told["lengths"] == last.lengths
    for row, line in enumerate(told["index"]):
        assert line == (last.index[row] if last.valid is None else last.index[row][last.valid[row]]).tolist()
    for unit, document in zip(last.units + last.tower_units, told["units"] + told["tower_units"]):
        assert document["positions"] == unit.positions.tolist()
        assert document["n"] == unit.n
        assert (document["merged"] is not None) == unit.assignment.merges
        assert document["where"] == (list(unit.where) if isinstance(unit.where, tuple) else unit.where)
    names = {f.name for f in fields(last)} - {"valid", "said", "clocks", "tower_steps"} | {"tower_units"}
    assert told.keys() == names | {"notes", "seconds"}
    for image, idx in zip(told["images"], last.kept()):
        start = image["ranges"][0][0]
        if len(image["ranges"]) == 1:
            assert {start + i for i in image["kept"]} <= set(told["index"][image["row"]])
        assert image["kept"] == idx.tolist()


def test_a_score_that_is_no_number_is_null() -> None:
    from vtprune.core.result import plain

    assert plain({0: (torch.tensor([1.0, float("inf")]), 3)}) == {"0": [[1.0, None], 3]}


def test_draw_is_what_show_draws() -> None:
    from vtprune.evals.accuracy import prepare, process
    from vtprune.places import boxes
    from vtprune.show import kept_units, overlay, rasters

    model, processor = tiny.load()
    inputs = prepare(model, processor, ["what color ?"], [PICTURE])
    with vtprune.patch(model, "divprune", keep=0.25) as handle, torch.inference_mode():
        model(**inputs)
    (unit,) = kept_units(handle.last)
    places = boxes(lambda seen: process(processor, ["what color ?"], [seen]), PICTURE.size, rasters(unit))
    wanted = overlay(PICTURE, unit, "divprune", places)
    assert handle.last.draw(PICTURE, processor=processor).tobytes() == wanted.tobytes()
    assert handle.last.draw(PICTURE).tobytes() == overlay(PICTURE, unit, "divprune").tobytes()


def test_draw_asks_which_of_several_images() -> None:
    last = ran("llava", "divprune", rows=(2, 1), keep=0.25).last
    with pytest.raises(ValueError, match="held 3 images or videos: say which=0 to 2"):
        last.draw(PICTURE)
    with pytest.raises(ValueError, match="which=3: the last prompt held 3"):
        last.draw(PICTURE, 3)
    with pytest.raises(ValueError, match="names none"):
        last.draw(PICTURE, slice(3, None))
    assert last.draw(PICTURE, 2).size == last.draw(PICTURE, 0).size
    tiles = ran("idefics3", "divprune", keep=0.25).last
    assert tiles.draw(PICTURE, slice(None)).width > PICTURE.width


def test_draw_takes_a_clip() -> None:
    import numpy as np

    from vtprune.evals.video import Video

    last = ran("llava_next_video-video", "divprune", keep=0.5).last
    every = np.arange(4)
    clip = Video(np.zeros((4, 16, 16, 3), np.uint8), every / 2, every, 4, 2.0)
    assert last.draw(clip).width > 4 * 168


def test_notebooks_show_the_table_and_the_kept_tokens() -> None:
    handle = ran("llava", "divprune", rows=(2, 1), keep=0.25)
    assert handle._repr_html_().count("<img ") == handle.last._repr_html_().count("<img ") == 3
    assert "&lt;vtprune.Handle of" in handle._repr_html_()
    assert ran("mistral3", "divprune", keep=0.25)._repr_html_().count("<img ") == 1


def test_a_vision_transformer_tells_too() -> None:
    config = Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, image_size=56, patch_size=14)
    model = Dinov2Model(config).eval()
    with vtprune.patch(model, "tome", r=2) as handle, torch.inference_mode():
        model(torch.zeros(2, 3, 56, 56))
    told = json.loads(json.dumps(handle.last.to_dict(), allow_nan=False))
    assert told["lengths"] == [15, 13, 11]
    assert [step["rows"] for step in told["steps"]] == told["lengths"]
    assert len(told["slots"]) == 2
    assert handle.summary().splitlines()[1:] == [
        "block         rows", "(input)         17", "0               15", "1               13", "2               11",
    ]  # fmt: skip
    assert handle.last.draw(PICTURE, row=1).height > 4 * 24
    assert "<pre>" in handle._repr_html_()
    with pytest.raises(ValueError, match="do not fill a grid of 3 x 5"):
        handle.last.draw(PICTURE, grid=(3, 5))
