"""Visual tokens leave the LLM: shares of attention against eager maps, exact logits, caches, batches."""

from __future__ import annotations

from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Stage, Visual
from vtprune.methods.in_llm.withdraw import FROM_TEXT, TO_TEXT, Withdraw, withdrawals

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "mistral3"]
LAYER = 3  # behind the layers where Qwen3-VL adds features


@torch.no_grad()
def shares(family: str, batch: Any) -> tuple[float, float]:
    """alpha t->v and alpha v->t of the layer before LAYER, from the whole eager map (a single sample)."""
    model = families.model(family, "eager")
    maps: list[Tensor] = []
    attention = model.get_decoder().layers[LAYER - 1].self_attn
    hook = attention.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    model(**batch)
    hook.remove()
    a = maps[0][0].double().mean(0)
    visual = torch.tensor([p for unit in batch.units[0] for p in unit])
    text = torch.tensor([p for p in range(int(visual.min()), len(a)) if p not in set(visual.tolist())])
    whole_text = float(a[text].sum())
    whole_visual = float(a[visual].sum())
    return float(a[text][:, visual].sum()) / whole_text, float(a[visual][:, text].sum()) / whole_visual


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_the_whole_map(family: str, images: int) -> None:
    """Two images: text stands between them, so the second one looks at text."""
    batch = families.inputs(family, rows=(images,))
    to_visual, to_text = shares(family, batch)
    assert (to_text > 0) == (images == 2 or family == "mistral3")  # whose rows end with a token that is text
    (stage,), log = reference.spy([Stage(LAYER, Withdraw(threshold=1e-6))])
    with vtprune.patch(families.model(family), stage), torch.no_grad():
        families.model(family)(**batch)
    ((unit,),) = [call.units for call in log]
    assert float(unit.signals[FROM_TEXT].sum()) == pytest.approx(to_visual, abs=1e-5)
    assert float(unit.signals[TO_TEXT].mean()) == pytest.approx(to_text, abs=1e-5)
    assert unit.n == sum(len(u) for u in batch.units[0]), "all images of the sample together"


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_exactly_when_both_shares_are_below(family: str) -> None:
    batch = families.inputs(family, rows=(2,))
    high = max(shares(family, batch))
    model, visual = families.model(family), sum(len(u) for u in batch.units[0])
    length = batch["input_ids"].shape[1]
    for threshold, left in ((high * 0.99, length), (min(1.0, high * 1.01), length - visual)):
        with vtprune.patch(model, Stage(LAYER, Withdraw(threshold))) as handle, torch.no_grad():
            model(**batch)
        assert handle.last.lengths == [length] * LAYER + [left] * (families.depth(model) - LAYER)


@pytest.mark.parametrize("threshold", [None, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_the_hand_cut_sequence(family: str, threshold: float | None) -> None:
    """A left-padded batch with one and two images, generating on the shortened cache."""
    model, rows = families.model(family), (2, 1)
    stages, log = reference.spy([Stage(LAYER, Withdraw(threshold))])
    batch = families.inputs(family, rows=rows)
    with vtprune.patch(model, stages):
        tokens, ours = reference.greedy(model, batch, 4)
    assert log
    units = [families.inputs(family, rows=rows, only=r).units[0] for r in range(len(rows))]
    for row in range(len(rows)):
        cuts = reference.cuts_of_row(log, range(len(rows)), units)[row]
        theirs = reference.expected(model, family, rows, row, cuts, tokens[row])
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=1e-4 if family == "qwen3_vl" else 1e-5)


def test_todre_runs_both_stages_by_name() -> None:
    """The tiny models are too shallow for the published layers, so the schedule is looked at, and run, by itself."""
    method = vtprune.create("todre")
    stages = method.stages(0.25, 32)
    assert [s.where for s in stages] == ["llm", 29, 30, 31]
    assert all(s.method == Withdraw(0.1) and s.keep is None and s.per == "sample" for s in stages[1:])
    assert [s.where for s in withdrawals(28, 0.1)] == [25, 26, 27]
    assert [s.where for s in method.stages(1.0, 32)] == ["llm"], "keep=1.0 changes nothing"
    assert [s.where for s in vtprune.create("todre", threshold=None).stages(0.25, 32)] == ["llm"]
    model, batch = families.model("llava"), families.inputs("llava", rows=(1, 2))
    with vtprune.patch(model, [stages[0], Stage(LAYER, Withdraw(1.0))]) as handle, torch.no_grad():
        model(**batch)
    whole, pruned, bare = (handle.last.lengths[i] for i in (0, LAYER - 1, LAYER))
    assert whole == pruned > bare
    assert {u.method for u in handle.last.units} == {"todre", "withdraw"}


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, float("nan")])
def test_threshold_outside_its_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"threshold=.*\(0, 1\]"):
        Withdraw(bad)


def test_a_budget_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="leave out keep"):
        Withdraw()(Visual(torch.randn(6, 4), 3))
