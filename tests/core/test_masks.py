"""Attention masks with zeros over image tokens and in the text: what nobody sees is no candidate and no hindrance."""

from __future__ import annotations

from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Stage
from vtprune.types import budget

patch: Any = vtprune.patch
WINDOWED = ("gemma3", "gemma3-window")


def with_holes(name: str, words: bool = True) -> tuple[Any, Tensor]:
    """A row of two images whose first has three hidden tokens, and one hidden word; the mask [L] bool."""
    batch = families.inputs(name, (2,))
    first = batch.units[0][0]
    mask = torch.ones(batch["input_ids"].shape[1], dtype=torch.bool)
    mask[torch.tensor(first[1:4])] = False
    if words:
        mask[first[-1] + 1 if not families.FAMILIES[name].visual_first else -3] = False
    if families.FAMILIES[name].mrope:  # transformers itself counts no positions over a hole in an image
        batch["position_ids"] = reference.positions(families.model(name), batch)
    batch["attention_mask"] = mask[None].long()
    return batch, mask


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("name", families.NAMES)
def test_keep_all_with_hidden_tokens_is_the_stock_model(name: str, method: str) -> None:
    if method == "fastv" and name in WINDOWED:
        pytest.skip("sliding layers hold no stage inside the LLM")
    model, (batch, _) = families.model(name), with_holes(name)
    with torch.no_grad():
        stock = model(**batch).logits
        with patch(model, method, keep=1.0):
            assert torch.equal(model(**batch).logits, stock)
    if name not in WINDOWED and not families.FAMILIES[name].mrope:
        _, logits = reference.greedy(model, batch, 3)
        with patch(model, method, keep=1.0):
            assert torch.equal(reference.greedy(model, batch, 3)[1], logits)


@pytest.mark.parametrize("method", ["divprune", "average_pool", "fastv"])
@pytest.mark.parametrize("name", families.NAMES)
def test_hidden_tokens_are_no_candidates(name: str, method: str) -> None:
    """Budgets count what is seen; logits are those of the stock layers on what stays, under the stock mask."""
    if name in WINDOWED and method == "fastv":
        pytest.skip("sliding layers hold no stage inside the LLM")
    linear = name == "qwen3_5"
    model, (batch, mask) = families.model(name), with_holes(name, words=not linear)
    where = 2 if method == "fastv" else "llm"
    with patch(model, Stage(where, vtprune.create(method), keep=0.5)) as handle, torch.no_grad():
        ours = model(**batch).logits[0]
        last = handle.last
    seen = [[p for p in unit if mask[p]] for unit in batch.units[0]]
    assert [u.n for u in last.units] == [len(unit) for unit in seen if unit]
    for unit, visible in zip(last.units, [unit for unit in seen if unit], strict=True):
        assert len(unit.positions) == budget(0.5, len(visible))
        assert set(unit.positions.tolist()) <= set(visible)
    cuts = [reference.Cut(torch.tensor(v), u.assignment) for u, v in zip(last.units, [v for v in seen if v])]
    full = reference.dense(model, batch)
    nothing = vtprune.Assignment(torch.empty(0, dtype=torch.int64))
    cuts.append(reference.Cut((~mask).nonzero().flatten(), nothing))  # goes with the first cut
    theirs = reference.pruned_logits(model, full, {where: cuts})
    places = torch.tensor(reference.survivors({where: cuts}, len(mask)))
    real = mask[places]
    torch.testing.assert_close(ours[places[real]], theirs[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["llm", 1, 2])
def test_linear_attention_fades_over_hidden_words(where: Any) -> None:
    """A hidden word adds nothing to the state, which goes on fading: it is no padding and stays in its place."""
    model, (batch, mask) = families.model("qwen3_5"), with_holes("qwen3_5")
    calls: list[dict[str, Any]] = []
    text = model.get_decoder()
    hook = text.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
        hook.remove()
        with patch(model, Stage(where, vtprune.create("uniform"), keep=0.5)) as handle:
            ours = model.model(**batch).last_hidden_state[0]
        visual = torch.tensor([p for unit in batch.units[0] for p in unit])
        gone = torch.zeros_like(mask).index_fill(0, visual, True)
        gone[torch.cat([u.positions for u in handle.last.units])] = False
        stays = (~gone).nonzero().flatten()
        if where == "llm":
            call = calls[0]
            theirs = text(
                inputs_embeds=call["inputs_embeds"][:, stays],
                attention_mask=mask[None, stays].long(),
                position_ids=call["position_ids"][..., stays],
                use_cache=False,
            ).last_hidden_state[0]
            real = mask[stays]
            torch.testing.assert_close(ours[stays[real]], theirs[real], rtol=0, atol=1e-5)
        else:
            assert (handle.last.index[0] == stays).all()


def test_an_image_that_is_hidden_altogether() -> None:
    model, batch = families.model("llava"), families.inputs("llava", (2,))
    first, second = batch.units[0]
    batch["attention_mask"][0, torch.tensor(first)] = 0
    for method in ("divprune", "fastv", "pyramiddrop", "sparsevlm"):
        with patch(model, method, keep=0.5) as handle, torch.no_grad():
            model(**batch)
            assert {p for u in handle.last.units for p in u.positions.tolist()} <= set(second)


@pytest.mark.parametrize("name", ["llava", "internvl", "llava_next"])
@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_decode_behind_hidden_tokens(name: str, method: str) -> None:
    """Every generated token is as without a cache, where the whole mask is looked at anew."""
    model, (batch, _) = families.model(name), with_holes(name)
    with patch(model, method, keep=0.5):
        _, cached = reference.greedy(model, batch, 4)
        _, static = reference.greedy(model, batch, 4, cache_implementation="static")
        torch.testing.assert_close(static, cached, rtol=0, atol=1e-5)
        if method == "divprune":
            torch.testing.assert_close(reference.greedy(model, batch, 4, use_cache=False)[1], cached, rtol=0, atol=1e-5)


def test_a_four_dimensional_mask_whose_last_word_sees_no_image() -> None:
    """What one query may not see is not hidden: the others see it."""
    model, batch = families.model("llava"), families.inputs("llava")
    length, image = batch["input_ids"].shape[1], batch.units[0][0]
    mask = torch.ones(length, length).tril().bool()
    mask[-1, torch.tensor(image)] = False
    batch["attention_mask"] = mask[None, None]
    with torch.no_grad():
        stock = model(**batch).logits
        with patch(model, "uniform", keep=1.0):
            assert torch.equal(model(**batch).logits, stock)
        with patch(model, Stage("llm", vtprune.create("uniform"), keep=0.4)) as handle:
            ours = model(**batch).logits[0]
        cut = reference.Cut(torch.tensor(image), handle.last.units[0].assignment)
        theirs = reference.pruned_logits(model, reference.dense(model, batch), {"llm": [cut]})
        places = reference.survivors({"llm": [cut]}, length)
    torch.testing.assert_close(ours[places], theirs, rtol=0, atol=1e-5)
