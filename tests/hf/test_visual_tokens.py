"""Which tokens of a call are visual, of which image or clip, and with which grid."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import reference
import torch
import transformers
from families import BOS, END, FAMILIES, FIRST_TEXT, IMAGE, START, VEND, VIDEO, VSTART, Piece
from torch import Tensor

import vtprune
from vtprune import Stage, UnsupportedCall
from vtprune.cache import NAME as CACHE
from vtprune.framing import clips_seen
from vtprune.model_adapters.generic import Unit

patch: Any = vtprune.patch
TAKES_FEATURES = (
    "mm_encoder_outputs" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
)
ANYRES = ("llava_next", "llava_onevision", "llava_next_video")
# From 300 x 1 to 1 x 300, all ratios between, squares and odd sizes.
SIZES = [(h, w) for h in (1, 2, 3, 5, 8, 13, 24, 32, 47, 100, 300) for w in (1, 2, 3, 4, 7, 15, 23, 32, 60, 120, 300)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def dense(model: Any, batch: dict[str, Any]) -> Tensor:
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # M-RoPE leaves it there, and takes it for embeddings that come without ids
    return model(**batch).logits


def with_words(batch: dict[str, Any], ids: list[int], front: bool = False) -> dict[str, Any]:
    """The call with more ids, all of them text to its `mm_token_type_ids`."""
    more = torch.tensor([ids]).expand(len(batch["input_ids"]), -1)
    parts = [more, batch["input_ids"]] if front else [batch["input_ids"], more]
    new = {**batch, "input_ids": torch.cat(parts, 1)}
    new["attention_mask"] = torch.ones_like(new["input_ids"])
    if "mm_token_type_ids" in batch:
        types, zeros = batch["mm_token_type_ids"], torch.zeros_like(more)
        new["mm_token_type_ids"] = torch.cat([zeros, types] if front else [types, zeros], 1)
    return new


# -- ids of a modality that has no features in the call -----------------------------------------------------------

BOTH = ["llava_onevision", "llava_next_video", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("place", ["ends with it", "words behind", "words before"])
@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("family", BOTH)
def test_ids_without_features_are_text(family: str, video: bool, place: str) -> None:
    """Only what has features is pruned; the other modality's ids stay, as the stock model reads them."""
    name = family + "-video" * video
    model, other = families.model(family), IMAGE if video else VIDEO
    words = [other] * 6 + ([] if place == "ends with it" else [FIRST_TEXT + 3, FIRST_TEXT + 9])
    batch = with_words(families.inputs(name), words, front=place == "words before")
    whole = dense(model, batch)
    with patch(model, "divprune", keep=1.0):
        assert torch.equal(dense(model, batch), whole)
    stages, log = reference.spy([Stage("llm", vtprune.create("divprune"), keep=0.5)])
    with patch(model, stages) as handle:
        model(**batch)
    shown = [unit for call in log for unit in call.units]
    count = int((batch["input_ids"] == (VIDEO if video else IMAGE)).sum())
    assert [(unit.modality, unit.n) for unit in handle.last.units] == [("video" if video else "image", count)]
    assert [unit.n for unit in shown] == [count]
    stays = torch.isin(handle.last.index[0], (batch["input_ids"][0] == other).nonzero()[:, 0])
    assert int(stays.sum()) == 6


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_embeddings_without_features_are_text(family: str) -> None:
    """The same where the caller embeds the words: pixels are there for images alone."""
    model = families.model(family)
    batch = with_words(families.inputs(family), [VIDEO] * 4 + [FIRST_TEXT])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    call = {k: v for k, v in batch.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    with patch(model, "divprune", keep=0.5) as handle:
        model(**call)
    assert [unit.modality for unit in handle.last.units] == ["image"]
    assert handle.last.units[0].n == int((batch["input_ids"] == IMAGE).sum())


# -- any-resolution images of all shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ANYRES)
def test_rasters_of_all_shapes_are_those_of_the_model(family: str) -> None:
    """Spans against the model's own features: a newline is where they equal `image_newline`, all else is raster."""
    model, seen = families.model(family), set()
    for size in SIZES:
        piece = FAMILIES[family].visual(size, torch.Generator().manual_seed(0), False)
        features = model.model.get_image_features(**piece.tensors).pooler_output[0]
        newlines = (features == model.model.image_newline).all(-1).nonzero()[:, 0].tolist()
        side = model.config.vision_config.image_size // 4
        batch = families.build(family, [[Piece([BOS]), piece, families.text(3, 4)]])
        with patch(model, "uniform", keep=0.5) as handle:
            model(**batch)
        unit = handle.last.units[0]
        assert (unit.n, len(unit.idx)) == (len(features), max(1, round(0.5 * len(features))))
        rows = [newlines[0] - side * side, *torch.tensor(newlines).diff().sub(1).tolist()] if newlines else []
        assert len(set(rows)) <= 1
        overview, *mosaics = unit.spans
        assert (overview.start, overview.grid, overview.newline) == (0, (1, side, side), False)
        if rows and rows[0]:
            (mosaic,) = mosaics
            assert (mosaic.start, mosaic.grid, mosaic.newline) == (side * side, (1, len(rows), rows[0]), True)
        else:
            assert mosaics == []
        seen.add((bool(rows), bool(rows and rows[0])))
    assert seen >= {(True, True), (True, False)}, "no mosaic, or none without columns, was tried"


@pytest.mark.parametrize("options", [{}, {"per": "crop"}, {"newlines": "drop"}], ids=str)
@pytest.mark.parametrize("family", ANYRES)
def test_every_method_prunes_a_tall_image(family: str, options: dict[str, Any]) -> None:
    """A mosaic of no columns leaves its newlines alone; every method keeps what it is asked to."""
    model = families.model(family)
    piece = FAMILIES[family].visual((300, 1), torch.Generator().manual_seed(0), False)
    batch = families.build(family, [[Piece([BOS]), piece, families.text(3, 4)]])
    whole = dense(model, batch)
    for cls in vtprune.methods():
        with patch(model, cls.name, keep=1.0, **options):
            assert torch.equal(dense(model, batch), whole), cls.name
        with patch(model, cls.name, keep=0.5, **options) as handle:
            model(**batch)
        for unit in handle.last.units:
            assert 0 < len(unit.idx) <= unit.n, cls.name


# -- attributes that stand on an instance -------------------------------------------------------------------------


def feature_call(model: Any, name: str) -> tuple[str, dict[str, Tensor]]:
    """The function that encodes a family's images or videos, by name, and its arguments."""
    modality = "video" if FAMILIES[name].video else "image"
    wanted = ("pixel_", "image_sizes", "batch_num", f"{modality}_grid")
    batch = {k: v for k, v in families.inputs(name).items() if k.startswith(wanted)}
    return f"get_{modality}_features", {k.removesuffix("_images"): v for k, v in batch.items()}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    value = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple | list) else []


