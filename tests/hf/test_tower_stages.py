"""Stages inside the vision tower against a tower walked by hand, block by block, on the tokens that stay.

The oracle knows which patches make a visual token from gradients of the stock model, and walks one image at a time with
the tower's own blocks: no hooks of ours, no padding, segment lengths counted anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor, nn

import vtprune
from vtprune import Assignment, Method, Stage, Visual
from vtprune.hf import tower as towers
from vtprune.model_adapters.tower_tokens import blocks_of
from vtprune.model_adapters.towers import has_cls, layer_index, tower_of
from vtprune.tap import read
from vtprune.tower import places
from vtprune.types import Signal, UnsupportedCall, UnsupportedModel

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
RESIZED = "llava_onevision"  # it resizes the mosaic of its third image after the tower
# Towers whose rows are crops of which every patch is a token; elsewhere gradients tell.
ONE_TO_ONE = (RESIZED, "llava", "llava_next", "llava_next_video", "paligemma", "video_llava", "video_llava-video")
QWEN = tuple(f"{family}{kind}" for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") for kind in ("", "-video"))
PACKED = (*QWEN, "qwen3_5", "glm4v", "mistral3")
FAMILIES = tuple(name for name in families.NAMES if name != "gemma3-window")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@dataclass(frozen=True)
class Brightest(Method):
    """The tokens of highest first channel; without a budget those above the mean, so that counts differ."""

    def __call__(self, v: Visual) -> Assignment:
        assert v.block is not None
        return Assignment(idx=brightest(v.x, v.budget))


@dataclass(frozen=True)
class Blending(Brightest):
    """The same, each kept token blended with the token after it."""

    def __call__(self, v: Visual) -> Assignment:
        idx = brightest(v.x, v.budget)
        twice = torch.arange(len(idx)).repeat(2)
        after = (idx + 1).clamp(max=v.n - 1)
        return Assignment(idx=idx, src=torch.cat([idx, after]), dst=twice, w=torch.full((len(twice),), 0.5))


def brightest(x: Tensor, budget: int | None) -> Tensor:
    scores = x[:, 0].double()
    count = budget if budget is not None else max(1, int((scores > scores.mean()).sum()))
    return scores.argsort(descending=True, stable=True)[:count].sort().values


# -- the oracle -------------------------------------------------------------------------------------------------------


class Tower:
    """The tower of a tiny model, its blocks that matter, and how it lays out tokens; all read from the stock model."""

    def __init__(self, model: Any, family: str) -> None:
        self.model, self.family, self.packed = model, family, family in PACKED
        self.base = model.base_model
        self.module = tower_of(self.base, "video" if families.FAMILIES[family].video else "image")
        self.blocks = blocks_of(self.module)
        self.used = layer_index(self.base, self.module, len(self.blocks), None) + 1
        self.prefix = int(has_cls(self.module))

    @contextmanager
    def watched(self) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]]:
        """What every block was called with, and what it put out."""
        seen: list[Any] = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append((args, kwargs, output[0] if isinstance(output, tuple) else output))

        handles = [b.register_forward_hook(note, with_kwargs=True) for b in self.blocks]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def tokens(self, batch: Any) -> list[tuple[int, list[list[int]]]]:
        """(row of the tower's batch, patches of every token) of every unit, tokens in the order of the LLM."""
        if self.family in ONE_TO_ONE:
            with torch.no_grad(), self.watched() as seen:
                self.model(**batch)
            rows, n = seen[0][2].shape[:2]
            return [(row, [[p] for p in range(self.prefix, n)]) for row in range(rows)]
        sources = self.sources(batch)
        if self.packed:
            return [(0, [[p for _, p in token] for token in unit if token]) for row in sources for unit in row]
        flat = [token for row in sources for unit in row for token in unit if token]
        rows = sorted({r for token in flat for r, _ in token})
        return [(row, [[p for _, p in token] for token in flat if token[0][0] == row]) for row in rows]

    @torch.enable_grad()
    def sources(self, batch: Any) -> list[list[list[list[tuple[int, int]]]]]:
        """[row][unit][token] -> (row, position) in the last used block of every patch that the token depends on."""
        leaves, embeds = [], []

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            leaf = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
            leaves.append(leaf)
            return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

        hooks = [
            self.blocks[self.used - 1].register_forward_hook(cut, prepend=True),
            self.model.get_decoder().register_forward_pre_hook(
                lambda m, a, k: embeds.append(k["inputs_embeds"]), with_kwargs=True
            ),
        ]
        try:
            self.model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        out = []
        for row, units in enumerate(batch.units):
            out.append([[self._depends(embeds[0][row, p], leaves[0]) for p in unit] for unit in units])
        return out

    def _depends(self, token: Tensor, leaf: Tensor) -> list[tuple[int, int]]:
        if not token.requires_grad:
            return []
        (grad,) = torch.autograd.grad(token.square().sum(), leaf, retain_graph=True, allow_unused=True)
        if grad is None:  # a newline
            return []
        hit = grad.view(-1, *grad.shape[-2:]).abs().sum(-1).nonzero()
        return [(int(r), int(p)) for r, p in hit]

    @torch.no_grad()
    def walk(self, batch: Any, keeps: dict[int, Any], method: type = Brightest) -> list[tuple[int, list[int], Tensor]]:
        """(row, positions left, their states after the last used block) of every unit. keeps: {block: share}."""
        with self.watched() as seen:
            self.model(**batch)
        return [self._walk(row, tokens, seen, keeps, method) for row, tokens in self.tokens(batch)]

    def _walk(self, row: int, tokens: list[list[int]], seen: list[Any], keeps: dict[int, Any], method: type):
        start = seen[0][0][0] if seen[0][0] else seen[0][1]["hidden_states"]
        start = start[None] if start.dim() == 2 else start
        states = {p: start[row, p] for token in tokens for p in token} | {p: start[row, p] for p in range(self.prefix)}
        n, alive = len(tokens), list(tokens)
        for k in range(self.used + 1):
            if k in keeps:
                (budget,) = Stage(("vit", k), Brightest(), keep=keeps[k]).budgets([n])
                if budget is None or budget < len(alive):
                    alive, states = self._cut(alive, states, method(), (k, self.used), budget)
            if k == self.used:
                break
            at = sorted(states)
            x = torch.stack([states[p] for p in at])
            x = self.blocks[k](x if self._flat(seen) else x[None], **self._arguments(seen[k][1], at))
            x = (x[0] if isinstance(x, tuple) else x).view(len(at), -1)
            states = dict(zip(at, x, strict=True))
        at = sorted(states)
        return row, at, torch.stack([states[p] for p in at])

    def _flat(self, seen: list[Any]) -> bool:
        return seen[0][2].dim() == 2

    def _cut(self, alive: list[list[int]], states: dict[int, Tensor], method: Method, block: Any, budget: int | None):
        x = torch.stack([torch.stack([states[p] for p in token]).mean(0) for token in alive])
        answer = method(Visual(x, budget, block=block))
        patches = torch.stack([torch.stack([states[p] for p in token]) for token in alive])
        new = answer.apply(patches)
        kept = [alive[i] for i in answer.idx.tolist()]
        left = {p: states[p] for p in range(self.prefix)}
        for token, rows in zip(kept, new, strict=True):
            left |= dict(zip(token, rows, strict=True))
        return kept, left

    def _arguments(self, kwargs: dict[str, Any], at: list[int]) -> dict[str, Any]:
        """A block's recorded keyword arguments for one image alone, of which the patches `at` are left."""
        out = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "attention_mask")}
        if not self.family.startswith("internvl") and "cu_seqlens" not in kwargs:
            out["attention_mask"] = None
        if "position_embeddings" in kwargs:
            out["position_embeddings"] = tuple(
                t.index_select(-2, torch.tensor(at)) for t in kwargs["position_embeddings"]
            )
        if "cu_seqlens" in kwargs:
            edges = kwargs["cu_seqlens"].tolist()
            counts = [sum(a <= p < b for p in at) for a, b in pairwise(edges)]
            ends = torch.tensor([c for c in counts if c]).cumsum(0).tolist()
            out["cu_seqlens"] = torch.tensor([0, *ends], dtype=torch.int32)
        return out


