"""Stages that act at decode, against a walk of the stock layers that keeps every state and asks no cache.

The walk holds, for every layer, the hidden states that entered it. At each step it chooses by its own float64 rule,
runs the newest token and those that came back on everything they may see, and never touches vtprune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor

import vtprune
from vtprune import Stage
from vtprune import cache as kv
from vtprune.types import check_answers

ROWS = (2, 0, 1)
STEPS = 6
TOLERANCE = 2e-5
LAYERED = [name for name in families.NAMES if name not in ("qwen3_5", "gemma3", "gemma3-window")]
COMING_BACK = [name for name in LAYERED if name != "paligemma"]
METHODS = {
    "dycoke_kv": vtprune.create("dycoke_kv", layer=2),
    "lazyllm": vtprune.create("lazyllm", layers=(2, 3)),
}
CASES = [(f, m) for f in LAYERED for m in METHODS if m != "lazyllm" or f in COMING_BACK]

every_case = pytest.mark.parametrize(("family", "method"), CASES)
every_method = pytest.mark.parametrize("method", METHODS)


def stages_of(method: str, keep: float | int = 0.3) -> list[Stage]:
    return METHODS[method].stages(keep, 4)


Rule = Callable[[Tensor, int, dict[str, Any]], list[int]]  # scores of the options, budget, what it remembers


def dycoke_rule(threshold: float = 0.9) -> Rule:
    def choose(row: Tensor, budget: int, state: dict[str, Any]) -> list[int]:
        before = state.get("row")
        state["row"] = row
        likeness = -2.0 if before is None else float(row @ before / (row.norm() * before.norm()))
        if likeness < threshold:
            state["kept"] = top(row, budget)
        return state["kept"]

    return choose


def lazy_rule() -> Rule:
    return lambda row, budget, state: top(row, budget)


def top(row: Tensor, budget: int) -> list[int]:
    ranked = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    return sorted(ranked[:budget])


RULES = {"dycoke_kv": dycoke_rule, "lazyllm": lazy_rule}


@dataclass
class Walk:
    """One row without padding. visual: positions of the visual tokens of the prompt of `length` tokens.

    gone: those that never reach the LLM.
    """

    model: Any
    full: reference.Dense
    visual: list[int]
    length: int
    stages: Sequence[Stage]
    choose: Rule
    gone: frozenset[int] = frozenset()
    entered: list[dict[int, Tensor]] = field(default_factory=list)
    ran: list[set[int]] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    chosen: dict[int, list[int]] = field(default_factory=dict)
    returned: int = 0

    def __post_init__(self) -> None:
        depth = len(self.full.layers)
        self.entered, self.ran = [{} for _ in range(depth + 1)], [set() for _ in range(depth)]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[steps, V] of the prompt's last token and of every later one."""
        out = [self.step([p for p in range(self.length) if p not in self.gone], "prefill")]
        out += [self.step([p], "decode") for p in range(self.length, len(self.full.hidden))]
        text = reference.decoder(self.model)
        return self.model.get_output_embeddings()(text.norm(torch.stack(out)))

    def step(self, running: list[int], phase: str, among: Sequence[int] | None = None) -> Tensor:
        """The newest token's last state. among: the visual tokens that stages choose from; None: all of them."""
        newest, row = running[-1], torch.empty(0)
        visual = self.visual if among is None else among
        seen = set(range(newest + 1)) - self.gone
        options = [p for p in visual if p not in self.gone]
        self.entered[0] |= {p: self.full.hidden[p] for p in running}
        for i in range(len(self.full.layers)):
            for stage in self.stages:
                if stage.where != i or phase not in stage.method.phases or not visual:
                    continue
                budget = stage.budgets([len(visual)])[0]
                if budget < len(options):
                    scores = torch.stack([row[p] for p in options]).double()
                    picked = self.choose(scores, budget, self.states.setdefault(i, {}))
                    options = [options[j] for j in picked]
                self.chosen[i] = options
                seen = (seen - set(visual)) | set(options)
                if phase == "prefill":
                    running = [p for p in running if p in seen]
                else:
                    back = [p for p in options if p not in self.ran[i]]
                    self.returned += len(back)
                    running = [*back, newest]
            row = self.layer(i, running, sorted((self.ran[i] & seen) | set(running)))
        return self.entered[-1][newest]

    def layer(self, i: int, running: list[int], keys: list[int]) -> Tensor:
        """Run layer i for the tokens `running`; returns the newest token's attention [positions], mean over heads."""
        layer, alive = reference.decoder(self.model).layers[i], torch.tensor(keys)
        rows: list[Tensor] = []
        attention = layer.self_attn
        handle = attention.register_forward_hook(lambda m, a, out: rows.append(out[1]))
        try:
            kwargs = reference._layer_kwargs(self.full.layers[i], alive, alive, self.full.hidden)
            out = layer(torch.stack([self.entered[i][p] for p in keys])[None], **kwargs)
        finally:
            handle.remove()
        hidden = (out[0] if isinstance(out, tuple) else out)[0]
        if i < len(self.full.deepstack):
            hidden = hidden + self.full.deepstack[i][alive]
        self.entered[i + 1] |= {p: hidden[keys.index(p)] for p in running}
        self.ran[i] |= set(running)
        weights = torch.zeros(len(self.full.hidden))
        weights[alive] = rows[0][0, :, -1].mean(0)
        return weights