@pytest.mark.parametrize("family", families.NAMES)
def test_features_come_in_the_form_that_was_asked_for(family: str) -> None:
    model = families.model(family)
    name, given = feature_call(model, family)
    owners = [owner for owner in (model, model.model) if hasattr(owner, name)]
    for options in ({"return_dict": False}, {"return_dict": True}, {}):
        stock = [getattr(owner, name)(**given, **options) for owner in owners]
        for keep in (1.0, 0.5):
            with patch(model, "divprune", keep=keep):
                ours = [getattr(owner, name)(**given, **options) for owner in owners]
            for a, b in zip(ours, stock, strict=True):
                assert type(a) is type(b)
                assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
                assert tensors(a)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl-video"])
def test_the_users_own_encoder_function_is_called_and_comes_back(family: str) -> None:
    model, batch = families.fresh(family), families.inputs(family)
    name, _ = feature_call(model, family)
    stock, calls = getattr(model.model, name), []

    @functools.wraps(stock)
    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    setattr(model.model, name, mine)
    model(**batch)  # M-RoPE leaves its offset on the model
    before = dict(model.model.__dict__)
    calls.clear()
    with patch(model, "divprune", keep=0.5) as handle:
        model(**batch)
        assert handle.last.units
        assert len(calls) == 1
        reduced = getattr(model.model, name)
    assert model.model.__dict__.keys() == before.keys()
    assert model.model.__dict__[name] is mine
    model(**batch)
    assert len(calls) == 2
    _, given = feature_call(model, family)
    reduced(**given)  # whoever kept the function beyond the patch is passed on
    assert len(calls) == 3