def stages(tower: Tower, keeps: dict[int, Any], method: Method, **options: Any) -> list[Stage]:
    return [Stage(("vit", k), method, keep=keep, **options) for k, keep in keeps.items()]


# -- tests ------------------------------------------------------------------------------------------------------------


@every_attention
@every_family
def test_tower_equals_a_walk_by_hand(family: str, attention: str) -> None:
    """Two images: states of every kept patch after the last used block, and what reaches the LLM."""
    model, batch = families.model(family, attention), families.inputs(family, rows=(2,))
    tower = Tower(model, family)
    keeps = {1: 0.75, tower.used: 0.4}
    theirs = tower.walk(batch, keeps)
    with vtprune.patch(model, stages(tower, keeps, Brightest())) as handle, torch.no_grad(), tower.watched() as seen:
        model(**batch)
        last = handle.last
    ours = seen[tower.used - 1][2]
    assert ours.shape == seen[0][2].shape, "all rows must be seen from outside"
    ours = ours[None] if ours.dim() == 2 else ours
    stays = set()
    for row, at, states in theirs:
        torch.testing.assert_close(ours[row, at], states, **TOLERANCE)
        stays |= {(row, p) for p in at}
    if family in ONE_TO_ONE and family not in ("llava", "paligemma", "video_llava"):
        return  # un-padded mosaics and class tokens: the test with noise is about them
    for row, units in enumerate(tower.sources(batch)):
        kept = set(last.index[row].tolist())
        for unit, positions in zip(units, batch.units[row], strict=True):
            for token, position in zip(unit, positions, strict=True):
                assert (position in kept) == (not token or set(token) <= stays)


