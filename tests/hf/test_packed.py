"""Packed rows: several samples in one row give what each gives alone, whatever the method asks of its row."""

from __future__ import annotations

from typing import Any

import families
import pytest
import reference
import test_flash
import torch
import transformers
from torch import Tensor

import vtprune
from vtprune import Stage, UnsupportedCall

patch: Any = vtprune.patch
flash = test_flash.model  # a fixture: a model whose layers are given what a flash kernel would be
VISUALS = (1, 0, 2)  # images in the samples of a row
METHODS = [m.name for m in vtprune.methods() if m.seam != "in_vit"]
FORMS = ("text and axes", "axes", "one line")
INSIDE = [n for n in families.NAMES if not n.startswith("gemma3")]


def stages_of(method: str, **options: Any) -> list[Stage]:
    return vtprune.create(method, **options).stages(0.5, 4)


def singles_of(name: str, visuals: tuple[int, ...] = VISUALS) -> list[dict[str, Any]]:
    """Every sample alone, with the position ids it has in the packed row."""
    found = []
    for row in range(len(visuals)):
        single: Any = dict(families.inputs(name, visuals, only=row))
        del single["attention_mask"]
        single["position_ids"] = _ids(name, single)
        found.append(single | {"use_cache": False})
    return found


def _ids(name: str, single: dict[str, Any]) -> Tensor:
    line = torch.arange(single["input_ids"].shape[1])[None]
    axes = reference.positions(families.model(name), single)
    if families.FAMILIES[name].visual_first:
        return line + 1  # PaliGemma counts from 1
    return line if axes is None else torch.cat([line[None], axes])


def packed_of(name: str, visuals: tuple[int, ...] = VISUALS) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One row [1, L] of all samples, as padding-free collators make it, and the samples alone."""
    singles, batch = singles_of(name, visuals), families.inputs(name, visuals)
    call = {k: v for k, v in batch.items() if k != "attention_mask"}
    for key in ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids"):
        if key in singles[0]:
            call[key] = torch.cat([single[key] for single in singles], -1)
    return call | {"use_cache": False}, singles


def lengths_of(singles: list[dict[str, Any]]) -> list[int]:
    return [single["input_ids"].shape[1] for single in singles]


def blocks(singles: list[dict[str, Any]]) -> Tensor:
    """[1, 1, L, L] bool: causal inside each sample."""
    number = torch.repeat_interleave(torch.arange(len(singles)), torch.tensor(lengths_of(singles)))
    return ((number[:, None] == number) & torch.ones(len(number), len(number)).tril().bool())[None, None]


@torch.no_grad()
def check(model: Any, call: dict[str, Any], singles: list[dict[str, Any]], row: int = 0) -> None:
    """Logits of a packed row against those of each sample alone, all through the same (patched) model."""
    ours = model(**call).logits[row].split(lengths_of(singles))
    for mine, single in zip(ours, singles, strict=True):
        torch.testing.assert_close(mine, model(**single).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("name", families.NAMES)
def test_every_family(name: str, method: str) -> None:
    if method == "fastv" and name not in INSIDE:
        pytest.skip("sliding layers hold no stage inside the LLM")
    model = families.model(name)
    call, singles = packed_of(name)
    with patch(model, stages_of(method)) as handle:
        check(model, call, singles)
        assert handle.last.units


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl-video"])
def test_every_method(name: str, method: str) -> None:
    """Those that weigh tokens by the row's text, its last query, or all its images too."""
    model = families.model(name)
    call, singles = packed_of(name)
    try:
        handle = patch(model, stages_of(method))
    except vtprune.UnsupportedModel:
        pytest.skip(f"{name} cannot hold {method}")
    with handle:
        check(model, call, singles)


@pytest.mark.parametrize("method", ["divprune", "random", "uniform"])
def test_one_budget_for_all_images_of_a_sample(method: str) -> None:
    model = families.model("llava")
    call, singles = packed_of("llava", (2, 1, 3))
    for options in ({"keep": 7, "per": "sample"}, {"keep_total": 9}, {"keep_total": 0.4}):
        with patch(model, method, **options):
            check(model, call, singles)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "mistral3"])
