"""Decode-time stages: at every step a method chooses anew which visual tokens the layers behind it see.

What was stored stays stored, so a token may be seen again at the next step. Where a choice often stays the same, a
layer of the cache shows a selection (its keys and values), and the whole stands aside. A token that the prefill dropped
has no keys behind that stage: its hidden state was put by, and when it is chosen it runs through those layers beside
the new token, once for all. There the choice is another at every step, so one mask for all layers behind a stage hides
what was not chosen, and no layer gathers anything.

State lives on the cache: a `DecodeSelection` (decode_selection.py) on the layer where a stage stands, for the layers up
to the next such stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.ask import ask
from ..core.compaction import Compaction
from ..core.errors import UnsupportedCall
from ..core.masks import mask_of
from ..core.method import Stage
from ..core.visual import Visual
from ..kernels import DeferredChecks, deferring, full_precision
from ..model_adapters.base import Adapter
from . import cache as kv
from .attention_probe import read
from .checks import ROW
from .decode_selection import DecodeSelection, Rope, pick
from .once import once


class DecodeStep:
    """One decode step of a cache that has a `DecodeSelection` for each of `stages`, which act at decode, in order."""

    def __init__(self, cache: Any, stages: Sequence[Stage]) -> None:
        self.cache = cache
        self.stages: dict[int, Stage] = {s.where: s for s in stages}  # type: ignore[misc]
        self.rows: dict[int, Tensor] = {}
        self.checks: list[DeferredChecks] = []
        self.running: Tensor | None = None  # [B, R] numbers of the tokens that came back, left-padded with -1
        self.padded = False  # some of them are -1
        self._here: DecodeSelection | None = None  # of the last stage that was passed
        self.length = int(cache.get_seq_length())
        found = [selection for k in self.stages if (selection := self._selection(k)) is not None]
        self._before = [
            (selection, [dict(row) for row in selection.memory], list(selection.steps)) for selection in found
        ]

    def roll_back(self) -> None:
        """The step was not completed: the cache and what the method remembers are as before it."""
        kv.roll_back(self.cache, self.length)
        for selection, memory, steps in self._before:
            selection.cut(self.length)
            selection.memory, selection.steps = memory, steps

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
        if i in self.stages:
            self._here = self._selection(i)
            if self._here is not None:
                hidden = self._choose(i, self._here, hidden)
        selection, layer = self._here, self.cache.layers[i]
        if selection is not None and selection.visible is not None:
            show(layer, selection)
        if self.hides and layer.visible is not None:  # as version 0.1 left it in a pickle
            layer.show_all()
        if selection is not None and self.running is not None:
            valid = None if layer.valid is None and not self.padded else selection.real
            layer.returning = self.back, valid, selection.came
        return hidden

    @property
    def hides(self) -> bool:
        """True where the arguments of a layer are made here: they hide what was not chosen of all that it stores."""
        return self._here is not None and self._here.seen is not None

    def extend(self, i: int, hidden: Tensor, call: dict[str, Any], adapter: Adapter, made: dict[Any, Any]) -> None:
        """Arguments of layer i, made for the new token alone, as they are with the choice and those that came back.

        made: those of this call, which the layers behind a stage share.
        """
        call["hidden_states"] = hidden
        selection = self._here
        if selection is None or selection.seen is None:
            return
        stage = max(k for k in self.stages if k <= i)
        mask, rope, layer = call.get("attention_mask"), call["position_embeddings"], self.cache.layers[i]

        def arguments() -> dict[str, Any]:
            appended = kv.stored(layer) - layer.prefix
            allowed = self._allowed(selection, mask, appended + 1)
            found: dict[str, Any] = {"attention_mask": mask_of(allowed[:, None], adapter.attention(), hidden.dtype)}
            if self.running is not None:
                found["position_embeddings"] = self._ropes(selection, rope)
            return found

        call |= once(made, ("step", stage, mask, rope), arguments)

    def _allowed(self, selection: DecodeSelection, mask: Tensor | None, behind: int) -> Tensor:
        """[B, R + 1, P + behind] bool: what those that came back and the new token see.

        mask: of the new token as its first layer is given it, whose last columns are of what stands behind the prompt.
        """
        seen = selection.seen
        assert seen is not None
        new = seen.new_ones(len(seen), behind)
        if mask is not None:
            new = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0, -behind:].expand(len(seen), -1)
        allowed = torch.cat([seen, new], 1)[:, None]
        if self.running is None:
            return allowed
        place = self.running.clamp(min=0)
        at = selection.where.gather(1, place).masked_fill(self.running < 0, -1)
        before = seen[:, None] & (selection.order[:, None] <= at[:, :, None])
        later = seen.new_zeros(len(seen), self.back, behind)
        later[..., -1] = self.running < 0  # pads see something, so that they stay finite; nothing sees them
        return torch.cat([torch.cat([before, later], 2), allowed], 1)

    def _ropes(self, selection: DecodeSelection, new: Rope) -> Rope:
        """Rotary embeddings of those that came back, before those of the new token."""
        assert self.running is not None
        assert selection.rope is not None
        place = self.running.clamp(min=0)
        return tuple(torch.cat([pick(x, place), _rows(y, place)], -2) for x, y in zip(selection.rope, new))

    def raise_if_failed(self) -> None:
        """Raise what the checks found."""
        while self.checks:
            self.checks.pop(0).raise_if_failed()

    def kept(self) -> dict[int, list[Tensor]]:
        """Positions as fed of the visual tokens that were chosen, by stage and row."""
        out = {}
        for k in self.stages:
            selection = self._selection(k)
            if selection is not None and selection.chosen is not None:
                out[k] = [where.index_select(0, some) for where, some in zip(selection.where, selection.chosen)]
        return out

    def _selection(self, k: int) -> DecodeSelection | None:
        return getattr(kv.state(self.cache, k), "selection", None) if k >= 0 else None

    def _choose(self, k: int, selection: DecodeSelection, hidden: Tensor) -> Tensor:
        """Ask the method of the stage at layer k, and say in `selection` what its layers show; as `enter`."""
        stage = self.stages[k]
        budgets = [stage.budgets([n])[0] if n else 0 for n in selection.totals]
        if all(budget is not None and budget >= n for budget, n in zip(budgets, selection.totals)):
            return hidden
        seen = self._selection(max((j for j in self.stages if j < k), default=-1))
        if seen is not None and seen.chosen is not None and seen.visible_index is not None:
            numbers, visible_index = seen.chosen, seen.visible_index
        else:
            numbers = [torch.arange(n, device=selection.where.device) for n in selection.counts]
            visible_index = selection.kv_index_before if seen is None else seen.kv_index
        if self.running is not None and selection.hidden is not None:
            _put(selection.hidden, self.running, hidden)
        todo = [b for b, n in enumerate(numbers) if budgets[b] is None or 0 < budgets[b] < len(n)]  # type: ignore[operator]
        asked = [(b, numbers[b], visible_index[b]) for b in todo]
        picks, chosen = self._ask(stage, k, selection, asked, budgets), list(numbers)
        if selection.hidden is None and selection.picks and all(a is b for a, b in zip(picks, selection.picks)):
            return hidden
        for b, some in zip(todo, picks):
            chosen[b] = numbers[b].index_select(0, some)
        selection.picks, selection.chosen = picks, chosen
        hidden = hidden[:, -1:]
        if selection.hidden is not None:
            hidden = self._bring_back(selection, chosen, hidden)
        _select_visible(selection, chosen)
        return hidden

    def _ask(
        self,
        stage: Stage,
        k: int,
        selection: DecodeSelection,
        rows: list[tuple[int, Tensor, Tensor]],
        budgets: list[int | None],
    ) -> list[Tensor]:
        """What the method chooses of the numbers of each row, given where they stand in what layer k - 1 shows."""
        if rows and k - 1 not in self.rows:
            raise UnsupportedCall(
                f"{stage.method.name} at layer {k} found no attention in layer {k - 1} at this decode step: it did not "
                "go through transformers' attention interface"
            )
        views = []
        for b, numbers, visible_index in rows:
            row = self.rows[k - 1][b].index_select(0, visible_index.index_select(0, numbers))
            views.append(Visual(row.new_zeros(len(row), 0), budgets[b], signals={ROW: row}, state=selection.memory[b]))
        with deferring() as checks, full_precision(selection.where.device):
            answers = ask(stage, views) if views else []
        if any(selection.memory):
            selection.note_step(self.length)
        self.checks.append(DeferredChecks(checks))
        if not stage.method.trusted:
            self.raise_if_failed()
        return [answer.idx for answer in answers]

    def _bring_back(self, selection: DecodeSelection, chosen: list[Tensor], new: Tensor) -> Tensor:
        """The new token's states behind those of the chosen tokens that these layers never saw."""
        assert selection.hidden is not None
        wanted = torch.zeros_like(selection.where, dtype=torch.bool)
        for row, some in zip(wanted, chosen):
            row.index_fill_(0, some, True)
        wanted &= selection.kv_index < 0
        counts = wanted.sum(1).tolist()
        self.running = None
        if not any(counts):
            return new
        back = Compaction.of(wanted, counts)
        self.running = back.index if back.valid is None else back.index.masked_fill(~back.valid, -1)
        self.padded = back.valid is not None
        ends = torch.arange(self.back, device=new.device) + selection.order.shape[1]
        at = selection.where.gather(1, back.index).masked_fill(self.running < 0, -1)
        stood = selection.came or (-1,) * selection.order.shape[1]
        selection.came = (*stood, *[self.length] * self.back)
        selection.order = torch.cat([selection.order, at], 1)
        _put(selection.kv_index, self.running, ends.expand(len(counts), -1))
        return torch.cat([pick(selection.hidden, back.index).to(new.dtype), new], 1)