@every_family
def test_merged_tokens_flow_on(family: str) -> None:
    """A merge inside the tower: patch by patch where a token has several."""
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    tower = Tower(model, family)
    theirs = tower.walk(batch, {1: 0.6}, Blending)
    with vtprune.patch(model, stages(tower, {1: 0.6}, Blending())), torch.no_grad(), tower.watched() as seen:
        model(**batch)
    ours = seen[tower.used - 1][2]
    ours = ours[None] if ours.dim() == 2 else ours
    for row, at, states in theirs:
        torch.testing.assert_close(ours[row, at], states, **TOLERANCE)


@every_family
def test_the_llm_sees_nothing_of_dropped_patches(family: str) -> None:
    """Noise in the rows that stand in for dropped patches changes no bit of what the LLM is given."""
    model, batch = families.model(family), families.inputs(family, rows=(2,))
    tower = Tower(model, family)
    theirs = tower.walk(batch, {1: 0.5})
    block, given = tower.blocks[tower.used - 1], []

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        out = (output[0] if isinstance(output, tuple) else output).clone()
        rows = out[None] if out.dim() == 2 else out
        noise = torch.randn_like(rows)
        for row, at, _ in theirs:
            noise[row, at] = rows[row, at]
        if tower.packed:
            for _, at, _ in theirs:
                noise[0, at] = rows[0, at]
        noise = noise[0] if out.dim() == 2 else noise
        return (noise, *output[1:]) if isinstance(output, tuple) else noise

    recorders = list(block._forward_hooks)
    with vtprune.patch(model, stages(tower, {1: 0.5}, Brightest())), torch.no_grad():
        spy = model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: given.append(k["inputs_embeds"].clone()), with_kwargs=True
        )
        hook = spy
        try:
            model(**batch)
            hook = block.register_forward_hook(poison)
            for key in recorders:  # behind ours, before those that record hidden states
                block._forward_hooks.move_to_end(key)
            model(**batch)
        finally:
            spy.remove()
            hook.remove()
    assert given[0].shape[1] < batch["input_ids"].shape[1]
    assert torch.equal(*given)