def walk_of(family: str, row: int, tokens: Tensor, method: str, stages: Sequence[Stage]) -> Walk:
    """The walk of one row of the batch that generated `tokens`."""
    model, single = families.model(family, "eager"), families.inputs(family, rows=ROWS, only=row)
    full = reference.dense(model, single, tokens[:-1].tolist())
    visual = sorted(p for unit in single.units[0] for p in unit)
    return Walk(model, full, visual, single["input_ids"].shape[1], stages, RULES[method]())


@contextmanager
def patched(family: str, method: str, attention: str = "sdpa", keep: float | int = 0.3):
    model = families.model(family, attention)
    with vtprune.patch(model, stages_of(method, keep)) as handle:
        yield model, handle


@every_case
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_step_equals_the_walk(family: str, method: str, attention: str) -> None:
    batch = families.inputs(family, rows=ROWS)
    with patched(family, method, attention) as (model, handle):
        tokens, ours = reference.greedy(model, batch, STEPS)
        recalled = handle.last.recalled
    assert not torch.equal(ours, reference.greedy(families.model(family, attention), batch, STEPS)[1])
    for row in range(len(ROWS)):
        walk = walk_of(family, row, tokens[row], method, stages_of(method))
        torch.testing.assert_close(ours[row], walk.logits(), rtol=0, atol=TOLERANCE)
        pads = int((batch["attention_mask"][row] == 0).sum())
        for layer, rows in recalled.items():
            assert [p - pads for p in rows[row].tolist()] == walk.chosen.get(layer, [])


def test_tokens_do_come_back() -> None:
    """Else the walk above would prove nothing about revival."""
    back = 0
    for family in ("llava", "qwen2_5_vl-video"):
        batch = families.inputs(family, rows=ROWS)
        with patched(family, "lazyllm") as (model, _):
            tokens, _ = reference.greedy(model, batch, STEPS)
        for row in range(len(ROWS)):
            walk = walk_of(family, row, tokens[row], "lazyllm", stages_of("lazyllm"))
            walk.logits()
            back += walk.returned
    assert back > 10


@every_case
def test_keep_all_changes_no_bit(family: str, method: str) -> None:
    batch = families.inputs(family, rows=ROWS)
    before = reference.greedy(families.model(family), batch, STEPS)
    with patched(family, method, keep=1.0) as (model, _):
        after = reference.greedy(model, batch, STEPS)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@every_case
def test_removal_leaves_no_trace(family: str, method: str) -> None:
    model, batch = families.model(family), families.inputs(family, rows=(1, 2))
    before = reference.greedy(model, batch, 3)[1]
    with reference.untouched(model), patched(family, method):
        assert not torch.equal(reference.greedy(model, batch, 3)[1], before)
    assert torch.equal(reference.greedy(model, batch, 3)[1], before)


@every_method
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl-video", "mistral3"])
def test_a_batch_equals_its_rows(family: str, method: str) -> None:
    with patched(family, method) as (model, _):
        tokens, together = reference.greedy(model, families.inputs(family, rows=ROWS), STEPS)
        for row in range(len(ROWS)):
            one = reference.greedy(model, families.inputs(family, rows=ROWS, only=row), STEPS)
            assert torch.equal(one[0][0], tokens[row])
            torch.testing.assert_close(one[1][0], together[row], rtol=0, atol=TOLERANCE)