def test_the_users_own_deepstack_step_is_called_and_comes_back() -> None:
    model, batch, calls = families.fresh("qwen3_vl"), families.inputs("qwen3_vl"), []
    text = model.model.language_model
    stock = text._deepstack_process

    def mine(*args: Any) -> Any:
        calls.append(1)
        return stock(*args)

    text._deepstack_process = mine
    with patch(model, Stage(1, vtprune.create("random"), keep=0.5)):
        model(**batch)
    assert len(calls) == 2
    assert text.__dict__["_deepstack_process"] is mine


def test_names_of_attention_functions_go_with_the_last_tap() -> None:
    """transformers' table of attention functions is as before, also if it knew one by our name; copies live on."""
    from transformers import AttentionInterface

    table = AttentionInterface._global_mapping
    gc.collect()  # copies that other tests left
    before, batch = dict(table), families.inputs("llava")
    model, other = families.fresh("llava"), families.fresh("llava")
    first, second = patch(model, "fastv", keep=0.5), patch(other, "fastv", keep=0.5)
    first.remove()
    other(**batch)
    twin = copy.deepcopy(other)
    second.remove()
    assert "sdpa+vtprune" in table
    pruned = twin(**batch).logits
    vtprune.unpatch(twin)
    assert dict(table) == before
    assert not torch.equal(pruned, twin(**batch).logits)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    try:
        AttentionInterface.register("sdpa+vtprune", theirs)
        with patch(model, "fastv", keep=0.5):
            model(**batch)
        assert table["sdpa+vtprune"] is theirs
    finally:
        del table["sdpa+vtprune"]


# -- features that were encoded elsewhere -------------------------------------------------------------------------

GRIDDED = ["qwen2_vl", "qwen2_5_vl-video", "qwen3_vl", "qwen3_vl-video", "glm4v", "llava_next", "llava_onevision",
           "llava_onevision-video", "llava_next_video", "llava_next_video-video", "mistral3", "llava", "internvl",
           "smolvlm", "gemma3"]  # fmt: skip