@every_attention
@every_family
def test_generation_equals_the_stock_llm_on_the_kept_tokens(family: str, attention: str) -> None:
    """Prefill and decode against the decoder walked by hand on what the shortened tower put out."""
    model, batch = families.model(family, attention), families.inputs(family, rows=(1,))
    tower = Tower(model, family)
    base = model.base_model
    name = "get_video_features" if families.FAMILIES[family].video else "get_image_features"
    with vtprune.patch(model, stages(tower, {1: 0.5}, Brightest())) as handle, torch.no_grad():
        tokens, ours = reference.greedy(model, batch, 3)
        cuts = [cut(batch, unit) for unit in handle.last.units]
        observed, outputs = base.__dict__[name], []
        base.__dict__[name] = lambda *a, **k: outputs.append(observed(*a, **k)) or outputs[-1]
        model(**batch)
        base.__dict__[name] = observed
    base.__dict__[name] = lambda *_, **__: outputs[0]
    try:
        full = reference.dense(model, batch, tokens[0, :-1].tolist())
    finally:
        del base.__dict__[name]
    theirs = reference.pruned_logits(model, full, {"llm": cuts})[-3:]
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-5)


def cut(batch: Any, unit: Any) -> reference.Cut:
    """A result about an image as the oracle wants it."""
    (positions,) = (torch.tensor(u) for u in batch.units[unit.row] if set(unit.positions.tolist()) <= set(u))
    assert unit.n == len(positions)
    return reference.Cut(positions, Assignment(idx=unit.idx))


@every_attention
@every_family
def test_a_ragged_batch_equals_its_rows(family: str, attention: str) -> None:
    """The method decides, so crops keep different counts; pads must not be seen."""
    rows = (2, 1) if family == RESIZED else (2, 0, 1)
    model, batch = families.model(family, attention), families.inputs(family, rows=rows)
    with vtprune.patch(model, Stage(("vit", 1), Brightest())) as handle, torch.no_grad():
        together = model(**batch).logits
        counts = {len(unit.idx) for unit in handle.last.tower_units}
        for row in (0, len(rows) - 1):
            alone = model(**families.inputs(family, rows=rows, only=row)).logits
            torch.testing.assert_close(together[row, -1], alone[0, -1], rtol=0, atol=2e-5)
    assert len(counts) > 1, "the test wants crops that keep different counts"


@every_family
def test_keep_all_and_removal(family: str) -> None:
    model, batch = families.model(family), families.inputs(family, rows=(2, 1))
    with torch.no_grad():
        before = model(**batch).logits
        with reference.untouched(model):
            with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=1.0)) as handle:
                assert torch.equal(model(**batch).logits, before)
                assert not handle.last.tower_units
            with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5)):
                assert not torch.equal(model(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "mistral3"])
def test_stages_in_tower_before_and_inside_the_llm(family: str) -> None:
    """Budgets are shares of the unpruned image; a stage sees what the one before it left."""
    model, batch = families.model(family), families.inputs(family, rows=(1, 2))
    inner = 3 if family == "qwen3_vl" else 2
    plan = [
        Stage(("vit", 1), Brightest(), keep=0.75),
        Stage("llm", vtprune.create("divprune"), keep=0.5),
        Stage(inner, vtprune.create("fastv"), keep=0.25),
    ]
    plan, log = reference.spy(plan)
    with vtprune.patch(model, plan) as handle, torch.no_grad():
        out = model.generate(**batch, max_new_tokens=3, do_sample=False)
        last = handle.last
    assert out.shape[1] == batch["input_ids"].shape[1] + 3
    sizes = [len(u) for row in batch.units for u in row]
    calls = {call.stage.where: call for call in log}
    left = [len(u.idx) for u in last.units if isinstance(u.where, tuple)]
    assert [v.n for v in calls["llm"].units] == left
    assert [len(a.idx) for a in calls["llm"].answers] == [round(0.5 * n) for n in sizes]
    assert [v.n for v in calls[inner].units] == [len(a.idx) for a in calls["llm"].answers]
    assert [len(a.idx) for a in calls[inner].answers] == [round(0.25 * n) for n in sizes]
    kept = [set(u.positions.tolist()) for u in last.units if isinstance(u.where, tuple)]
    for unit in (u for u in last.units if not isinstance(u.where, tuple)):
        assert any(set(unit.positions.tolist()) < k for k in kept)


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl", "qwen2_5_vl", "mistral3"])
def test_signals_before_the_llm_come_from_the_shortened_tower(family: str) -> None:
    """A stage before the LLM reads scores of the last block, which ran on what was left."""
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    tower = Tower(model, family)
    layer, wanted = tower.used - 1, Signal("received", tower.used - 1)

    @dataclass(frozen=True)
    class Reader(Method):
        needs = (wanted,)

        def __call__(self, v: Visual) -> Assignment:
            seen.append(v.signals[wanted])
            return Assignment(torch.arange(v.budget))

    seen: list[Tensor] = []
    plan = [Stage(("vit", layer), Brightest(), keep=0.5), Stage("llm", Reader(), keep=0.25)]
    with vtprune.patch(model, plan), torch.no_grad():
        model(**batch)
    ((_, at, _),) = tower.walk(batch, {layer: 0.5})
    received = received_by_hand(tower, batch, layer, at)
    tokens = tower.tokens(batch)[0][1]
    theirs = torch.stack([torch.stack([received[p] for p in t]).mean() for t in tokens if set(t) <= set(at)])
    assert len(theirs) == len(seen[0])
    torch.testing.assert_close(seen[0], theirs, rtol=1e-4, atol=1e-6)


