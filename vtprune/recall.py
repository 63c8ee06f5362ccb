"""Decode-time stages: at every step a method chooses anew which visual tokens the layers behind it see.

What was stored stays stored: a layer of the cache shows a selection (its keys and values), the whole stands aside, so a
token may come back at the next step. One that the prefill dropped has no keys behind that stage: its hidden state was
put by, and when it is chosen it runs through those layers beside the new token, once for all.

State lives on the cache: a `Recall` on the layer where a stage stands, for the layers up to the next such stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import cache as kv
from .compact import Compaction, mask_of
from .kernels import Verdict, deferring, full_precision
from .tap import read
from .types import Signal, Stage, UnsupportedCall, Visual, ask

ROW = Signal("last_row", -1)
Rope = tuple[Tensor, ...]


@dataclass
class Recall:
    """What a stage knows of the prompt at decode. Visual tokens are numbered in every row, from 0, pads at the end.

    where: [B, V] int64 position of each as fed, -1: no token. order: [B, P] the same of all that its layers store.
    slots: [B, V] int64 place in that store, -1: not there; entry: the same in the layer before the first such stage,
    which stores them all. counts, totals: visual tokens of each row, as they came to
    the first such stage and as fed. hidden: [B, V, D] states entering the layer and rope: rotary embeddings
    [.., B, V, d], where tokens may come back.
    memory: the method's state, row by row. chosen: numbers chosen in each row at the last step, None before the first.
    picks: the answers that led to them. shown: the cut of the store that the layers show. columns: [B, V] place in it.
    real: [B, P] bool, what of the store is no padding. came: at which length each of its P tokens came back, or ().
    steps: between which lengths the method was asked at every step and remembered something.
    """

    where: Tensor
    order: Tensor
    slots: Tensor
    counts: list[int]
    totals: list[int]
    entry: Tensor
    hidden: Tensor | None = None
    rope: Rope | None = None
    memory: list[dict[str, Any]] = field(default_factory=list)
    chosen: list[Tensor] | None = None
    picks: list[Tensor] = field(default_factory=list)
    shown: Compaction | None = None
    columns: Tensor | None = None
    real: Tensor | None = None
    came: tuple[int, ...] = ()
    steps: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = self.memory or [{} for _ in self.counts]

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or pick rows, as the cache does; what is shown will be chosen again, from the same memory."""
        picked = rows(torch.arange(len(self.counts), device=self.where.device)).tolist()
        self.where, self.order = rows(self.where), rows(self.order)
        self.slots, self.entry = rows(self.slots), rows(self.entry)
        self.counts, self.totals = [self.counts[i] for i in picked], [self.totals[i] for i in picked]
        self.memory = [dict(self.memory[i]) for i in picked]
        self.hidden = None if self.hidden is None else rows(self.hidden)
        self.rope = None if self.rope is None else tuple(_by_row(x, rows) for x in self.rope)
        self._show_all()

    def forget(self) -> None:
        """Several tokens come at once, a new turn: they see everything, and the method starts anew."""
        self.memory = [{} for _ in self.counts]
        self._show_all()

    def check_crop(self, length: int) -> None:
        """Raise UnsupportedCall where what the method remembered at this length is not known any more."""
        if any(first < length <= last for first, last in self.steps):
            raise UnsupportedCall(
                "the method that chooses at every decode step compares each with the one before, so a cache cropped to "
                f"{length} tokens, in the middle of an answer, would go on with a later memory: crop to where the "
                "answer starts, or copy.deepcopy the cache at the step that you want to come back to"
            )

    def crop(self, length: int) -> None:
        """Know what was known when so many tokens had been fed; as `check_crop`."""
        self.check_crop(length)
        self.forget()
        self.steps = [step for step in self.steps if step[1] < length]
        self.cut(length)

    def cut(self, length: int) -> None:
        """Store what was stored when so many tokens had been fed; the next step chooses anew."""
        self._show_all()
        if any(at >= length for at in self.came):
            left = [i for i, at in enumerate(self.came) if at < length]
            self.came = tuple(self.came[i] for i in left)
            place = torch.full((self.order.shape[1],), -1, dtype=torch.int64)
            place[left] = torch.arange(len(left))
            place = place.to(self.slots.device)
            self.slots = place[self.slots.clamp(min=0)].masked_fill(self.slots < 0, -1)
            self.order = self.order[:, left]
        end = int((self.order < length).any(0).sum())  # those that were fed later stand at the end
        self.order, self.came = self.order[:, :end], self.came[:end]

    def note_step(self, length: int) -> None:
        """The method was asked when so many tokens had been fed, and remembers something."""
        if self.steps and self.steps[-1][1] == length:
            self.steps[-1] = self.steps[-1][0], length + 1
        else:
            self.steps.append((length, length + 1))

    def _show_all(self) -> None:
        self.chosen, self.picks, self.shown, self.columns = None, [], None, None
        self.real = None

    def joined(self, later: Recall) -> Recall:
        """With the tokens of a later turn; `later.order` covers all that is stored by now."""
        where = torch.cat([self.where, later.where], 1)
        counts = [a + b for a, b in zip(self.counts, later.counts)]
        last = torch.iinfo(where.dtype).max
        place = where.masked_fill(where < 0, last).argsort(dim=1, stable=True)[:, : max(counts)]
        hidden = rope = None
        if self.hidden is not None and later.hidden is not None and self.rope and later.rope:
            hidden = pick(torch.cat([self.hidden, later.hidden], 1), place)
            rope = tuple(pick(torch.cat([a, b], -2), place) for a, b in zip(self.rope, later.rope))
        return Recall(
            where.gather(1, place),
            later.order,
            torch.cat([self.slots, later.slots], 1).gather(1, place),
            counts,
            [a + b for a, b in zip(self.totals, later.totals)],
            torch.cat([self.entry, later.entry], 1).gather(1, place),
            hidden,
            rope,
            came=(*self.came, *[-1] * (later.order.shape[1] - len(self.came))) if self.came else (),
            steps=self.steps,
        )


