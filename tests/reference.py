"""An oracle for pruned runs that uses none of vtprune's hooks.

`dense` runs the unpatched model once over the conversation and records what every decoder layer receives.
`pruned_logits` then walks the stock layers by hand, without cache or padding, on the tokens that stay: same
position embeddings, explicit causal mask, merged features where the method merges. Attention is causal, so
one pass gives the logits of the prompt's last token and of every generated token.

What stays is the method's own answer, taken by `spy` at the border between seam and method.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import families
import torch
from torch import Tensor

from vtprune import Assignment, Method, Stage, Visual
from vtprune import cache as kv


@dataclass
class Call:
    """One call of a method by the seam: which stage, what it saw, what it answered."""

    stage: Stage
    units: list[Visual]
    answers: list[Assignment]


def spy(stages: Sequence[Stage]) -> tuple[list[Stage], list[Call]]:
    """The same stages with methods that also write every call into the returned list."""
    log: list[Call] = []
    return [_watched(stage, log) for stage in stages], log


def _watched(stage: Stage, log: list[Call]) -> Stage:
    class Watched(type(stage.method)):  # type: ignore[misc]
        def batch(self, units: Sequence[Visual]) -> list[Assignment]:
            answers = super().batch(units)
            log.append(Call(stage, list(units), answers))
            return answers

    method: Method = copy.copy(stage.method)
    object.__setattr__(method, "__class__", Watched)
    return dataclasses.replace(stage, method=method)


@dataclass
class Dense:
    """What the unpatched model hands to its decoder layers, for one row without padding."""

    hidden: Tensor  # [L, D], entering layer 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    deepstack: list[Tensor] = field(default_factory=list)  # [L, D], added after layer i; zero at text tokens


def decoder(model: Any) -> Any:
    """The text model of a stock VLM."""
    return model.get_decoder()


@torch.no_grad()
def dense(model: Any, batch: dict[str, Any], answer: Sequence[int] = ()) -> Dense:
    """Run the unpatched model over one row (B=1) plus `answer` and record every layer's inputs."""
    assert batch["input_ids"].shape[0] == 1, "one row at a time"
    record = Dense(torch.empty(0))
    text = decoder(model)
    handles = [text.register_forward_pre_hook(lambda m, a, k: _see_text(record, k), with_kwargs=True)]
    for i, layer in enumerate(text.layers):
        handles.append(
            layer.register_forward_pre_hook(lambda m, a, k, i=i: _see_layer(record, i, a, k), with_kwargs=True)
        )
    try:
        model(**extended(batch, answer, model.config.model_type == "paligemma"), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return record


def extended(batch: dict[str, Any], answer: Sequence[int], ends_prefix: bool = False) -> dict[str, Any]:
    """The same row with generated tokens behind it; `ends_prefix`: their token type is 1 (PaliGemma)."""
    out = dict(batch)
    if not len(answer):
        return out
    ids = torch.tensor([list(answer)])
    out["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    if "mm_token_type_ids" in batch:
        out["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    if "token_type_ids" in batch:
        grown = torch.full_like(ids, int(ends_prefix))
        out["token_type_ids"] = torch.cat([batch["token_type_ids"], grown], 1)
    return out


def _see_text(record: Dense, kwargs: dict[str, Any]) -> None:
    embeds, mask = kwargs["inputs_embeds"], kwargs.get("visual_pos_masks")
    for feature in kwargs.get("deepstack_visual_embeds") or ():
        assert mask is not None
        full = torch.zeros_like(embeds[0])
        full[mask[0]] = feature
        record.deepstack.append(full)


def _see_layer(record: Dense, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    if i == 0:
        record.hidden = hidden[0].clone()
    record.layers.append({k: v for k, v in kwargs.items() if k != "hidden_states"})


@torch.no_grad()
def pruned_logits(model: Any, full: Dense, cuts: dict[Any, list[Cut]], compact: Collection[Any] = ()) -> Tensor:
    """Logits [n, V] of the tokens that reach the last layer, in order.

    cuts: {"llm" or layer index: the units cut there}. compact: those behind which positions are renumbered.
    """
    text = decoder(model)
    streams = [full.hidden, *full.deepstack]
    alive = torch.arange(full.hidden.shape[0])
    slots = alive
    for i, layer in enumerate(text.layers):
        for where in ("llm", i) if i == 0 else (i,):
            if where in cuts:
                before = alive
                streams, alive = _apply(streams, alive, cuts[where])
                slots = torch.arange(len(alive)) if where in compact else slots[torch.isin(before, alive)]
        kwargs = _layer_kwargs(full.layers[i], alive, slots, full.hidden)
        if getattr(layer.self_attn if hasattr(layer, "self_attn") else None, "is_sliding", False):
            kwargs["attention_mask"] = _window(kwargs["attention_mask"], full, alive, model)
        if hasattr(layer, "linear_attn"):
            hidden = full.layers[i].get("attention_mask")  # [1, L] or None: it knows padding only
            kwargs["attention_mask"] = None if hidden is None else hidden.index_select(1, alive)
        out = layer(streams[0][None], **kwargs)
        streams[0] = (out[0] if isinstance(out, tuple) else out)[0]
        if i + 1 < len(streams):
            streams[0] = streams[0] + streams[i + 1]
    return model.get_output_embeddings()(text.norm(streams[0]))


@torch.no_grad()
def masked_logits(model: Any, batch: dict[str, Any], cuts: dict[Any, list[Cut]], answer: Sequence[int] = ()) -> Tensor:
    """Logits [L, V] of the unpatched model on one row plus `answer`: nothing is dropped, but no key that a stage cut is
    visible from its layer on. Equals pruning only where kept tokens are not merged and keep their positions."""
    handles = []
    for i, layer in enumerate(decoder(model).layers):
        gone = [c for k, found in cuts.items() if k == "llm" or k <= i for c in found]
        dropped = torch.tensor([p for c in gone for p in c.positions.tolist() if p not in c.positions[c.answer.idx]])

        def hide(module: Any, args: Any, kwargs: dict[str, Any], dropped: Tensor = dropped) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            mask = _mask(kwargs.get("attention_mask"), torch.arange(hidden.shape[1]))
            mask = mask.clamp(min=torch.finfo(mask.dtype).min)  # a dropped query may have nothing left to see
            return args, {**kwargs, "attention_mask": mask.index_fill(-1, dropped.long(), torch.finfo(mask.dtype).min)}

        handles.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        whole = extended(batch, answer, model.config.model_type == "paligemma")
        return model(**whole, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Cut:
    """A unit's tokens (original positions, ascending) and the method's answer about them."""

    positions: Tensor
    answer: Assignment


def _apply(streams: list[Tensor], alive: Tensor, cuts: Sequence[Cut]) -> tuple[list[Tensor], Tensor]:
    stays = torch.ones(len(alive), dtype=torch.bool)
    out = [s.clone() for s in streams]
    for cut in cuts:
        rows = torch.searchsorted(alive, cut.positions)
        assert torch.equal(alive[rows], cut.positions), "a token was pruned twice"
        stays[rows] = False
        stays[rows[cut.answer.idx]] = True
        for new, old in zip(out, streams, strict=True):
            new[rows[cut.answer.idx]] = cut.answer.apply(old[rows])
    return [s[stays] for s in out], alive[stays]


def _layer_kwargs(kwargs: dict[str, Any], alive: Tensor, slots: Tensor, like: Tensor) -> dict[str, Any]:
    length = like.shape[0]
    out = dict(kwargs, use_cache=False, **{kv.NAME: None})
    out["attention_mask"] = _mask(kwargs.get("attention_mask"), alive)
    out["position_embeddings"] = tuple(t.index_select(-2, slots) for t in kwargs["position_embeddings"])
    ids = kwargs.get("position_ids")
    if ids is not None and ids.shape[-1] == length:
        out["position_ids"] = ids.index_select(-1, slots)
    return out


def _mask(mask: Tensor | None, alive: Tensor) -> Tensor:
    """Additive [1, 1, n, n]: what the model built, cut; or plain causal where it built none."""
    if mask is not None and mask.dim() == 4:
        cut = mask.index_select(-2, alive).index_select(-1, alive)
        return torch.zeros(cut.shape).masked_fill(~cut, -torch.inf) if cut.dtype == torch.bool else cut
    n = len(alive)
    return torch.full((1, 1, n, n), -torch.inf).triu(1)


def _window(mask: Tensor, full: Dense, alive: Tensor, model: Any) -> Tensor:
    """A stock text model counts its sliding window in the tokens it gets, so dropped ones do not use it up."""
    config = model.config.get_text_config()
    whole = next(k for k, kind in zip(full.layers, config.layer_types, strict=True) if kind == "full_attention")
    open_ = _mask(whole.get("attention_mask"), alive) == 0
    near = torch.ones(len(alive), len(alive)).triu(1 - config.sliding_window) == 1
    return mask.masked_fill(open_ & near.tril(), 0)


def cuts_of_row(log: Sequence[Call], rows: Sequence[int], units: Sequence[Sequence[Sequence[int]]]):
    """Split the method's calls over the rows of a batch.

    units: [row][unit] -> original positions, as `families.build` gives them. Answers come in reading order; a
    stage inside the LLM sees what the stage before it left. Returns per row {where: [Cut]}.
    """
    alive = [[torch.tensor(u) for u in units[r]] for r in rows]
    out: list[dict[Any, list[Cut]]] = [{} for _ in rows]
    for call in log:
        answers = zip(call.units, call.answers, strict=True)
        for r, row in enumerate(alive):
            sizes = [len(u) for u in units[rows[r]]]
            groups = [list(range(len(row)))] if call.stage.per == "sample" and row else [[i] for i in range(len(row))]
            budgets = call.stage.budgets([sum(sizes[i] for i in group) for group in groups])
            for group, budget in zip(groups, budgets, strict=True):
                tokens = torch.cat([row[i] for i in group])
                if not len(tokens) or (budget is not None and budget >= len(tokens)):
                    continue  # nothing to drop: the method is not asked
                seen, answer = next(answers)
                assert seen.n == len(tokens), "the method saw another unit than the prompt has"
                out[r].setdefault(call.stage.where, []).append(Cut(tokens, answer))
                for i in group:
                    row[i] = row[i][torch.isin(row[i], tokens[answer.idx])]
        assert next(answers, None) is None, "the method saw more units than the prompt has"
    return out


def survivors(cuts: dict[Any, list[Cut]], length: int) -> list[int]:
    """Original positions that reach the last layer of a row of `length` tokens."""
    gone: set[int] = set()
    for units in cuts.values():
        for cut in units:
            stays = set(cut.positions[cut.answer.idx].tolist())
            gone |= set(cut.positions.tolist()) - stays
    return [p for p in range(length) if p not in gone]


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Assert that hooks and instance attributes of every module are afterwards what they were before."""
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


def fingerprint(model: Any) -> dict[str, Any]:
    """Hook counts, instance attribute names and config identity of every module."""
    kinds = (
        "forward_hooks",
        "forward_pre_hooks",
        "forward_hooks_with_kwargs",
        "forward_pre_hooks_with_kwargs",
    )
    rarer = ("forward_hooks_always_called", "backward_hooks", "backward_pre_hooks")
    out = {}
    for name, module in model.named_modules():
        counts = tuple(len(getattr(module, f"_{kind}")) for kind in (*kinds, *rarer))
        out[name] = (counts, sorted(vars(module)), id(getattr(module, "config", None)))
    return out


@torch.no_grad()
def greedy(model: Any, batch: dict[str, Any], steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens [B, steps] and raw logits [B, steps, V] of stock greedy `generate`."""
    out = model.generate(
        **batch,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def expected(model: Any, name: str, rows: Sequence[int], row: int, cuts: Any, tokens: Tensor, **options: Any) -> Tensor:
    """The oracle's logits [steps, V] for one row that generated `tokens`."""
    single = families.inputs(name, rows=rows, only=row)
    full = dense(model, single, tokens[:-1].tolist())
    logits = pruned_logits(model, full, cuts, **options)
    return logits[-len(tokens) :]


def cuts_of_chat(log: Sequence[Call], turns: Sequence[Sequence[Sequence[int]]]) -> dict[Any, list[Cut]]:
    """Cuts of one row over several turns. turns: [turn][unit] -> positions; each has a round of calls of its own."""
    out: dict[Any, list[Cut]] = {}
    rounds: dict[Any, list[Call]] = {}
    for call in log:
        rounds.setdefault(call.stage.where, []).append(call)
    for units in turns:
        left = [len(unit) for unit in units]
        calls = []
        for waiting in rounds.values():
            budgets = [waiting[0].stage.budgets([len(unit)])[0] if waiting else None for unit in units]
            if waiting and any(b is None or b < n for b, n in zip(budgets, left, strict=True)):  # else it is not asked
                calls.append(waiting.pop(0))
                left = [n if b is None else min(b, n) for b, n in zip(budgets, left, strict=True)]
        for where, cuts in cuts_of_row(calls, [0], [units])[0].items():
            out.setdefault(where, []).extend(cuts)
    return out


def renumbers(log: Sequence[Call]) -> set[Any]:
    """Where stages that ran give the kept tokens new, gapless positions."""
    return {call.stage.where for call in log if call.stage.positions == "compact"}


def positions(model: Any, batch: dict[str, Any]) -> Tensor | None:
    """Multi-axis positions [3, 1, L] of a whole conversation; None where the model counts 0, 1, 2, ..."""
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return None
    wanted = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    return rope_index(batch["input_ids"], **{k: batch[k] for k in wanted if k in batch})[0]