def received_by_hand(tower: Tower, batch: Any, layer: int, at: list[int], kind: str = "received") -> dict[int, Tensor]:
    """A block's signal for the patches `at`, entering it alone; segments count by their number of queries."""
    with tower.watched() as seen, torch.no_grad():
        tower.model(**batch)
    states = seen[layer][0][0] if seen[layer][0] else seen[layer][1]["hidden_states"]
    x = states[at] if states.dim() == 2 else states[0, at][None]
    rows: list[Tensor] = []

    def note(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float) -> None:
        queries = q if kind == "received" else q.mean(2, keepdim=True).expand_as(q)
        weights = (queries @ k.mT * scaling).softmax(-1).mean(1).sum(1)[0]
        rows.append(v.mean(1).abs().sum(-1)[0] * len(at) if kind == "value_norm" else weights)

    undo = vtprune.tap.attach(attention_of(tower, layer), note)
    with torch.no_grad():
        tower.blocks[layer](x, **tower._arguments(seen[layer][1], at))
    undo()
    return dict(zip(at, torch.cat(rows) / len(at), strict=True))


@pytest.mark.parametrize("offset", [-1, -2])
@pytest.mark.parametrize("kind", ["received", "mean_query", "value_norm"])
@pytest.mark.parametrize("family", ["paligemma", "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl-video", "smolvlm", "mistral3"])
def test_signals_inside_the_tower(family: str, kind: str, offset: int) -> None:
    """Read where the block ran, on what was left there, and handed over for what is left now."""
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    tower, wanted = Tower(model, family), Signal(kind, offset)

    @dataclass(frozen=True)
    class Reader(Method):
        needs = (wanted,)

        def __call__(self, v: Visual) -> Assignment:
            seen.append(v.signals[wanted])
            return Assignment(torch.arange(v.budget))

    seen: list[Tensor] = []
    plan = [Stage(("vit", 1), Brightest(), keep=0.75), Stage(("vit", 2), Reader(), keep=0.25)]
    with vtprune.patch(model, plan), torch.no_grad():
        model(**batch)
    left = set(tower.walk(batch, {1: 0.75})[0][1])
    tokens = tower.tokens(batch)[0][1]
    at = sorted(left if offset == -1 else {p for token in tokens for p in token})
    signal = received_by_hand(tower, batch, 2 + offset, at, kind)
    theirs = torch.stack([torch.stack([signal[p] for p in t]).mean() for t in tokens if set(t) <= left])
    torch.testing.assert_close(seen[0], theirs, rtol=1e-4, atol=1e-6)


def test_class_tokens_that_the_llm_sees_stay() -> None:
    """Video-LLaVA hands the CLS token of every frame to the LLM."""
    family = "video_llava-video"
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    ((unit,),) = batch.units
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=3)) as handle, torch.no_grad():
        model(**batch)
        kept = set(handle.last.index[0].tolist()) & set(unit)
    assert {unit[0], unit[17]} < kept
    assert len(kept) == 2 * (1 + 3)