def encoded_elsewhere(name: str, rows: tuple[int, ...]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model, a call with pixels, and the same with features that the stock model encoded."""
    model, batch = families.model(name), dict(families.inputs(name, rows=rows))
    modality = "video" if FAMILIES[name].video else "image"
    encode = getattr(model.model, f"get_{modality}_features")
    wanted = ("pixel_", "image_sizes", "batch_num", f"{modality}_grid")
    output = encode(**{k: v for k, v in batch.items() if k.startswith(wanted)}, return_dict=True)
    rest = {k: v for k, v in batch.items() if not k.startswith("pixel_")}
    return model, batch, {**rest, "mm_encoder_outputs": {modality: output}}


def picks(handle: Any) -> list[Any]:
    return [(u.row, u.modality, u.n, u.grid, u.spans, u.idx.tolist()) for u in handle.last.units]


@pytest.mark.skipif(not TAKES_FEATURES, reason="this transformers takes no encoded features")
@pytest.mark.parametrize("family", GRIDDED)
def test_features_encoded_elsewhere_bring_the_grids_of_the_call(family: str) -> None:
    """The picks of the ordinary call, of rules about frames and rasters, with no false note; in generate and beams."""
    rows = (1, 1) if FAMILIES[family].video or family == "llava_onevision" else (2, 1)
    model, batch, brought = encoded_elsewhere(family, rows)
    for method in ("evs", "uniform", "average_pool"):
        with patch(model, method, keep=0.4) as handle:
            model(**batch)
            right, notes = picks(handle), handle.last.notes
            model(**{**brought, "mm_encoder_outputs": dict(brought["mm_encoder_outputs"])})
            assert picks(handle) == right
            assert handle.last.notes == notes
            answers = model.generate(**batch, max_new_tokens=3, do_sample=False)
            again = {**brought, "mm_encoder_outputs": dict(brought["mm_encoder_outputs"])}
            assert torch.equal(model.generate(**again, max_new_tokens=3, do_sample=False), answers)
            assert picks(handle) == right
    with patch(model, "cls_topk", keep=0.4), pytest.raises(UnsupportedCall, match="came pre-encoded"):
        model(**brought)


@pytest.mark.skipif(not TAKES_FEATURES, reason="this transformers takes no encoded features")
@pytest.mark.parametrize("family", ["qwen2_5_vl-video", "llava_next"])
def test_beams_on_features_encoded_elsewhere(family: str) -> None:
    model, batch, brought = encoded_elsewhere(family, (1, 1))
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with patch(model, "evs", keep=0.4) as handle:
        right = model.generate(**batch, **options)
        shown = picks(handle)
        assert torch.equal(model.generate(**brought, **options), right)
        assert picks(handle) == shown


def merged(name: str, rows: tuple[int, ...]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model, a call with pixels, and the same with the features in `inputs_embeds` and token types beside."""
    model, batch = families.model(name), dict(families.inputs(name, rows=rows))
    text, seen = model.get_decoder(), []
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(**batch)
    hook.remove()
    ids, types = batch["input_ids"], (batch["input_ids"] == IMAGE).long() + 2 * (batch["input_ids"] == VIDEO).long()
    call = {k: v for k, v in batch.items() if not k.startswith(("pixel_", "input_ids", "batch_num"))}
    call |= {"inputs_embeds": seen[0]["inputs_embeds"], "mm_token_type_ids": types}
    if seen[0].get("position_ids") is not None:
        call["position_ids"] = seen[0]["position_ids"]
    assert ids.shape == types.shape
    return model, batch, call


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl-video", "glm4v", "llava_next", "mistral3"])
def test_features_merged_by_the_caller_are_pruned_by_their_types(family: str) -> None:
    """Types tell where they stand and grids how: the picks and the logits are those of the ordinary call."""
    model, batch, call = merged(family, (2, 1))
    whole = dense(model, call)
    with patch(model, "evs", keep=1.0):
        assert torch.equal(dense(model, call), whole)
    for method in ("evs", "uniform", "fastv"):
        with patch(model, method, keep=0.4) as handle:
            right = dense(model, batch)
            shown = picks(handle)
            torch.testing.assert_close(dense(model, call), right, rtol=0, atol=1e-5)
            assert picks(handle) == shown
            if FAMILIES[family].mrope:  # generate of the others takes no types
                model.generate(**call, max_new_tokens=2, do_sample=False)
                assert picks(handle) == shown


def test_merged_features_without_grids_are_noted() -> None:
    model, _, call = merged("llava", (1,))
    with patch(model, "divprune", keep=0.4) as handle:
        model(**call)
    assert [(unit.n, len(unit.idx)) for unit in handle.last.units] == [(25, 10)]
    assert any("grids are unknown" in note for note in handle.last.notes)


@pytest.mark.parametrize("family", ["qwen2_5_vl-video", "llava_next"])
def test_merged_features_that_nothing_places_are_refused(family: str) -> None:
    """Grids say that something is visual, but neither types nor placeholders say where."""
    model, _, call = merged(family, (1,))
    del call["mm_token_type_ids"]
    whole = dense(model, call)
    with patch(model, "evs", keep=1.0):
        assert torch.equal(dense(model, call), whole)
    with patch(model, "evs", keep=0.4), pytest.raises(UnsupportedCall, match="mm_token_type_ids"):
        model(**call)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_words_as_embeddings_are_words(family: str) -> None:
    """Nothing is pruned and a note says what would have been needed; token types of words alone need no note."""
    model = families.model(family)
    ids = torch.tensor([[BOS, 40, 41, 42, 43, 44]])
    call = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    whole = dense(model, call)
    said = model.generate(**call, max_new_tokens=3, do_sample=False)
    with patch(model, "divprune", keep=0.4) as handle:
        assert torch.equal(dense(model, call), whole)
        assert handle.last.units == []
        assert handle.last.index.tolist() == [[0, 1, 2, 3, 4, 5]]
        assert any("inputs_embeds" in note for note in handle.last.notes)
        assert torch.equal(model.generate(**call, max_new_tokens=3, do_sample=False), said)
    with patch(model, "divprune", keep=0.4) as handle:
        assert torch.equal(dense(model, {**call, "mm_token_type_ids": torch.zeros_like(ids)}), whole)
        assert handle.last is None


def test_a_later_turn_as_embeddings() -> None:
    """A turn of words behind a pruned prompt: as with their ids."""
    model, batch = families.model("llava"), families.inputs("llava")
    ids = torch.tensor([[40, 41, 42]])
    with patch(model, "divprune", keep=0.4):
        first, second = (model(**batch, use_cache=True) for _ in range(2))
        right = model(input_ids=ids, **{CACHE: first[CACHE]}).logits
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds, **{CACHE: second[CACHE]}).logits, right)


