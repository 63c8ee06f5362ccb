"""What a stage that acts at decode knows of the prompt; it lives on the cache layer where the stage stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.compaction import Compaction
from ..core.errors import UnsupportedCall

Rope = tuple[Tensor, ...]


@dataclass
class DecodeSelection:
    """What a stage knows of the prompt at decode. Visual tokens are numbered in every row, from 0, pads at the end.

        number           0    1    2        of V visual tokens
        where            4    5    6        their positions as fed
        kv_index         4   -1    5        where their keys are stored; number 1 was dropped by the prefill
        visible_index    -1  -1    4        where they stand in what the layers show; number 2 alone was chosen

    where: [B, V] int64, -1: no token. order: [B, P] int64, the positions of all tokens that its layers store.
    kv_index: [B, V] int64, -1: not stored. kv_index_before: the same in the layer before the first such stage, which
        stores them all. visible_index: [B, V] int64, -1: not shown.
    counts, totals: visual tokens of each row, as they came to the first such stage and as fed.
    hidden: [B, V, D] states entering the layer, and rope: rotary embeddings [.., B, V, d], where tokens may come back.
    memory: the method's state, row by row. chosen: numbers chosen in each row at the last step, None before the first.
    picks: the answers that led to them. visible: the cut of the store that the layers show; seen: [B, P] bool, what
        they see of it in place of such a cut, where tokens may come back.
    real: [B, P] bool, what of the store is no padding. came: at which length each of its P tokens came back, or ().
    steps: between which lengths the method was asked at every step and remembered something.
    """

    where: Tensor
    order: Tensor
    kv_index: Tensor
    counts: list[int]
    totals: list[int]
    kv_index_before: Tensor
    hidden: Tensor | None = None
    rope: Rope | None = None
    memory: list[dict[str, Any]] = field(default_factory=list)
    chosen: list[Tensor] | None = None
    picks: list[Tensor] = field(default_factory=list)
    visible: Compaction | None = None
    visible_index: Tensor | None = None
    seen: Tensor | None = None
    real: Tensor | None = None
    came: tuple[int, ...] = ()
    steps: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = self.memory or [{} for _ in self.counts]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle, also one of version 0.1, which had other names."""
        names = {"slots": "kv_index", "entry": "kv_index_before", "columns": "visible_index", "shown": "visible"}
        self.__dict__.update({names.get(name, name): value for name, value in state.items()})

    def select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or pick rows, as the cache does; the next step chooses again, from the same memory."""
        picked = rows(torch.arange(len(self.counts), device=self.where.device)).tolist()
        self.where, self.order = rows(self.where), rows(self.order)
        self.kv_index, self.kv_index_before = rows(self.kv_index), rows(self.kv_index_before)
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
            place = place.to(self.kv_index.device)
            self.kv_index = place[self.kv_index.clamp(min=0)].masked_fill(self.kv_index < 0, -1)
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
        self.chosen, self.picks, self.visible, self.visible_index = None, [], None, None
        self.seen = self.real = None

    def joined(self, later: DecodeSelection) -> DecodeSelection:
        """With the tokens of a later turn; `later.order` covers all that is stored by now."""
        where = torch.cat([self.where, later.where], 1)
        counts = [a + b for a, b in zip(self.counts, later.counts)]
        last = torch.iinfo(where.dtype).max
        place = where.masked_fill(where < 0, last).argsort(dim=1, stable=True)[:, : max(counts)]
        hidden = rope = None
        if self.hidden is not None and later.hidden is not None and self.rope and later.rope:
            hidden = pick(torch.cat([self.hidden, later.hidden], 1), place)
            rope = tuple(pick(torch.cat([a, b], -2), place) for a, b in zip(self.rope, later.rope))
        return DecodeSelection(
            where.gather(1, place),
            later.order,
            torch.cat([self.kv_index, later.kv_index], 1).gather(1, place),
            counts,
            [a + b for a, b in zip(self.totals, later.totals)],
            torch.cat([self.kv_index_before, later.kv_index_before], 1).gather(1, place),
            hidden,
            rope,
            came=(*self.came, *[-1] * (later.order.shape[1] - len(self.came))) if self.came else (),
            steps=self.steps,
        )


def pick(x: Tensor, place: Tensor) -> Tensor:
    """x [.., B or 1, V, d] -> [.., B, n, d] at place [B, n]."""
    size = (*x.shape[:-3], len(place), *x.shape[-2:])
    index = place.view(*[1] * (x.dim() - 3), *place.shape, 1)
    return x.expand(size).gather(-2, index.expand(*size[:-2], place.shape[1], size[-1]))


def _by_row(x: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """`rows` on a tensor [.., B, V, d]."""
    return rows(x.movedim(-3, 0)).movedim(0, -3)