class Step:
    """One decode step of a cache that has a `Recall` for each of `stages`, which act at decode, in order."""

    def __init__(self, cache: Any, stages: Sequence[Stage]) -> None:
        self.cache = cache
        self.stages: dict[int, Stage] = {s.where: s for s in stages}  # type: ignore[misc]
        self.rows: dict[int, Tensor] = {}
        self.verdicts: list[Verdict] = []
        self.running: Tensor | None = None  # [B, R] numbers of the tokens that came back, left-padded with -1
        self.length = int(cache.get_seq_length())
        found = [recall for k in self.stages if (recall := self._recall(k)) is not None]
        self._before = [(recall, [dict(row) for row in recall.memory], list(recall.steps)) for recall in found]

    def roll_back(self) -> None:
        """The step was not completed: the cache and what the method remembers are as before it."""
        kv.roll_back(self.cache, self.length)
        for recall, memory, steps in self._before:
            recall.cut(self.length)
            recall.memory, recall.steps = memory, steps

    def read_row(
        self, layer: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Keep the new token's attention in a layer over all that the layer shows, mean over heads: [B, K]."""
        self.rows[layer] = read("last_row", q, k, v, mask, scaling)

    @property
    def back(self) -> int:
        """Tokens that run beside the new one, pads included."""
        return 0 if self.running is None else self.running.shape[1]

    def enter(self, i: int, hidden: Tensor) -> Tensor:
        """Hidden states [B, R + 1, D] that layer i runs on, its cache showing what is chosen; the new token is last."""
        recall = self._recall(max((k for k in self.stages if k <= i), default=-1))
        if recall is None:
            return hidden
        if i in self.stages:
            hidden = self._choose(i, recall, hidden)
        if recall.shown is not None:
            kv.show(self.cache.layers[i], recall, self.back)
        return hidden

    def extend(self, i: int, hidden: Tensor, call: dict[str, Any], attention: str) -> None:
        """Arguments of layer i, made for the new token alone, for those that came back as well."""
        call["hidden_states"] = hidden
        if self.running is None:
            return
        recall = self._recall(max(k for k in self.stages if k <= i))
        assert recall is not None
        assert recall.shown is not None
        assert recall.rope is not None
        place = self.running.clamp(min=0)
        ropes = zip(recall.rope, call["position_embeddings"])
        call["position_embeddings"] = tuple(torch.cat([pick(x, place), _rows(new, place)], -2) for x, new in ropes)
        shown, mask = recall.shown, call.get("attention_mask")
        at = recall.where.gather(1, place).masked_fill(self.running < 0, -1)
        allowed = recall.order.gather(1, shown.index)[:, None] <= at[:, :, None]
        allowed = allowed if shown.valid is None else allowed & shown.valid[:, None]
        length = kv.stored(self.cache.layers[i]) + 1
        new = torch.ones(len(at), 1, length, dtype=torch.bool, device=at.device)
        if mask is not None:
            new = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(len(at), -1, -1)
        behind = new.new_zeros(len(at), self.back, length - shown.n)
        behind[..., -1] = self.running < 0  # pads see something, so that they stay finite; nothing sees them
        allowed = torch.cat([torch.cat([allowed, behind], 2), new], 1)
        call["attention_mask"] = mask_of(allowed[:, None], attention, hidden.dtype)

    def settle(self) -> None:
        """Raise what the checks found."""
        while self.verdicts:
            self.verdicts.pop(0).settle()

    def kept(self) -> dict[int, list[Tensor]]:
        """Positions as fed of the visual tokens that were chosen, by stage and row."""
        out = {}
        for k in self.stages:
            recall = self._recall(k)
            if recall is not None and recall.chosen is not None:
                out[k] = [where.index_select(0, some) for where, some in zip(recall.where, recall.chosen)]
        return out

    def _recall(self, k: int) -> Recall | None:
        return getattr(kv.state(self.cache, k), "recall", None) if k >= 0 else None

    def _choose(self, k: int, recall: Recall, hidden: Tensor) -> Tensor:
        """Ask the method of the stage at layer k, and say in `recall` what its layers show; as `enter`."""
        stage = self.stages[k]
        budgets = [stage.budgets([n])[0] if n else 0 for n in recall.totals]
        if all(budget is not None and budget >= n for budget, n in zip(budgets, recall.totals)):
            return hidden
        seen = self._recall(max((j for j in self.stages if j < k), default=-1))
        if seen is not None and seen.chosen is not None and seen.columns is not None:
            numbers, columns = seen.chosen, seen.columns
        else:
            numbers = [torch.arange(n, device=recall.where.device) for n in recall.counts]
            columns = recall.entry if seen is None else seen.slots
        if self.running is not None and recall.hidden is not None:
            _put(recall.hidden, self.running, hidden)
        todo = [b for b, n in enumerate(numbers) if budgets[b] is None or 0 < budgets[b] < len(n)]  # type: ignore[operator]
        picks, chosen = self._ask(stage, k, recall, [(b, numbers[b], columns[b]) for b in todo], budgets), list(numbers)
        if recall.hidden is None and recall.picks and all(a is b for a, b in zip(picks, recall.picks)):
            return hidden
        for b, some in zip(todo, picks):
            chosen[b] = numbers[b].index_select(0, some)
        recall.picks, recall.chosen = picks, chosen
        hidden = hidden[:, -1:]
        if recall.hidden is not None:
            hidden = self._bring_back(recall, chosen, hidden)
        _show(recall, chosen)
        return hidden

    def _ask(
        self, stage: Stage, k: int, recall: Recall, rows: list[tuple[int, Tensor, Tensor]], budgets: list[int | None]
    ) -> list[Tensor]:
        """What the method chooses of the numbers of each row, given where they stand in what layer k - 1 shows."""
        if rows and k - 1 not in self.rows:
            raise UnsupportedCall(
                f"{stage.method.name} at layer {k} found no attention in layer {k - 1} at this decode step: it did not "
                "go through transformers' attention interface"
            )
        views = []
        for b, numbers, columns in rows:
            row = self.rows[k - 1][b].index_select(0, columns.index_select(0, numbers))
            views.append(Visual(row.new_zeros(len(row), 0), budgets[b], signals={ROW: row}, state=recall.memory[b]))
        with deferring() as checks, full_precision(recall.where.device):
            answers = ask(stage, views) if views else []
        if any(recall.memory):
            recall.note_step(self.length)
        self.verdicts.append(Verdict(checks))
        if not stage.method.trusted:
            self.settle()
        return [answer.idx for answer in answers]

    def _bring_back(self, recall: Recall, chosen: list[Tensor], new: Tensor) -> Tensor:
        """The new token's states behind those of the chosen tokens that these layers never saw."""
        assert recall.hidden is not None
        wanted = torch.zeros_like(recall.where, dtype=torch.bool)
        for row, some in zip(wanted, chosen):
            row.index_fill_(0, some, True)
        wanted &= recall.slots < 0
        counts = wanted.sum(1).tolist()
        self.running = None
        if not any(counts):
            return new
        back = Compaction.of(wanted, counts)
        self.running = back.index if back.valid is None else back.index.masked_fill(~back.valid, -1)
        ends = torch.arange(self.back, device=new.device) + recall.order.shape[1]
        at = recall.where.gather(1, back.index).masked_fill(self.running < 0, -1)
        stood = recall.came or (-1,) * recall.order.shape[1]
        recall.came = (*stood, *[self.length] * self.back)
        recall.order = torch.cat([recall.order, at], 1)
        _put(recall.slots, self.running, ends.expand(len(counts), -1))
        return torch.cat([pick(recall.hidden, back.index).to(new.dtype), new], 1)


def _show(recall: Recall, chosen: list[Tensor]) -> None:
    """Let the layers show the text and the chosen visual tokens: `shown` and `columns`."""
    keep = recall.real = recall.order >= 0
    visual = keep.new_zeros(len(keep), keep.shape[1] + 1)  # one place more, for tokens that are not stored
    visual.scatter_(1, recall.slots.masked_fill(recall.slots < 0, keep.shape[1]), True)
    keep = keep & ~visual[:, :-1]
    counts = keep.sum(1).tolist()
    picked = torch.zeros_like(recall.where, dtype=torch.bool)
    for b, some in enumerate(chosen):
        keep[b].index_fill_(0, recall.slots[b].index_select(0, some), True)
        picked[b].index_fill_(0, some, True)
        counts[b] += len(some)
    recall.shown = Compaction.of(keep, counts)
    recall.columns = recall.shown.src.gather(1, recall.slots.clamp(min=0)).masked_fill(~picked, -1)


def pick(x: Tensor, place: Tensor) -> Tensor:
    """x [.., B or 1, V, d] -> [.., B, n, d] at place [B, n]."""
    size = (*x.shape[:-3], len(place), *x.shape[-2:])
    index = place.view(*[1] * (x.dim() - 3), *place.shape, 1)
    return x.expand(size).gather(-2, index.expand(*size[:-2], place.shape[1], size[-1]))


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """x [.., B or 1, n, d] for all rows."""
    return x.expand(*x.shape[:-3], len(like), *x.shape[-2:])


def _by_row(x: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """`rows` on a tensor [.., B, V, d]."""
    return rows(x.movedim(-3, 0)).movedim(0, -3)


def _put(store: Tensor, numbers: Tensor, values: Tensor) -> None:
    """Write values [B, >= R, ..] of the tokens numbers [B, R] (-1: of none) into store [B, V, ..], in place."""
    row, column = (numbers >= 0).nonzero(as_tuple=True)
    store[row, numbers[row, column]] = values[row, column].to(store.dtype)
