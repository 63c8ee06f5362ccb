"""A cache that is cropped goes on as a copy did that was made when it was that long, or refuses."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import UnsupportedCall
from vtprune import cache as kv

METHODS = ["divprune", "average_pool", "fastv", "pyramiddrop", "spatten", "todre", "dycoke_kv", "lazyllm"]
every_method = pytest.mark.parametrize("method", METHODS)
some_families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
patch: Any = vtprune.patch
WORDS = torch.tensor([[40, 41, 47, 43, 52, 45, 49]])


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def feed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits behind the last word. mask [B, L] of the prompt, where rows have padding."""
    if mask is not None:
        new = int(cache.get_seq_length()) + ids.shape[1] - mask.shape[1]
        ids, mask = ids.expand(len(mask), -1), torch.cat([mask, mask.new_ones(len(mask), new)], 1)
    return model(input_ids=ids, attention_mask=mask, use_cache=True, **{kv.NAME: cache}).logits[:, -1]


def answer(model: Any, cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits of a question of three words and of three more, one by one."""
    words = WORDS.flip(1)
    said = [feed(model, cache, words[:, :3], mask)]
    return torch.stack(said + [feed(model, cache, words[:, i : i + 1], mask) for i in range(3, 6)], 1)


def first_turn(family: str, model: Any) -> tuple[Any, Any]:
    batch = families.inputs(family)
    return batch, model(**batch, use_cache=True).past_key_values


@every_method
@some_families
@pytest.mark.parametrize("question", [1, 3])
def test_back_to_the_prompt(family: str, method: str, question: int) -> None:
    """As from a copy made before the first question, asked word by word or at once, and answered step by step."""
    model = families.model(family)
    with patch(model, method, keep=0.3):
        _, cache = first_turn(family, model)
        before, length = copy.deepcopy(cache), cache.get_seq_length()
        right = feed(model, copy.deepcopy(before), WORDS[:, 6:]), answer(model, copy.deepcopy(before))
        feed(model, cache, WORDS[:, :question])
        for i in range(question, 6):
            feed(model, cache, WORDS[:, i : i + 1])
        cache.crop(length - cache.get_seq_length())
        assert [cache.get_seq_length(i) for i in range(4)] == [length] * 4
        assert torch.equal(feed(model, copy.deepcopy(cache), WORDS[:, 6:]), right[0])
        assert torch.equal(answer(model, cache), right[1])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dycoke_kv"])
@some_families
@pytest.mark.parametrize("left", [1, 3, 5])
def test_back_into_an_answer(family: str, method: str, left: int) -> None:
    model = families.model(family)
    with patch(model, method, keep=0.3):
        _, cache = first_turn(family, model)
        for i in range(6):
            if i == left:
                before = copy.deepcopy(cache)
            feed(model, cache, WORDS[:, i : i + 1])
        cache.crop(left - 6)
        for word in (WORDS[:, 6:], WORDS[:, 2:3]):
            assert torch.equal(feed(model, cache, word), feed(model, before, word))


def test_a_memory_of_the_last_step_is_not_taken_for_an_earlier_one() -> None:
    """dycoke_kv compares with the step before; before anything is cropped it says that this one is forgotten."""
    model = families.model("llava")
    with patch(model, "dycoke_kv", keep=0.3):
        _, cache = first_turn("llava", model)
        for i in range(5):
            feed(model, cache, WORDS[:, i : i + 1])
        same = copy.deepcopy(cache)
        with pytest.raises(UnsupportedCall, match=r"cropped to \d+ tokens.*deepcopy"):
            cache.crop(-2)
        assert torch.equal(answer(model, cache), answer(model, same))


@every_method
@some_families
def test_into_the_text_behind_the_image(family: str, method: str) -> None:
    """The prompt's last words may be taken back; fed again they say what they said."""
    model = families.model(family)
    with patch(model, method, keep=0.3):
        batch = families.inputs(family)
        out = model(**batch, use_cache=True)
        cache = out.past_key_values
        feed(model, cache, WORDS[:, :1])
        cache.crop(-3)
        again = feed(model, cache, batch["input_ids"][:, -2:])
        assert torch.allclose(again, out.logits[:, -1], atol=1e-5)


@every_method
@pytest.mark.parametrize("rows", [(1,), (1, 2)])
def test_into_the_image_is_refused_and_changes_nothing(method: str, rows: tuple[int, ...]) -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=rows)
    behind = batch["input_ids"].shape[1] - 1 - max(int(unit[-1][-1]) for unit in batch.units)
    with patch(model, method, keep=0.3):
        cache = model(**batch, use_cache=True).past_key_values
        mask = batch["attention_mask"]
        feed(model, cache, WORDS[:, :1], mask)
        same = copy.deepcopy(cache)
        with pytest.raises(UnsupportedCall, match=f"cropping {behind + 2} tokens.*deepcopy"):
            cache.crop(-behind - 2)
        assert torch.equal(answer(model, cache, mask), answer(model, same, mask))