# -- frames as images, and the clips they make --------------------------------------------------------------------

FRAMES = ["internvl-frames", "smolvlm-frames"]


def clip(family: str, frames: int, seed: int) -> Piece:
    return FAMILIES[family].visual(frames, torch.Generator().manual_seed(seed), False)


def row_of(clips: list[Piece], words: bool = True) -> list[Piece]:
    return [Piece([BOS]), families.text(1, 3), *[p for c in clips for p in (c, families.text(2, 3 * words))],
            families.text(4, 2)]  # fmt: skip


def answers_of(handle: Any, stage: int | str = "llm") -> list[tuple[int, list[int]]]:
    return [(u.n, u.idx.tolist()) for u in handle.last.units if u.where == stage]


def side_by_side(answers: Sequence[tuple[int, list[int]]]) -> tuple[int, list[int]]:
    """What a row shows whose clips are answered one by one: a sample is one unit."""
    total, picks = 0, []
    for n, idx in answers:
        picks += [total + i for i in idx]
        total += n
    return total, picks


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("method", ["evs", "dycoke", "vidcom2", "aim", "holitom"])
@pytest.mark.parametrize("family", FRAMES)
def test_two_clips_of_a_row_are_treated_by_themselves(family: str, method: str, words: bool) -> None:
    """Each clip gets the answer it gets alone: words stand between them, or the labels of the frames start anew."""
    model, pieces = families.model(family), [clip(family, 3, 5), clip(family, 4, 6), clip(family, 3, 7)]
    with patch(model, method, keep=0.4, per="sample") as handle:
        alone = []
        for piece in pieces:
            model(**families.build(family, [row_of([piece])]))
            alone += answers_of(handle)
        assert [n for n, _ in alone] == [27, 36, 27]
        for rows in ([[0, 1, 2]], [[0, 1], [2]], [[1], [2, 0]], [[2, 2, 2]]):
            batch = families.build(family, [row_of([pieces[i] for i in row], words) for row in rows])
            model(**batch)
            assert answers_of(handle) == [side_by_side([alone[i] for i in row]) for row in rows]
            ids = batch["input_ids"]
            embeds = {**batch, "inputs_embeds": model.get_input_embeddings()(ids), "input_ids": None}
            model(**embeds)
            assert answers_of(handle) == [side_by_side([alone[i] for i in row]) for row in rows]