def show(layer: kv.Pruned, selection: DecodeSelection) -> None:
    """Let a layer show the cut `selection.visible` of the tokens it stores first, and all that came behind them.

    A static layer hides the others.
    """
    visible, size = selection.visible, selection.order.shape[1]
    assert visible is not None
    if layer.visible is visible:
        return
    layer.real = selection.real
    if kv.is_static(layer):
        layer.valid, layer.prefix, layer.rebuild_mask, layer.visible = visible.kept, size, True, visible
        return
    length = layer.get_seq_length()
    if layer.full_kv is None:
        layer.full_kv, layer.prefix = (layer.keys[:, :, :size], layer.values[:, :, :size]), size
    layer._gather(visible.index)
    layer.prefix, layer.valid, layer.rebuild_mask = visible.n, visible.valid, True
    layer.dropped, layer.visible = length - kv.stored(layer), visible


def selections(cache: Any) -> bool:
    """True if stages act on this cache at decode."""
    return any(getattr(layer, "selection", None) is not None for layer in getattr(cache, "layers", ()))


def show_all(cache: Any) -> None:
    """Let every layer show all it stores, for a call of several tokens; what stages at decode remember starts anew."""
    for layer in cache.layers:
        if not isinstance(layer, kv.Pruned):
            continue
        if layer.selection is not None:
            layer.selection.forget()
        layer.show_all()


