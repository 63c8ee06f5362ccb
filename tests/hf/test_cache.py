"""Cache layers that store less than they answer for, on the real transformers caches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from vtprune import UnsupportedCall
from vtprune import cache as kv
from vtprune.hf import cache as hf_cache

CONFIG = LlamaConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, vocab_size=8)
FED, RAN, WIDTH = 10, 4, 8


def filled(kind: str, batch: int = 2) -> DynamicCache | StaticCache:
    """A cache whose two layers were fed 10 tokens and stored 4."""
    cache = DynamicCache(config=CONFIG) if kind == "dynamic" else StaticCache(config=CONFIG, max_cache_len=16)
    torch.manual_seed(0)
    for layer in range(2):
        cache.update(torch.randn(batch, 1, RAN, WIDTH), torch.randn(batch, 1, RAN, WIDTH), layer)
    return cache


def shrink(cache, valid=None, position_offset=None, rebuild_mask=False) -> None:
    for layer in range(2):
        kv.shrink(
            cache,
            layer,
            past=0,
            fed=FED,
            ran=RAN,
            valid=valid,
            rebuild_mask=rebuild_mask,
            position_offset=position_offset,
        )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_length_is_logical_and_storage_physical(kind: str) -> None:
    cache = filled(kind)
    keys = cache.layers[0].keys
    shrink(cache)
    assert int(cache.get_seq_length()) == FED
    assert cache.layers[0].keys is keys
    width, offset = cache.get_mask_sizes(1, 0)
    assert offset == FED - RAN
    assert width == (RAN + 1 if kind == "dynamic" else 16)
    one = torch.ones(2, 1, 1, WIDTH)
    stored, _ = cache.update(one, one, 0)
    assert int(cache.get_seq_length()) == FED + 1
    assert torch.equal(stored[:, :, RAN : RAN + 1], one)
    assert cache.layers[0].is_compileable == (kind == "static")


def test_a_second_pruned_call_adds_up() -> None:
    cache = filled("dynamic")
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    shrink(cache, valid=valid)
    hf_cache.inside.on = True
    more = torch.ones(2, 1, 3, WIDTH)
    cache.update(more, more, 0)
    hf_cache.inside.on = False
    kv.shrink(cache, 0, past=FED, fed=5, ran=3, valid=None, rebuild_mask=False, position_offset=None)
    layer = cache.layers[0]
    assert (layer.dropped, layer.prefix, int(layer.get_seq_length())) == (8, 7, 15)
    assert layer.valid.tolist() == [[True] * 7, [False] + [True] * 6]
    assert layer.rebuild_mask


def test_rows_follow_beams_and_selection() -> None:
    cache = filled("dynamic")
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    shrink(cache, valid=valid, position_offset=torch.tensor([6, 7]))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].valid, valid[[1, 1]])
    assert cache.layers[0].position_offset.tolist() == [7, 7]
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].valid.shape == (4, 4)
    assert cache.layers[1].keys.shape[0] == 4
    cache.batch_select_indices(torch.tensor([3]))
    assert cache.layers[0].valid.tolist() == [[False, True, True, True]]


def test_reset_forgets_what_was_dropped() -> None:
    cache = filled("dynamic")
    shrink(cache, valid=torch.tensor([[True] * 4, [False, True, True, True]]))
    cache.reset()
    assert cache.get_seq_length() == 0
    fresh = torch.zeros(2, 1, 2, WIDTH)
    cache.update(fresh, fresh, 0)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_and_pickles(duplicate) -> None:
    cache = filled("dynamic")
    shrink(cache, valid=torch.tensor([[True] * 4, [False, True, True, True]]))
    other = duplicate(cache)
    assert other.get_seq_length() == FED
    assert type(other.layers[0]) is type(cache.layers[0])
    assert other.layers[0].keys is not cache.layers[0].keys
    assert torch.equal(other.layers[0].valid, cache.layers[0].valid)


def test_crop_takes_from_the_end() -> None:
    cache = filled("dynamic")
    shrink(cache)
    more = torch.ones(2, 1, 3, WIDTH)
    cache.update(more, more, 0)
    cache.layers[0].crop(-2)
    assert cache.layers[0].get_seq_length() == FED + 1
    assert cache.layers[0].keys.shape[-2] == RAN + 1


def test_new_caches_are_untouched_by_the_pruned_classes() -> None:
    shrink(filled("dynamic"))
    shrink(filled("static"))
    assert type(DynamicCache(config=CONFIG).layers[0]).__name__ == "DynamicLayer"
    assert type(StaticCache(config=CONFIG, max_cache_len=4).layers[0]).__name__ == "StaticLayer"


def test_ragged_rows_cannot_be_continued_without_the_patch() -> None:
    cache = filled("dynamic")
    shrink(cache, valid=torch.tensor([[True] * 4, [False, True, True, True]]))
    one = torch.ones(2, 1, 1, WIDTH)
    with pytest.raises(UnsupportedCall, match="patched model"):
        cache.update(one, one, 0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_layers_that_store_other_tokens_cannot_be_continued_without_the_patch(kind: str) -> None:
    cache = filled(kind)
    kv.shrink(cache, 1, past=0, fed=FED, ran=RAN, valid=None, rebuild_mask=False, position_offset=None, own_tokens=True)
    one = torch.ones(2, 1, 1, WIDTH)
    for layers in (cache.layers[1], copy.deepcopy(cache).layers[1]):
        with pytest.raises(UnsupportedCall, match="rows or layers"):
            layers.update(one, one)
    kv.shrink(cache, 1, past=FED, fed=0, ran=0, valid=None, rebuild_mask=False, position_offset=None)
    assert cache.layers[1].own_tokens, "a later call does not even it out"
    cache.reset()
    cache.update(one, one, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_past_mask_moves_the_columns_of_a_wider_layer(kind: str) -> None:
    cache = filled(kind)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    shrink(cache, valid=valid)
    layer = cache.layers[1]
    width = FED + 2 if kind == "dynamic" else 16  # sized by a layer that dropped nothing; two tokens since
    mask = torch.zeros(2, 1, 1, width, dtype=torch.bool)
    mask[..., : FED + 2] = True
    out = kv.past_mask(mask, layer, None)
    assert out.shape[-1] == (RAN + 2 if kind == "dynamic" else 16)
    expected = torch.cat([valid, torch.ones(2, 2, dtype=torch.bool)], dim=1)
    assert torch.equal(out[:, 0, 0, : RAN + 2], expected)
    assert not out[:, 0, 0, RAN + 2 :].any()


def test_past_mask_2d_puts_stored_columns_behind_what_was_dropped() -> None:
    cache = filled("dynamic")
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    shrink(cache, valid=valid)
    out = kv.past_mask_2d(torch.ones(2, FED + 1, dtype=torch.long), cache.layers[0])
    assert out.shape == (2, FED + 1)
    assert torch.equal(out[:, FED - RAN : FED].bool(), valid)
    assert (out[:, FED:] == 1).all()


def test_caches_pickled_by_version_0_1_load() -> None:
    """Their layers are made by `vtprune.cache._rebuild`, what stages at decode know by `vtprune.recall.Recall`."""
    cache = filled("dynamic")
    valid = torch.tensor([[True] * RAN, [False] + [True] * (RAN - 1)])
    shrink(cache, valid=valid, position_offset=torch.tensor([1, 2]), rebuild_mask=True)
    new = cache.layers[0]
    old = {name: key for key, name in hf_cache.RENAMED.items()}
    layer = kv._rebuild(type(new).__mro__[2], {old.get(name, name): value for name, value in new.__dict__.items()})
    assert vars(layer).keys() == vars(new).keys()
    assert layer.rebuild_mask
    assert layer.position_offset.tolist() == [1, 2]
    assert layer.get_seq_length() == new.get_seq_length()

    from vtprune.recall import Recall

    at = torch.zeros(1, 2, dtype=torch.int64)
    known = Recall(at, at, at + 1, [2], [2], at + 2)
    names = {"kv_index": "slots", "kv_index_before": "entry", "visible_index": "columns", "visible": "shown"}
    again = Recall.__new__(Recall)
    again.__setstate__({names.get(name, name): value for name, value in vars(known).items()})
    assert vars(again).keys() == vars(known).keys()
    assert again.kv_index.tolist() == [[1, 1]]
    assert again.kv_index_before.tolist() == [[2, 2]]