@pytest.mark.parametrize("family", FRAMES)
def test_clips_that_the_user_counts(family: str) -> None:
    """Any method, any division, over rows, and the copies of a row that beams make."""
    model, pieces = families.model(family), [clip(family, 4, 5), clip(family, 3, 6)]
    batch = families.build(family, [row_of([piece]) for piece in pieces])
    for method in ("evs", "divprune", "fastv"):
        stages, log = reference.spy([replace(s, keep=0.4, per="sample", clips=(1, 3, 2, 1)) for s in
                                     vtprune.create(method).stages(0.4, families.depth(model))])  # fmt: skip
        with patch(model, stages) as handle:
            model(**batch)
            assert [(u.row, u.n, len(u.idx)) for u in handle.last.units] == [(0, 36, 4 + 11), (1, 27, 7 + 4)]
            assert [unit.n for unit in log[0].units] == [9, 27, 18, 9]
            model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
            assert [(u.row, u.n) for u in handle.last.units] == [(0, 36), (1, 36), (2, 27), (3, 27)]
            assert [unit.n for unit in log[-1].units] == [9, 27] * 2 + [18, 9] * 2
        for unit, answer in zip(log[0].units, log[0].answers, strict=True):
            assert torch.equal(answer.idx, vtprune.create(method)(unit).idx)


@pytest.mark.parametrize("clips", [(3, 3), (5, 2), (7,), (4, 3, 3)])
def test_clips_that_do_not_fit_are_refused(clips: tuple[int, ...]) -> None:
    family = "internvl-frames"
    batch = families.build(family, [row_of([clip(family, 4, 5)]), row_of([clip(family, 3, 6)])])
    wrong = pytest.raises(UnsupportedCall, match=r"the rows of this call hold \[4, 3\] images")
    with patch(families.model(family), "evs", keep=0.4, per="sample", clips=clips), wrong:
        families.model(family)(**batch)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"clips": (3, 3)}, ValueError, "use per='sample'"),
        ({"clips": (), "per": "sample"}, ValueError, "at least one frame"),
        ({"clips": (3, 0), "per": "sample"}, ValueError, "at least one frame"),
        ({"clips": 3, "per": "sample"}, TypeError, "number of frames of each clip"),
        ({"clips": (1.5,), "per": "sample"}, TypeError, "number of frames of each clip"),
    ],
)
def test_clips_that_make_no_sense_are_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        patch(families.model("internvl"), "evs", keep=0.4, **options)


def test_a_sample_of_other_methods_is_the_whole_row() -> None:
    family = "internvl-frames"
    model, batch = families.model(family), families.build(family, [row_of([clip(family, 3, 5), clip(family, 3, 6)])])
    with patch(model, "divprune", keep=0.5, per="sample") as handle:
        model(**batch)
    assert [unit.n for unit in handle.last.units] == [54]


def test_two_videos_of_a_sample_are_two_clips() -> None:
    """Real videos of one size do not become one clip of twice the frames either."""
    family = "qwen2_5_vl-video"
    model, pieces = families.model(family), [clip(family, (3, 4, 6), seed) for seed in (0, 1)]  # type: ignore[arg-type]
    with patch(model, "evs", keep=0.4, per="sample") as handle:
        alone = []
        for piece in pieces:
            model(**families.build(family, [row_of([piece])]))
            alone += answers_of(handle)
        model(**families.build(family, [row_of(pieces)]))
        assert answers_of(handle) == [side_by_side(alone)]


@pytest.mark.parametrize("options", [{}, {"clips": (5,)}], ids=str)
def test_the_second_stage_of_holitom_sees_the_clip(options: dict[str, Any]) -> None:
    family = "internvl-frames"
    with patch(families.model(family), "holitom", keep=0.4, per="sample", **options) as handle:
        families.model(family)(**families.build(family, [row_of([clip(family, 5, 5)])]))
    assert [(u.where, u.n, len(u.idx)) for u in handle.last.units] == [("llm", 45, 18), (3, 18, 9)]


REAL = {
    # Words of real processors' prompts, each digit one of them: (before the first frame, between frames).
    "InternVL": ("<|im_start|> user \n Frame {} : _ <img>", "</img> \n Frame {} : _ <img>"),
    "SmolVLM": ("User : You _ see _ 12 _ frames \n Frame _ from _ 0 0 : {} : <fake> <global>",
                "<fake> \n Frame _ from _ 0 0 : {} : <fake> <global>"),
}  # fmt: skip