@every_method
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_beams_equal_a_search_without_a_cache_trick(family: str, method: str) -> None:
    """Every hypothesis of a beam search, replayed greedily by the walk, has the log-probability the search gave it."""
    batch = families.inputs(family, rows=ROWS)
    options = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "length_penalty": 0.0}
    with patched(family, method) as (model, _):
        out = model.generate(
            **batch, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, early_stopping=True, **options
        )
    tokens = out.sequences[:, batch["input_ids"].shape[1] :]
    for i, hypothesis in enumerate(tokens):
        steps = walk_of(family, i // 3, hypothesis, method, stages_of(method)).logits().log_softmax(-1)
        score = steps.gather(1, hypothesis[:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[i], score, rtol=0, atol=1e-4)


def _feed(model: Any, cache: Any, ids: Tensor, length: int) -> Any:
    mask = torch.ones(len(ids), length + ids.shape[1], dtype=torch.long)
    return model(input_ids=ids, attention_mask=mask, use_cache=True, **{kv.NAME: cache})


@every_method
@torch.no_grad()
def test_a_second_turn_sees_everything_that_is_stored(method: str) -> None:
    """Steps, then several tokens at once: as if the steps had seen everything the layers hold, and chosen anew."""
    family = "llava"
    batch = families.inputs(family, rows=(1,))
    length = batch["input_ids"].shape[1]
    words = torch.tensor([families.text(5, 4).ids])
    with patched(family, method) as (model, _):
        first = model(**batch, use_cache=True)
        cache = first[kv.NAME]
        one = first.logits[:, -1:].argmax(-1)
        _feed(model, cache, one, length)
        stored = [kv.stored(layer) for layer in cache.layers]
        turn = _feed(model, cache, words, length + 1)
        assert [kv.stored(layer) - words.shape[1] for layer in cache.layers] >= stored
        again = _feed(model, cache, turn.logits[:, -1:].argmax(-1), length + 1 + words.shape[1])
        assert again.logits.isfinite().all()
    full = reference.dense(
        families.model(family, "eager"), families.inputs(family, rows=(1,)), [*one[0].tolist(), *words[0].tolist()]
    )
    walk = Walk(model=families.model(family, "eager"), full=full, visual=batch.units[0][0], length=length,
                stages=stages_of(method), choose=RULES[method]())  # fmt: skip
    walk.step(list(range(length)), "prefill")
    walk.step([length], "decode")
    running = list(range(length + 1, len(full.hidden)))
    walk.entered[0] |= {p: full.hidden[p] for p in running}
    for i in range(len(full.layers)):
        walk.layer(i, running, sorted(walk.ran[i] | set(running)))
    text = reference.decoder(walk.model)
    theirs = walk.model.get_output_embeddings()(text.norm(torch.stack([walk.entered[-1][p] for p in running])))
    torch.testing.assert_close(turn.logits[0], theirs, rtol=0, atol=TOLERANCE)


@dataclass
class Chat:
    """An image, two words, a second image, three words, as one row: what is fed together, and where it ends."""

    family: str
    turns: list[list[families.Piece]]
    whole: families.Inputs

    @classmethod
    def of(cls, family: str) -> Chat:
        first = families.turn(family, 1, seed=3, shares_row=False)
        second = families.turn(family, 1, seed=4, first=False, shares_row=False)
        words = [[families.Piece([i])] for i in families.text(91, 2).ids]
        more = [[families.Piece([i])] for i in families.text(92, 3).ids]
        turns = [first, *words, second, *more]
        return cls(family, turns, families.build(family, [[piece for turn in turns for piece in turn]]))

    @property
    def ends(self) -> list[int]:
        return torch.tensor([sum(len(p.ids) for p in turn) for turn in self.turns]).cumsum(0).tolist()

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """[calls, V] of the last token of every call, all on one cache."""
        cache, out, start, positions = None, [], 0, reference.positions(model, self.whole)
        for turn, end in zip(self.turns, self.ends, strict=True):
            new = families.build(self.family, [turn])
            call = {k: v for k, v in new.items() if k not in ("input_ids", "attention_mask")} if len(turn) > 1 else {}
            if positions is not None and start:
                call["position_ids"] = positions[..., start:end]
            ids, mask = new["input_ids"], torch.ones(1, end, dtype=torch.long)
            done = model(input_ids=ids, attention_mask=mask, use_cache=True, **{kv.NAME: cache}, **call)
            cache, start = done[kv.NAME], end
            out.append(done.logits[0, -1])
        return torch.stack(out)

    @torch.no_grad()
    def walked(self, method: str, full: reference.Dense) -> tuple[Tensor, Walk, int]:
        """The same by the walk: a second prefill sees all that is stored and chooses among its own image, and later
        steps among both. The last: how many tokens of the first image came back behind the second."""
        model, ends = families.model(self.family, "eager"), self.ends
        visual = sorted(p for unit in self.whole.units[0] for p in unit)
        before = [p for p in visual if p < ends[0]]
        walk = Walk(model, full, before, ends[0], stages_of(method), RULES[method]())
        out, start = [], 0
        for i, end in enumerate(ends):
            running = list(range(start, end))
            if i == 3:
                walk.states.clear()
                walk.visual = visual
                held = [ran & set(before) for ran in walk.ran]
                out.append(walk.step(running, "prefill", [p for p in visual if p >= start]))
            else:
                out.append(walk.step(running, "decode" if i else "prefill"))
            start = end
        late = sum(len((ran & set(before)) - old) for ran, old in zip(walk.ran, held, strict=True))
        return model.get_output_embeddings()(reference.decoder(model).norm(torch.stack(out))), walk, late


@pytest.mark.parametrize(("family", "method"), [case for case in CASES if case[0] != "paligemma"])
def test_a_second_image_behind_a_cache_equals_the_walk(family: str, method: str) -> None:
    """PaliGemma alone has no second turn: it would read the first one in both directions anew."""
    chat = Chat.of(family)
    full = reference.dense(families.model(family, "eager"), chat.whole)
    last = torch.tensor(chat.ends) - 1
    stock = chat.logits(families.model(family))
    own = float((stock - reference.pruned_logits(families.model(family), full, {})[last]).abs().max())
    assert own < 10 * TOLERANCE, "the stock model itself does not reproduce one shot"
    with patched(family, method) as (model, handle):
        ours = chat.logits(model)
        recalled = handle.last.recalled
    theirs, walk, _ = chat.walked(method, full)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=max(TOLERANCE, 2 * own))
    assert float((ours[-1] - stock[-1]).abs().max()) > 10 * TOLERANCE
    assert {layer: rows[0].tolist() for layer, rows in recalled.items()} == walk.chosen


def test_tokens_of_the_first_image_come_back_behind_the_second() -> None:
    """Else the walk above would prove nothing about hidden states that were put by in an earlier turn."""
    chats = [Chat.of(family) for family in ("llava", "qwen2_5_vl-video")]
    fulls = [reference.dense(families.model(chat.family, "eager"), chat.whole) for chat in chats]
    assert sum(chat.walked("lazyllm", full)[2] for chat, full in zip(chats, fulls, strict=True)) > 0


@torch.no_grad()
def test_a_static_cache_hides_what_was_not_chosen() -> None:
    batch = families.inputs("llava", rows=ROWS)
    with patched("llava", "dycoke_kv") as (model, _):
        tokens, ours = reference.greedy(model, batch, STEPS)
        static = reference.greedy(model, batch, STEPS, cache_implementation="static")
    assert torch.equal(static[0], tokens)
    torch.testing.assert_close(static[1], ours, rtol=0, atol=TOLERANCE)


def test_a_static_cache_cannot_take_tokens_back() -> None:
    with (
        patched("llava", "lazyllm") as (model, _),
        pytest.raises(vtprune.UnsupportedCall, match="a static cache has no room"),
    ):
        reference.greedy(model, families.inputs("llava"), STEPS, cache_implementation="static")


@every_method
@torch.no_grad()
def test_an_unpatched_model_refuses_a_cache_that_shows_a_choice(method: str) -> None:
    batch = families.inputs("llava", rows=(1,))
    length = batch["input_ids"].shape[1]
    with patched("llava", method) as (model, _):
        cache = model(**batch, use_cache=True)[kv.NAME]
        _feed(model, cache, torch.tensor([[30]]), length)
    with pytest.raises(vtprune.UnsupportedCall, match="continue with the patched model"):
        _feed(model, cache, torch.tensor([[31]]), length + 1)


@torch.no_grad()
def test_state_lives_on_the_cache() -> None:
    """Two conversations in turns on one model are those one after the other."""
    prompts = [families.inputs("llava", rows=(1,), seed=s) for s in (0, 3)]
    with patched("llava", "dycoke_kv") as (model, _):
        alone = [_steps(model, [p])[0] for p in prompts]
        together = _steps(model, prompts)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def _steps(model: Any, prompts: list[Any]) -> list[Tensor]:
    outs = [model(**p, use_cache=True) for p in prompts]
    lines = [[out.logits[0, -1]] for out in outs]
    for step in range(3):
        for i, p in enumerate(prompts):
            ids = lines[i][-1].argmax()[None, None]
            outs[i] = _feed(model, outs[i][kv.NAME], ids, p["input_ids"].shape[1] + step)
            lines[i].append(outs[i].logits[0, -1])
    return [torch.stack(line) for line in lines]


def test_where_such_stages_may_stand() -> None:
    model = families.model("llava")
    dycoke, lazy = METHODS["dycoke_kv"], METHODS["lazyllm"]
    fastv = vtprune.create("fastv", layer=3)
    with pytest.raises(ValueError, match="decoder layer >= 1"):
        vtprune.patch(model, [Stage("llm", dycoke, keep=0.5)])
    with pytest.raises(ValueError, match="one of these methods"):
        vtprune.patch(model, [Stage(2, dycoke, keep=0.5), Stage(3, lazy, keep=0.5)])
    with pytest.raises(ValueError, match="drops tokens behind dycoke_kv"):
        vtprune.patch(model, [Stage(2, dycoke, keep=0.5), Stage(3, fastv, keep=0.5)])
    with pytest.raises(ValueError, match="positions='compact' is undefined"):
        vtprune.patch(model, [Stage(2, lazy, keep=0.5, positions="compact")])
    with pytest.raises(ValueError, match="layer=0"):
        vtprune.create("dycoke_kv", layer=0)
    with pytest.raises(ValueError, match="threshold=2"):
        vtprune.create("dycoke_kv", threshold=2.0)
    with pytest.raises(ValueError, match="similar='none'"):
        vtprune.create("dycoke_kv", similar="none")
    with pytest.raises(ValueError, match="layers >= 1"):
        vtprune.create("lazyllm", layers=(0, 2))
    with pytest.raises(vtprune.UnsupportedModel, match="both directions"):
        vtprune.patch(families.model("paligemma"), [Stage(2, lazy, keep=0.5)])


@every_method
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_behind_a_stage_before_the_llm(family: str, method: str) -> None:
    """What never reached the LLM cannot be seen, but shares are of all there were."""
    model, batch = families.model(family), families.inputs(family, rows=(1,))
    with vtprune.patch(model, [Stage("llm", vtprune.create("uniform"), keep=0.6), *stages_of(method)]) as handle:
        tokens, ours = reference.greedy(model, batch, STEPS)
        visual, unit = batch.units[0][0], handle.last.units[0]
        gone = frozenset(visual) - {visual[i] for i in unit.idx.tolist()}
    assert gone
    full = reference.dense(families.model(family, "eager"), batch, tokens[0, :-1].tolist())
    walk = Walk(
        families.model(family, "eager"), full, visual, batch["input_ids"].shape[1], stages_of(method), RULES[method](),
        gone,
    )  # fmt: skip
    torch.testing.assert_close(ours[0], walk.logits(), rtol=0, atol=TOLERANCE)


def test_similar_steps_reuse_the_choice_or_see_everything() -> None:
    g = torch.Generator().manual_seed(0)
    row = torch.rand(20, generator=g)
    signal = METHODS["dycoke_kv"].needs[0]
    for similar, second in (("reuse", 5), ("all", 20)):
        method, state, sizes = vtprune.create("dycoke_kv", layer=2, similar=similar), {}, []
        for seen in (row, row * 1.001, torch.rand(20, generator=g).pow(8)):
            view = vtprune.Visual(seen.new_zeros(20, 0), 5, signals={signal: seen}, state=state)
            answer = method(view)
            check_answers(Stage(2, method, keep=5), [view], [answer])
            sizes.append(len(answer.idx))
        assert sizes == [5, second, 5]