def test_explicit_block_masks(name: str, additive: bool, inside: bool) -> None:
    model = families.model(name)
    call, singles = packed_of(name)
    mask = blocks(singles)
    call["attention_mask"] = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min) if additive else mask
    with patch(model, stages_of("fastv" if inside else "divprune")):
        check(model, call, singles)


def test_a_mask_that_is_not_causal_inside_a_sample() -> None:
    """Words see all images of their sample, images see each other in both directions."""
    model, name = families.model("llava"), "llava"
    call, singles = packed_of(name)
    whole = call["input_ids"][0] == families.IMAGE
    mask = blocks(singles) | (blocks(singles).mT & whole[:, None] & whole)
    call["attention_mask"], lengths, start = mask, lengths_of(singles), 0
    for single, length in zip(singles, lengths, strict=True):
        single["attention_mask"] = mask[..., start : start + length, start : start + length]
        start += length
    for method in ("divprune", "fastv"):
        with patch(model, stages_of(method)):
            check(model, call, singles)
    linear, singles = packed_of("qwen3_5")
    whole = linear["input_ids"][0] == families.IMAGE
    linear["attention_mask"] = blocks(singles) | (blocks(singles).mT & whole[:, None] & whole)
    with patch(families.model("qwen3_5"), "divprune", keep=0.5), pytest.raises(UnsupportedCall, match="packs several"):
        families.model("qwen3_5")(**linear)


@pytest.mark.parametrize("told", ["cu_seq_lens", "seq_idx"])
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_5"])
def test_lengths_beside_or_in_place_of_position_ids(name: str, ids: bool, told: str) -> None:
    model = families.model(name)
    call, singles = packed_of(name)
    lengths = torch.tensor(lengths_of(singles))
    if told == "seq_idx":
        call["seq_idx"] = torch.repeat_interleave(torch.arange(3), lengths)[None].int()
    else:
        sums = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        call |= {f"cu_seq_lens_{x}": sums for x in "qk"} | {f"max_length_{x}": int(lengths.max()) for x in "qk"}
    if not ids:
        del call["position_ids"]
    for method in ("divprune", "fastv"):
        with patch(model, stages_of(method)):
            check(model, call, singles)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_forms_of_position_ids(name: str, form: str) -> None:
    """With or without the line of word positions; a single line, with which all axes agree."""
    model = families.model(name)
    call, singles = packed_of(name)
    pick = {"text and axes": lambda x: x, "axes": lambda x: x[1:], "one line": lambda x: x[0]}[form]
    for each in (call, *singles):
        each["position_ids"] = pick(each["position_ids"])
    with patch(model, "divprune", keep=0.5):
        check(model, call, singles)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_batch_of_packed_rows(name: str) -> None:
    """Two rows of two samples each and of one length: what is told of the first says nothing of the second."""
    model = families.model(name)
    visuals = (1, 0, 1, 1)
    samples = [families.turn(name, n, seed=10 * i) for i, n in enumerate(visuals)]
    total = [sum(len(p.ids) for p in samples[i] + samples[i + 1]) for i in (0, 2)]
    samples[1].append(families.text(77, max(0, total[1] - total[0])))
    samples[3].append(families.text(78, max(0, total[0] - total[1])))
    singles: list[Any] = [families.build(name, [sample]) for sample in samples]
    call: Any = {k: v for k, v in families.build(name, samples).items() if k != "attention_mask"} | {"use_cache": False}
    for single in singles:
        del single["attention_mask"]
        single.update(position_ids=_ids(name, single), use_cache=False)
    for key in ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids"):
        if key in singles[0]:
            rows = [torch.cat([single[key] for single in singles[i : i + 2]], -1) for i in (0, 2)]
            call[key] = torch.cat(rows, -2)
    with patch(model, "divprune", keep=0.5):
        for row in (0, 1):
            check(model, call, singles[2 * row : 2 * row + 2], row)


@pytest.mark.parametrize("method", ["divprune", "fastv", "hiprune"])
@pytest.mark.parametrize("name", families.NAMES)
def test_keep_all_is_the_stock_packed_model(name: str, method: str) -> None:
    if name not in INSIDE and method == "fastv":
        pytest.skip("sliding layers hold no stage inside the LLM")
    model = families.model(name)
    call, _ = packed_of(name)
    with torch.no_grad():
        stock = model(**call).logits
        try:
            handle = patch(model, method, keep=1.0)
        except vtprune.UnsupportedModel:
            pytest.skip(f"{name} cannot hold {method}")
        with handle:
            assert torch.equal(model(**call).logits, stock)