@every_method
def test_cropping_everything_empties(method: str) -> None:
    model = families.model("llava")
    with patch(model, method, keep=0.3):
        batch, cache = first_turn("llava", model)
        right = answer(model, copy.deepcopy(cache))
        answer(model, cache)
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0
        model(**batch, use_cache=True, **{kv.NAME: cache})
        assert torch.equal(answer(model, cache), right)


@every_method
@pytest.mark.parametrize("how", ["reorder", "select", "repeat"])
def test_rows_that_move_and_then_are_cropped(method: str, how: str) -> None:
    """Rows as they were before the question, in their new order."""
    model, batch = families.model("llava"), families.inputs("llava", rows=(1, 2))
    move, rows = {
        "reorder": (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([0])), [0]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
    }[how]
    mask = batch["attention_mask"]
    with patch(model, method, keep=0.3):
        cache = model(**batch, use_cache=True).past_key_values
        right = copy.deepcopy(cache)
        move(right)
        for i in range(3):
            feed(model, cache, WORDS[:, i : i + 1], mask)
        move(cache)
        cache.crop(-3)
        assert torch.equal(answer(model, cache, mask[rows]), answer(model, right, mask[rows]))


@every_method
def test_a_later_turn_taken_back(method: str) -> None:
    """Two questions of several words, with answers; the second is cropped, then both."""
    model = families.model("llava")
    with patch(model, method, keep=0.3):
        _, cache = first_turn("llava", model)
        lengths, copies = [], []
        for _ in range(2):
            lengths.append(cache.get_seq_length())
            copies.append(copy.deepcopy(cache))
            answer(model, cache)
        for length, before in zip(lengths[::-1], copies[::-1]):
            if method == "dycoke_kv" and length != lengths[0]:
                continue  # that is behind an answer: its last step is not remembered
            cache.crop(length - cache.get_seq_length())
            assert torch.equal(answer(model, cache), answer(model, before))


@pytest.mark.parametrize("method", ["divprune", "fastv", "dycoke_kv"])
def test_a_static_cache(method: str) -> None:
    from transformers import StaticCache

    model, batch = families.model("llava"), families.inputs("llava")
    with patch(model, method, keep=0.3):
        caches = [StaticCache(config=model.config, max_cache_len=batch["input_ids"].shape[1] + 12) for _ in range(2)]
        for cache in caches:
            model(**batch, use_cache=True, **{kv.NAME: cache})
        length = int(caches[0].get_seq_length())
        for i in range(4):
            feed(model, caches[0], WORDS[:, i : i + 1])
        caches[0].crop(-4)
        assert int(caches[0].get_seq_length()) == length
        assert torch.equal(answer(model, caches[0]), answer(model, caches[1]))


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_renumbered_positions(method: str) -> None:
    model = families.model("llava")
    with patch(model, method, keep=0.3, positions="compact"):
        _, cache = first_turn("llava", model)
        right = answer(model, copy.deepcopy(cache))
        answer(model, cache)
        cache.crop(-6)
        assert torch.equal(answer(model, cache), right)