def _select_visible(selection: DecodeSelection, chosen: list[Tensor]) -> None:
    """Let the layers show the text and the chosen visual tokens: `visible` or `seen`, and `visible_index`."""
    keep = selection.real = selection.order >= 0
    visual = keep.new_zeros(len(keep), keep.shape[1] + 1)  # one place more, for tokens that are not stored
    visual.scatter_(1, selection.kv_index.masked_fill(selection.kv_index < 0, keep.shape[1]), True)
    keep = keep & ~visual[:, :-1]
    text = keep.sum(1).tolist() if selection.hidden is None else []
    picked = torch.zeros_like(selection.where, dtype=torch.bool)
    for b, some in enumerate(chosen):
        keep[b].index_fill_(0, selection.kv_index[b].index_select(0, some), True)
        picked[b].index_fill_(0, some, True)
    if selection.hidden is not None:  # the layers store no token that was not fed or brought back, and hide the others
        selection.seen, selection.visible_index = keep, selection.kv_index.masked_fill(~picked, -1)
        return
    selection.visible = Compaction.of(keep, [stays + len(some) for stays, some in zip(text, chosen)])
    selection.visible_index = selection.visible.src.gather(1, selection.kv_index.clamp(min=0)).masked_fill(~picked, -1)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """x [.., B or 1, n, d] for all rows."""
    return x.expand(*x.shape[:-3], len(like), *x.shape[-2:])


def _put(store: Tensor, numbers: Tensor, values: Tensor) -> None:
    """Write values [B, >= R, ..] of the tokens numbers [B, R] (-1: of none) into store [B, V, ..], in place."""
    row, column = (numbers >= 0).nonzero(as_tuple=True)
    store[row, numbers[row, column]] = values[row, column].to(store.dtype)