def test_rows_that_ask_for_a_cache_are_refused() -> None:
    for name in ("llava", "qwen2_5_vl", "gemma3"):
        model = families.model(name)
        call, _ = packed_of(name)
        del call["use_cache"]
        with torch.no_grad(), patch(model, "divprune", keep=0.5):
            with pytest.raises(UnsupportedCall, match=r"packs 3 samples into 1 rows.*use_cache=False"):
                model(**call)
            with pytest.raises(UnsupportedCall, match=r"packs 3 samples"):
                model(**call, past_key_values=transformers.DynamicCache())
            model(**call | {"use_cache": False})
        with patch(model, "divprune", keep=1.0), torch.no_grad():
            model(**call)


def test_a_tensor_nobody_can_tell_apart_is_refused() -> None:
    call, _ = packed_of("llava")
    with patch(families.model("llava"), "divprune", keep=0.5), pytest.raises(UnsupportedCall, match="'weights'"):
        families.model("llava")(**call, weights=torch.ones(call["input_ids"].shape))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_embeddings_in_place_of_ids(name: str) -> None:
    """Image features of the packed row encoded before, tokens given as embeddings."""
    model = families.model(name)
    call, singles = packed_of(name)
    with torch.no_grad():
        for each in (call, *singles):
            each["inputs_embeds"] = model.get_input_embeddings()(each.pop("input_ids"))
        lengths = [single["inputs_embeds"].shape[1] for single in singles]
        with patch(model, "divprune", keep=0.5):
            ours = model(**call).logits[0].split(lengths)
            for mine, single in zip(ours, singles, strict=True):
                torch.testing.assert_close(mine, model(**single).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_loss_and_gradients(method: str) -> None:
    """Training on a packed row equals training on its samples, each with the loss of its own words."""
    model = families.fresh("llava").train()
    call, singles = packed_of("llava")
    labels = [torch.where(s["input_ids"] >= families.FIRST_TEXT, s["input_ids"], -100) for s in singles]
    for one in labels:
        one[:, 0] = -100  # as padding-free collators mark the borders
    counts = [int((one[:, 1:] >= 0).sum()) for one in labels]
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    with patch(model, stages_of(method)):
        loss = model(**call, labels=torch.cat(labels, 1)).loss
        (ours,) = torch.autograd.grad(loss, weight)
        losses = [model(**s, labels=one).loss * n for s, one, n in zip(singles, labels, counts, strict=True)]
        total = sum(losses) / sum(counts)
        (theirs,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(loss, total, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_flash_attention_is_given_rows_of_one_sample(flash: Any, method: str) -> None:
    call, singles = packed_of("llava")
    with patch(flash, stages_of(method)):
        check(flash, call, singles)
    test_flash.seen.clear()
    words = {k: call[k][:, -9:] for k in ("input_ids", "position_ids")}
    with patch(flash, stages_of(method)), torch.no_grad():
        flash(**words | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, use_cache=False)
    assert [ids.tolist() for _, ids, _ in test_flash.seen] == [[[0, 1, 2, 3, 0, 1, 2, 3, 4]]] * 4, (
        "text alone is not touched"
    )


def test_outputs_of_a_packed_row() -> None:
    model = families.model("llava")
    call, _ = packed_of("llava")
    length = call["input_ids"].shape[1]
    with patch(model, "divprune", keep=0.5) as handle, torch.no_grad():
        out = model.model(**call, output_hidden_states=True)
        assert out.last_hidden_state.shape[:2] == (1, length)
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert torch.equal(model.model(**call, return_dict=False)[0], out.last_hidden_state)
        assert len(handle.last.index) == 3, "every sample is a row of its own"
        two = model(**call, logits_to_keep=2).logits
        torch.testing.assert_close(two, model(**call).logits[:, -2:], rtol=0, atol=1e-6)


# -- calls that pack nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.NAMES)
def test_ordinary_calls_are_no_packed_rows(name: str) -> None:
    """No mask; ids of padded rows; several turns; all with the cache that packed rows are refused with."""
    model = families.model(name)
    single: Any = dict(families.inputs(name, (2,)))
    masked = model(**single).logits
    with torch.no_grad(), patch(model, "divprune", keep=0.5) as handle:
        expected = model(**single).logits
        assert not torch.equal(expected, masked)
        del single["attention_mask"]
        for cached in (None, False):
            for ids in (None, _ids(name, single)):
                given = {} if ids is None else {"position_ids": ids}
                torch.testing.assert_close(model(**single, **given, use_cache=cached).logits, expected)
                assert len(handle.last.index) == 1
        batch = families.inputs(name, (2, 1))
        model(**batch)
        reference.greedy(model, batch, 2)
        assert len(handle.last.index) == 2


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"])
def test_ids_of_padding(name: str, pad: int) -> None:
    """Padding has the id 0 or 1 throughout, with a mask of two or four dimensions and with none."""
    model, batch = families.model(name), families.inputs(name, (2, 1))
    mask = batch["attention_mask"]
    ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, pad)
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    square = causal & mask[:, None, None].bool()
    own = square | torch.eye(mask.shape[1]).bool()  # rows of padding see themselves
    with patch(model, "divprune", keep=0.5) as handle, torch.no_grad():
        expected = model(**batch, position_ids=ids).logits
        for form in (square, own):
            if name in ("gemma3", "qwen3_5"):
                break  # they read more than causally, or know padding only
            given = {**batch, "attention_mask": form, "position_ids": ids}
            for row in (0, 1):
                real = mask[row].bool()
                torch.testing.assert_close(model(**given).logits[row, real], expected[row, real], rtol=0, atol=1e-5)
        del batch["attention_mask"]
        model(**batch, position_ids=ids)
        assert len(handle.last.index) == 2


def test_ids_that_go_on_in_a_second_turn() -> None:
    model = families.model("llava")
    turns = [families.turn("llava", 1, seed=i, first=i == 0) for i in (0, 1)]
    first, second, both = (families.build("llava", [row]) for row in (*turns, turns[0] + turns[1]))
    for each in (first, second, both):
        del each["attention_mask"]
    start = first["input_ids"].shape[1]
    with patch(model, "divprune", keep=0.5), torch.no_grad():
        cache = model(**first, position_ids=torch.arange(start)[None]).past_key_values
        ids = torch.arange(start, start + second["input_ids"].shape[1])[None]
        ours = model(**second, position_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(ours, model(**both).logits[:, start:], rtol=0, atol=1e-5)


def test_gaps_are_samples_only_where_transformers_says_so() -> None:
    """Without mask and cache it takes any gap in the ids for a border; with a cache a gap is a gap."""
    model = families.model("llava")
    batch: Any = dict(families.inputs("llava"))
    length = batch["input_ids"].shape[1]
    ids = torch.arange(length)[None] + 5 * (torch.arange(length) >= length - 3)
    del batch["attention_mask"]
    with patch(model, "divprune", keep=0.5) as handle, torch.no_grad():
        model(**batch, position_ids=ids)
        assert len(handle.last.index) == 1
        model(**batch, position_ids=ids, use_cache=False)
        assert len(handle.last.index) == 2


def test_lengths_of_a_single_sample_do_not_reach_shorter_layers() -> None:
    """They say nothing of rows that hold one sample, and would be wrong once the row is cut."""
    model, batch = families.model("llava"), families.inputs("llava")
    length = batch["input_ids"].shape[1]
    told = {"cu_seq_lens_q": torch.tensor([0, length]), "max_length_q": length}
    seen = []
    hook = (
        model.get_decoder()
        .layers[3]
        .register_forward_pre_hook(lambda m, a, k: seen.append("max_length_q" in k), with_kwargs=True)
    )
    with torch.no_grad():
        with patch(model, "divprune", keep=0.5):
            expected = model(**batch).logits
            assert torch.equal(model(**batch, **told).logits, expected)
        with patch(model, "divprune", keep=1.0):
            model(**batch, **told)
    hook.remove()
    assert seen == [False, False, True]