@pytest.mark.parametrize("between", ["", "and _ now _ this _ one", "\n"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("counts", [(2,), (12,), (120,), (12, 9), (3, 3), (30, 2), (2, 30, 11), (9, 11, 110)])
@pytest.mark.parametrize("kind", REAL)
def test_frames_of_real_prompts(kind: str, counts: tuple[int, ...], first: int, between: str) -> None:
    """Labels of one to three digits, a second clip right behind the first or behind words."""
    lead, separator = REAL[kind]
    table: dict[str, int] = {}
    words: list[int] = []
    units: list[Unit] = []

    def say(text: str) -> None:
        words.extend(table.setdefault(word, len(table)) for word in text.split(" "))

    for number, count in enumerate(counts):
        for frame in range(first, first + count):
            label = " ".join(str(frame))
            if frame == first and number:
                say((separator if not between else f"</img> {between} {lead}").format(label))
            else:
                say((lead if frame == first else separator).format(label))
            units.append(Unit(0, "image", [(len(words), 4)]))
            words.extend([-1] * 4)
    wanted = [number for number, count in enumerate(counts) for _ in range(count)]
    assert clips_seen(units, [words]) == wanted


def test_frames_that_share_a_label_or_have_none_are_one_clip() -> None:
    """Two frames within a second have one timestamp; frames side by side have no label at all."""
    units = [Unit(0, "image", [(5 + 9 * i, 4)]) for i in range(6)]
    for labels in ([0, 0, 1, 1, 2, 2], [7] * 6):
        words = [i for label in labels for i in (90, 91, 92, label, 93, -1, -1, -1, -1)]
        assert clips_seen(units, [words]) == [0] * 6
    units = [Unit(0, "image", [(5 + 4 * i, 4)]) for i in range(6)]
    assert clips_seen(units, [[90] * 5 + [-1] * 24]) == [0] * 6


# -- videos that are written with the id of images ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"per": "sample"}], ids=str)
def test_a_video_of_glm_is_one_video(options: dict[str, Any]) -> None:
    """Its frames carry the image id; grid and features are the video's. The rule of evs is computed by hand."""
    model, generator = families.model("glm4v"), torch.Generator().manual_seed(0)
    frames, height, width = 5, 4, 6
    each = height * width // 4
    shown = [i for t in range(frames) for i in (START, *[IMAGE] * each, END, FIRST_TEXT + t)]
    ids = torch.tensor([[BOS, 30, 31, VSTART, *shown, VEND, 40, 41, 42]])
    batch: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == IMAGE).long(),
        "pixel_values_videos": torch.randn(frames * height * width, 3 * 2 * 4 * 4, generator=generator),
        "video_grid_thw": torch.tensor([[frames, height, width]]),
    }
    features = model.model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"]).pooler_output
    x = torch.cat(list(features)).view(frames, each, -1)
    change = 1 - torch.cosine_similarity(x[1:], x[:-1], dim=-1)
    scores = torch.cat([torch.full((each,), 9.0), change.flatten()])
    right = sorted(scores.sort(descending=True, stable=True).indices[:12].tolist())
    whole = dense(model, batch)
    with patch(model, "evs", keep=1.0, **options):
        assert torch.equal(dense(model, batch), whole)
    with patch(model, "evs", keep=0.4, **options) as handle:
        model(**batch)
        (unit,) = handle.last.units
        assert (unit.modality, unit.n, unit.grid) == ("video", 30, (5, 2, 3))
        assert unit.idx.tolist() == right
        assert not any("grids are unknown" in note for note in handle.last.notes)
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert handle.last.units[0].idx.tolist() == right


# -- what the handle shows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl-video", "internvl", "smolvlm"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "hiprune", "topk_cls", "tome"])
def test_units_that_keep_all_are_shown(family: str, method: str) -> None:
    """keep=1.0 shows every unit with all its tokens, without asking the method and without changing a bit."""
    model, batch = families.model(family), families.inputs(family, rows=(2, 1))
    if method == "topk_cls" and family != "llava":
        pytest.skip("no CLS token")
    whole = dense(model, batch)
    with patch(model, method, keep=1.0) as handle:
        assert torch.equal(dense(model, batch), whole)
        units = handle.last.units
    assert units
    per_row = [sorted(p for u in units if u.row == row for p in u.positions.tolist()) for row in range(2)]
    assert per_row == [sorted(p for unit in row for p in unit) for row in batch.units]
    for unit in units:
        assert unit.idx.tolist() == unit.assignment.idx.tolist() == list(range(unit.n))