def attention_of(tower: Tower, layer: int) -> nn.Module:
    from vtprune.model_adapters.towers import attention_modules

    return attention_modules(tower.module)[layer]


def test_positions_can_be_renumbered() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    plan = Stage(("vit", 1), Brightest(), keep=0.5, positions="compact")
    with vtprune.patch(model, plan), torch.no_grad():
        tokens, ours = reference.greedy(model, batch, 3)
        given: list[Any] = []
        spy = model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: given.append((k["inputs_embeds"], k["position_ids"])), with_kwargs=True
        )
        model(**batch)
        spy.remove()
    embeds, ids = given[0]
    assert ids[0].tolist() == list(range(embeds.shape[1]))
    with torch.no_grad():
        out = model.generate(
            inputs_embeds=embeds, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert torch.equal(out.sequences[0], tokens[0])
    torch.testing.assert_close(torch.stack(out.logits, 1), ours, rtol=0, atol=1e-5)


def test_newlines_stay_or_go() -> None:
    """LLaVA-NeXT's newlines never were in the tower: they wait for the LLM, or go with the first token."""
    model, batch = families.model("llava_next"), families.inputs("llava_next", rows=(1,))
    newlines = [p for p, src in zip(batch.units[0][0], Tower(model, "llava_next").sources(batch)[0][0]) if not src]
    assert newlines
    for policy, expected in (("compete", set(newlines)), ("drop", set())):
        with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5, newlines=policy)) as handle, torch.no_grad():
            model(**batch)
            assert set(handle.last.index[0].tolist()) & set(newlines) == expected


def test_beams_share_one_tower_run() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1, 1))
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5)) as handle:
        options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
        cached = model.generate(**batch, **options)
        assert len(handle.last.tower_units) == 2
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "internvl", "mistral3"])
def test_second_turn_equals_one_shot(family: str) -> None:
    """Logits of an answer to the second turn, with the returned cache and with the whole conversation at once."""
    model, options = families.model(family), {"do_sample": False, "max_new_tokens": 3}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    first = families.turn(family, 1, seed=3, shares_row=False)
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5)):
        out = model.generate(**families.build(family, [first]), **options)
        spoken = families.Piece(out.sequences[0, sum(len(p.ids) for p in first) :].tolist())
        whole = families.build(family, [[*first, spoken, families.text(77, 6)]])
        text = {k: whole[k] for k in ("input_ids", "attention_mask")}
        turn = model.generate(**text, past_key_values=out.past_key_values, **options)
        once = model.generate(**whole, **options)
    torch.testing.assert_close(torch.stack(turn.logits), torch.stack(once.logits), rtol=0, atol=1e-5)


def test_lengths_of_tower_and_decoder() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=10)) as handle, torch.no_grad():
        model(**batch)
        last = handle.last
    assert last.tower_lengths == {"image": [26, 11, 11]}
    assert set(last.lengths) == {batch["input_ids"].shape[1] - 15}
    (unit,), (crop,) = last.units, last.tower_units
    assert unit.where == crop.where == ("vit", 1)
    assert torch.equal(unit.idx, crop.idx)
    assert last.seconds > 0