@pytest.mark.parametrize("keep", ["less", "most"])
def test_units_that_keep_all_by_a_count(keep: str) -> None:
    """A count that no image exceeds shows all of them whole; else those are shown of which the method was asked."""
    family = "mistral3"
    model, batch = families.model(family), families.inputs(family, rows=(2,))
    sizes = [len(unit) for unit in batch.units[0]]
    count = min(sizes) if keep == "less" else max(sizes)
    stages, log = reference.spy([Stage("llm", vtprune.create("divprune"), keep=count)])
    with patch(model, stages) as handle:
        model(**batch)
    shown = [(u.n, len(u.idx)) for u in handle.last.units]
    assert shown == ([(max(sizes), count)] if keep == "less" else [(n, n) for n in sizes])
    assert [unit.n for call in log for unit in call.units] == ([max(sizes)] if keep == "less" else [])


def test_frames_that_a_budget_leaves_empty_are_noted() -> None:
    """The note counts what the picks say, frame by frame; none where every frame keeps something."""
    family = "qwen2_5_vl-video"
    model, batch = families.model(family), families.build(family, [row_of([clip(family, (6, 4, 6), 0)])])  # type: ignore[arg-type]
    for keep, per in ((0.15, "image"), (0.15, "frame"), (1.0, "image")):
        with patch(model, "evs", keep=keep, per=per) as handle:
            model(**batch)
            counts = torch.zeros(6, dtype=torch.long)
            for frame, unit in enumerate(handle.last.units):
                counts += torch.bincount(unit.idx // 6 if per == "image" else frame + 0 * unit.idx, minlength=6)
            said = [note for note in handle.last.notes if "keep no token" in note]
        empty = int((counts == 0).sum())
        assert (empty > 0) == (keep < 1 and per == "image")
        shown = ", ".join(map(str, counts.tolist()))
        note = (
            f"{empty} of 6 frames keep no token (in row 0: {shown}): raise the budget, or share it out with per='frame'"
        )
        assert said == [note] * bool(empty)


def test_crops_and_images_that_a_budget_leaves_empty_are_noted() -> None:
    model, batch = families.model("llava_next"), families.inputs("llava_next", seed=2)
    with patch(model, "divprune", keep=1) as handle:
        model(**batch)
        crops = len(handle.last.units[0].kept_by_crop)
        assert any(note.startswith(f"{crops - 1} of {crops} crops keep no token") for note in handle.last.notes)
    family = "internvl-frames"
    with patch(families.model(family), "divprune", keep=1, per="sample") as handle:
        families.model(family)(**families.inputs(family))
        assert any(note.startswith("2 of 3 images keep no token") for note in handle.last.notes)


def test_tokens_that_are_meant_to_go_need_no_note() -> None:
    """ToDRE drops all visual tokens deep inside the LLM."""
    model = families.model("qwen2_5_vl-video")
    with patch(model, "todre", keep=0.9) as handle:
        model(**families.inputs("qwen2_5_vl-video"))
        assert not any("keep no token" in note for note in handle.last.notes)


def test_the_table_of_families_names_what_is_tested() -> None:
    from vtprune.model_adapters.generic import TESTED

    readme = (Path(__file__).parents[2] / "examples" / "guides" / "choose.md").read_text()
    table = dict(re.findall(r"^\| (images|videos|frames as images) \| ([^|]*) \|$", readme, re.M))
    named = {kind: re.findall(r"`(\w+)`", text.partition(";")[0]) for kind, text in table.items()}
    assert sorted(named["images"]) == sorted(TESTED)
    for kind, ending in (("images", ""), ("videos", "-video"), ("frames as images", "-frames")):
        assert set(named[kind]) == {family for family in TESTED if f"{family}{ending}" in families.NAMES}