def test_what_is_left_is_copied_while_later_blocks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host asks for it right after the last choice, and waits for it when the tower has been started whole."""
    seen: list[str] = []

    class Noted(towers.HostCopy):
        def __init__(self, x: Tensor) -> None:
            seen.append("copy")
            super().__init__(x)

        def read(self) -> Tensor:
            seen.append("read")
            return super().read()

    monkeypatch.setattr(towers, "HostCopy", Noted)
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    blocks = blocks_of(tower_of(model.base_model, "image"))
    stages = [Stage(("vit", 1), Brightest(), keep=10), Stage(("vit", 0), Brightest(), keep=12)]
    with vtprune.patch(model, stages), torch.no_grad():
        handles = [b.register_forward_hook(lambda *_, k=k: seen.append(f"block {k}")) for k, b in enumerate(blocks)]
        model(**batch)
    for handle in handles:
        handle.remove()
    assert seen == ["block 0", "copy", *(f"block {k}" for k in range(1, len(blocks))), "read"]


def test_places() -> None:
    ints: list[Any] = [(0, [0]), (3, [3]), (-1, [2]), (-3, [0])]
    slices = [
        (slice(1, None), [1, 2]),
        (slice(1, 9), [1, 2, 3]),
        (slice(0, -1), [0, 1]),
        (slice(None, None, 2), [0, 2]),
    ]
    for k, expected in ints + slices:
        assert list(places(Stage(("vit", k), Brightest(), keep=0.5), 3)) == expected


def test_places_out_of_range_are_refused() -> None:
    for k in (4, -4, "all", slice(4, None), slice(2, 2)):
        with pytest.raises(ValueError, match=r"vit"):
            places(Stage(("vit", k), Brightest(), keep=0.5), 3)


REFUSED = {
    "block 2 blocks are used": (lambda: Stage(("vit", 3), Brightest(), keep=0.5), ValueError, "2 blocks are used"),
    "another tower": (lambda: Stage(("audio", 1), Brightest(), keep=0.5), ValueError, r"\('vit', k\)"),
    "per sample": (lambda: Stage(("vit", 1), Brightest(), keep=0.5, per="sample"), ValueError, "its own budget"),
    "a total": (lambda: Stage(("vit", 1), Brightest(), keep_total=9), ValueError, "its own budget"),
    "frames and images": (
        lambda: [Stage(("vit", k), Brightest(), keep=0.5, per=per) for k, per in ((1, "frame"), (2, "image"))],
        ValueError,
        "agree on per='frame'",
    ),
    "the last row": (lambda: Stage(("vit", 1), vtprune.create("fastv"), keep=0.5), UnsupportedModel, "last_row"),
    "no block before": (lambda: Stage(("vit", 0), vtprune.create("flowcut"), keep=0.5), ValueError, "reads block -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_stages_a_tower_cannot_hold_are_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    model = families.model("llava")
    with reference.untouched(model), pytest.raises(error, match=message):
        vtprune.patch(model, make())


def test_nothing_may_act_between_the_blocks_of_a_schedule() -> None:
    plan = [
        Stage(("vit", slice(1, None)), vtprune.create("flowcut"), keep=0.5),
        Stage(("vit", 2), Brightest(), keep=0.4),
    ]
    with pytest.raises(ValueError, match="out of step"):
        vtprune.patch(families.model("qwen2_vl"), plan)


def test_features_resized_after_the_tower_are_refused() -> None:
    model, batch = families.model(RESIZED), families.inputs(RESIZED, rows=(0, 0, 1), only=2)
    half = Stage(("vit", 1), Brightest(), keep=0.5)
    with vtprune.patch(model, half), pytest.raises(UnsupportedCall, match="resizes"):
        model(**batch)
    model(**batch)


def test_features_encoded_elsewhere_are_refused() -> None:
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    with torch.no_grad():
        output = model.base_model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
        text = {k: batch[k] for k in ("input_ids", "attention_mask")}
        half = Stage(("vit", 1), Brightest(), keep=0.5)
        with vtprune.patch(model, half), pytest.raises(UnsupportedCall, match="pre-encoded"):
            model(**text, mm_encoder_outputs={"image": output})


def test_gradient_checkpointing_is_refused_and_gradients_flow() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5)):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        weight = model.base_model.vision_tower.encoder.layers[1].self_attn.q_proj.weight
        assert float(weight.grad.abs().sum()) > 0
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(UnsupportedCall, match="gradient checkpointing"):
            model(**batch)


@pytest.mark.parametrize("family", ["qwen2_5_vl-video", "qwen3_vl-video"])
def test_frames_have_budgets_of_their_own(family: str) -> None:
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    ((frames, height, width),) = batch["video_grid_thw"].tolist()
    each = height * width // 4
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=2, per="frame")) as handle, torch.no_grad():
        model(**batch)
        last = handle.last
    assert [(u.n, len(u.idx), u.grid) for u in last.tower_units] == [(each, 2, (1, height // 2, width // 2))] * frames
    (unit,) = last.units
    assert [sum(f * each <= i < (f + 1) * each for i in unit.idx.tolist()) for f in range(frames)] == [2] * frames


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_masked_pixels_stay_masked(family: str) -> None:
    """Tiles padded with masked pixels: what nobody may attend to is not attended to after a cut either."""
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    batch["pixel_attention_mask"][:, :, 16:] = False
    noisy = dict(batch, pixel_values=batch["pixel_values"].clone())
    noisy["pixel_values"][:, :, :, 16:] = 7.0
    seen = []
    with (
        vtprune.patch(model, Stage(("vit", 1), First(), keep=0.6)),
        torch.no_grad(),
        Tower(model, family).watched() as out,
    ):
        for given in (batch, noisy):
            model(**given)
            seen.append(out[-1][2][:, :24])  # patch rows 0..3 of 6, which are real
    torch.testing.assert_close(*seen, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class First(Method):
    def __call__(self, v: Visual) -> Assignment:
        return Assignment(torch.arange(v.budget))


def test_a_copy_of_a_patched_model_prunes_on_its_own() -> None:
    model, batch = families.fresh("llava"), families.inputs("llava", rows=(1,))
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5)) as handle, torch.no_grad():
        there = copy.deepcopy(model)
        first = model(**batch).logits
        handle.remove()
        assert torch.equal(there(**batch).logits, first)
        assert not torch.equal(model(**batch).logits, first)


def test_threads_have_calls_of_their_own() -> None:
    model = families.model("llava")
    batches = [families.inputs("llava", rows=(1,), seed=seed) for seed in range(4)]
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5)), torch.no_grad():
        alone = [model(**batch).logits for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda batch: model(**batch).logits.detach(), batches))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-6)


def test_a_failed_call_leaves_no_state() -> None:
    """The next call, even one that does not pass our observer, starts clean."""
    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    with vtprune.patch(model, Stage(("vit", 1), Brightest(), keep=0.5)), torch.no_grad():
        with pytest.raises(RuntimeError, match="channels"):
            model(**{**batch, "pixel_values": batch["pixel_values"][:, :1]})
        dense = model.base_model.vision_tower(batch["pixel_values"]).last_hidden_state
        first = model(**batch).logits
        assert torch.equal(model(**batch).logits, first)
    assert torch.equal(model.base_model.vision_tower(batch["pixel_values"]).last_hidden_state, dense)


def test_a_wrong_answer_is_refused() -> None:
    @dataclass(frozen=True)
    class Greedy(Method):
        def __call__(self, v: Visual) -> Assignment:
            return Assignment(torch.arange(v.budget - 1))

    model, batch = families.model("llava"), families.inputs("llava", rows=(1,))
    for where in (("vit", 1), ("vit", slice(1, None))):
        with (
            vtprune.patch(model, Stage(where, Greedy(), keep=0.5)),
            pytest.raises(vtprune.types.VtpruneError, match="budget"),
        ):
            model(**batch)


# -- signals ----------------------------------------------------------------------------------------------------------


def product(tokens: int = 7, heads: int = 3, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, tokens, width, generator=generator) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("kind", ["cls_value", "mean_query", "value_norm"])
def test_new_signals_by_their_definition(kind: str, pads: int) -> None:
    """Plain loops in float64 over the tokens that are no padding."""
    q, k, v = product()
    mask = None
    if pads:
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        mask[1, ..., -pads:] = False
    ours = read(kind, q, k, v, mask, 0.4)
    for b in range(2):
        n = 7 - pads * b
        rows = []
        for h in range(3):
            qs, ks, vs = (t[b, h, :n].double() for t in (q, k, v))
            if kind == "cls_value":
                rows.append(torch.stack([vs[0] @ vs[j] for j in range(n)]).softmax(0)[1:])
            elif kind == "mean_query":
                rows.append(torch.stack([0.4 * qs.mean(0) @ ks[j] for j in range(n)]).softmax(0))
        theirs = torch.stack(rows).mean(0) if rows else v[b, :, :n].double().mean(0).abs().sum(-1)
        torch.testing.assert_close(ours[b, : len(theirs)].double(), theirs, rtol=1e-5, atol=1e-6)
