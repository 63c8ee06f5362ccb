"""`Frame`: the pruning of one forward pass, from units to one `Compaction`; `Last`: what it leaves behind."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import cache as kv
from .compact import Compaction, mask_for, tensor_mask
from .kernels import attention_rows
from .model_adapters.generic import MODALITIES, Adapter, Features, Unit
from .types import Assignment, Signal, Span, Stage, UnsupportedCall, Visual, VtpruneError, Where

# Arguments of text models that have the sequence length and no say in which tokens are visual.
CUT_AS_IDS = ("token_type_ids", "mm_token_type_ids", "visual_pos_masks")
KNOWN = (
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "deepstack_visual_embeds",
    "past_key_values",
    *CUT_AS_IDS,
)


@dataclass(frozen=True)
class UnitResult:
    """What one stage did to one unit.

    positions: [K] int64, kept positions in the row as fed. idx: [K] the same counted inside the unit's n tokens as
    the stage found them. order: [K] pick order, or None. scores: [n] or None. spans, grid: rasters of the unit.
    """

    row: int
    modality: str
    method: str
    where: Where
    n: int
    positions: Tensor
    idx: Tensor
    order: Tensor | None
    scores: Tensor | None
    spans: tuple[Span, ...]
    grid: tuple[int, int, int] | None
    assignment: Assignment


@dataclass(frozen=True)
class Last:
    """What the last prefill kept.

    index: [B, n] int64 positions in the rows as fed, after all stages. valid: [B, n] bool or None (no padding).
    src: [B, L] int64, the slot that answers for each position fed. units: one `UnitResult` per unit and stage.
    lengths: tokens each decoder layer ran on. notes: fallbacks that were used.
    """

    index: Tensor
    valid: Tensor | None
    src: Tensor
    units: list[UnitResult]
    lengths: list[int]
    notes: list[str]
    clocks: list[_Clock] = field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float:
        """Time spent in methods; on a GPU this waits for them."""
        return sum(clock.seconds() for clock in self.clocks)


@dataclass
class Alive:
    """A unit while it shrinks: positions [m] in the row as fed, and which of its n original tokens they are [m]."""

    unit: Unit
    positions: Tensor
    origin: Tensor
    whole: bool = True


@dataclass
class Frame:
    """One forward pass of the text model. `code` is [B, L] int8 on the device: 1 text, 2.. visual."""

    adapter: Adapter
    stages: list[Stage]
    code: Tensor
    opened: bool = False
    past: int = 0
    cache: Any = None
    compaction: Compaction | None = None
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    alive: list[Alive] = field(default_factory=list)
    results: list[UnitResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    valids: list[Tensor | None] = field(default_factory=list)
    shift: Tensor | None = None
    state: dict[int, dict[str, Any]] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    clocks: list[_Clock] = field(default_factory=list)
    merges: list[tuple[int, Tensor, Assignment]] = field(default_factory=list)
    inner: Compaction | None = None

    # -- setting up -------------------------------------------------------------------------------------------------

    def open(self, call: dict[str, Any], features: dict[str, Features | None]) -> None:
        """Read masks and units; the one transfer from the device of a pruned prefill happens here."""
        embeds, mask = call["inputs_embeds"], call.get("attention_mask")
        batch, length = embeds.shape[:2]
        if self.code.shape != (batch, length):
            raise UnsupportedCall(
                f"the base model saw {tuple(self.code.shape)} tokens and hands {(batch, length)} to its text model: "
                "this call shape is not supported"
            )
        self.cache = call.get("past_key_values")
        self.past = int(self.cache.get_seq_length()) if self.cache is not None else 0
        real = self._real(mask, length)
        code = self.code if real is None else self.code * real[:, -length:]
        if real is not None and real.shape[1] > length:
            code = torch.cat([code, real[:, :-length].to(code)], dim=1)
        host = code.cpu()
        self.host, self.holes = host[:, :length], bool((host == 0).any())
        self.keep = (self.host != 0).to(embeds.device)
        self.units = self.adapter.units(self.host, features)
        if any(features.get(m) is None for m in self.modalities()):
            self._check_runs()
            self.notes.append("features were encoded elsewhere: image grids are unknown, every run of tokens is a unit")
        self.alive = [self._start(u, embeds.device) for u in self.units]
        self.counts = (self.host != 0).sum(1).tolist()
        self.lengths, self.valids = [length] * len(self.adapter.layers), [None] * len(self.adapter.layers)
        self.dtype, self.opened = embeds.dtype, True

    def _real(self, mask: Any, length: int) -> Tensor | None:
        """[B, past + L] or [B, L] bool: which tokens are no padding, as far as the mask tells."""
        if isinstance(mask, dict):
            mask = mask.get("full_attention")
        if not torch.is_tensor(mask):
            return None
        if mask.dim() == 4:  # the last query may attend to every real token
            start = self._past_columns(mask, 0, length)
            row = mask[:, 0, -1, start : start + length]
            real = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
            return real.expand(self.code.shape[0], -1).to(self.code.device)
        return (mask[:, : self.past + length] != 0).to(self.code.device)

    def _check_runs(self) -> None:
        """Features of unknown origin come without sizes, so a part of an image must be told by where it stands."""
        first = [int(row.nonzero()[0, 0]) if row.any() else 0 for row in self.host]
        starts = self.past > 0 and any(row[i] > 1 for row, i in zip(self.host, first))
        if starts or bool((self.host[:, -1] > 1).any()):
            raise UnsupportedCall(
                "this call ends or goes on inside an image, as chunked prefill does, so a method would see only a part "
                "of it: set prefill_chunk_size=None"
            )

    def _start(self, unit: Unit, device: torch.device) -> Alive:
        positions = torch.cat([torch.arange(s, s + m) for s, m in unit.ranges]).to(device)
        return Alive(unit, positions, torch.arange(unit.n, device=device))

    def modalities(self) -> list[str]:
        """Modalities that occur in this batch."""
        return [m for m in MODALITIES if any(u.modality == m for u in self.units)]

    # -- running stages ---------------------------------------------------------------------------------------------

    def run_stages(self, where: Where, hidden: Tensor) -> bool:
        """Run the stages at `where` on hidden [B, n, D] (n = current slots). True if tokens were dropped."""
        self.hidden = hidden
        before = sum(len(a.positions) for a in self.alive)
        for number, stage in enumerate(self.stages):
            if stage.where == where:
                self._run(number, stage)
        if sum(len(a.positions) for a in self.alive) == before:
            return False
        self._compact(where)
        return True

    def _run(self, number: int, stage: Stage) -> None:
        groups = [g for g in self._groups(stage) if g]
        todo, views = [], []
        for group in groups:
            total = sum(a.unit.n for a in group)
            budget = stage.budget(total)
            if budget is not None and budget >= sum(len(a.positions) for a in group):
                continue
            todo.append(group)
            views.append(self._visual(number, stage, group, budget))
        if not todo:
            return
        clock = _Clock(self.hidden.device)
        answers = stage.method.batch(views)
        self.clocks.append(clock.stop())
        if len(answers) != len(todo):
            raise VtpruneError(f"{stage.method.name}.batch answered {len(answers)} of {len(todo)} units")
        _check(stage, views, answers)
        for group, view, answer in zip(todo, views, answers):
            self._take(stage, group, view, answer)
            note = view.state.get("note")
            if note and note not in self.notes:
                self.notes.append(note)

    def _groups(self, stage: Stage) -> list[list[Alive]]:
        """Units of one stage: single ones, frames cut out of them, or all of a row."""
        if stage.per == "image":
            return [[a] for a in self.alive]
        if stage.per == "sample":
            rows = sorted({a.unit.row for a in self.alive})
            return [[a for a in self.alive if a.unit.row == r] for r in rows]
        self.alive = [frame for a in self.alive for frame in _frames(a)]
        return [[a] for a in self.alive]

    def _visual(self, number: int, stage: Stage, group: list[Alive], budget: int | None) -> Visual:
        row, device = group[0].unit.row, self.hidden.device
        one = group[0] if len(group) == 1 and group[0].whole else None
        slots = [self._slots(a) for a in group]
        if one and self.compaction is None and len(one.unit.ranges) == 1:
            start, length = one.unit.ranges[0]
            x = self.hidden[row, start : start + length]
        else:
            x = self.hidden[row].index_select(0, torch.cat(slots).to(device))
        signals: dict[Signal, Tensor] = {}
        for need in stage.method.needs:
            if isinstance(stage.where, int):
                signals[need] = torch.cat([self.rows[stage.where + need.offset][row][s] for s in slots])
            elif all(need in a.unit.signals for a in group):
                signals[need] = torch.cat([a.unit.signals[need].to(device)[a.origin] for a in group])
        return Visual(
            x=x,
            budget=budget,
            grid=one.unit.grid if one else None,
            spans=one.unit.spans if one else _joined_spans(group),
            signals=signals,
            text=self._text(row, stage.where),
            state=self.state.setdefault(number, {}),
        )

    def _slots(self, a: Alive) -> Tensor:
        """Where the tokens of a unit stand in the current hidden states."""
        if self.compaction is None:
            return a.positions
        return self.compaction.src[a.unit.row].index_select(0, a.positions)

    def _text(self, row: int, place: Where) -> Tensor:
        key = ("text", row, place)
        if key not in self.memo:
            where = (self.host[row] == 1).nonzero().flatten().to(self.hidden.device)
            slots = where if self.compaction is None else self.compaction.src[row][where]
            self.memo[key] = self.hidden[row].index_select(0, slots)
        return self.memo[key]

    def _take(self, stage: Stage, group: list[Alive], view: Visual, answer: Assignment) -> None:
        row = group[0].unit.row
        slots = torch.cat([self._slots(a) for a in group])
        positions = torch.cat([a.positions for a in group])
        if answer.merges:
            merged = answer.apply(view.x)
            self.hidden = self.hidden.index_put(
                (torch.full_like(answer.idx, row), slots[answer.idx].to(self.hidden.device)), merged
            )
            self.merges.append((row, positions, answer))
        unit = group[0].unit
        self.results.append(
            UnitResult(
                row, unit.modality, stage.method.name, stage.where, view.n, positions[answer.idx], answer.idx,
                answer.order, answer.scores, view.spans, view.grid, answer,
            )
        )  # fmt: skip
        self.counts[row] += answer.idx.shape[0] - view.n
        self.keep[row, positions] = False
        self.keep[row, positions[answer.idx]] = True
        bounds = [0]
        for a in group:
            bounds.append(bounds[-1] + len(a.positions))
        for a, start, stop in zip(group, bounds, bounds[1:]):
            idx = answer.idx if len(group) == 1 else answer.idx[(answer.idx >= start) & (answer.idx < stop)] - start
            a.positions, a.origin, a.whole = a.positions[idx], a.origin[idx], False

    def _compact(self, where: Where) -> None:
        """One cut from the rows as fed to what is alive now; `self.cut_now` is the cut of the current slots."""
        whole = Compaction.of(self.keep, self.counts)
        if self.compaction is None:
            self.cut_now = whole
        else:
            old = self.compaction.index
            now = self.keep.gather(1, old)
            now = now if self.compaction.valid is None else now & self.compaction.valid
            self.cut_now = Compaction.of(now, self.counts)
        self.compaction = whole
        first = where if isinstance(where, int) else 0
        for i in range(first, len(self.lengths)):
            self.lengths[i], self.valids[i] = whole.n, whole.valid

    # -- cutting arguments ------------------------------------------------------------------------------------------

    def positions(self, call: dict[str, Any]) -> Tensor:
        """Position ids of the kept tokens: the original ones, or renumbered (positions="compact")."""
        c, ids = self.compaction, call.get("position_ids")
        assert c is not None
        if ids is None:
            ids = torch.arange(c.length, device=c.index.device)[None] + self.past
        cut = c.cut(ids, -1)
        if any(s.where == "llm" and s.compact for s in self.stages):
            rank = torch.arange(c.n, device=cut.device)[None]
            real = c.valid if c.valid is not None else torch.ones_like(c.index, dtype=torch.bool)
            pads = (~real).sum(1, keepdim=True)
            first = cut.expand(len(real), -1).gather(1, pads)
            compact = (first + rank - pads).clamp(min=0)
            self.shift = (cut.expand(len(real), -1) - compact)[:, -1]
            return compact
        return cut

    def cut_mask(self, mask: Any) -> Tensor | None:
        """A mask of the text model ([B, K], [B, 1, L, K] or None), cut."""
        c = self.compaction
        assert c is not None
        if mask is None:
            return None
        return c.cut_mask(tensor_mask(mask), self._past_columns(mask, 0, c.length))

    def causal_mask(self, valid: Tensor | None = None) -> Tensor | None:
        """The mask of a layer that was given none, where rows hold padding now: [B, n] for flash, else 4-D."""
        assert self.compaction is not None
        valid = self.compaction.valid if valid is None else valid
        return None if valid is None else mask_for(self.adapter.attention(), valid, valid.shape[1], self.dtype)

    def _past_columns(self, mask: Tensor, layer: int, new: int) -> int:
        """Columns of a mask that stand before the `new` tokens of this call."""
        held = getattr(self.cache, "layers", ())
        held = held[layer] if layer < len(held) else None
        if mask.dim() == 4 and held is not None and kv.is_static(held):
            return self.past - getattr(held, "dropped", 0)
        return mask.shape[-1] - new

    def cut_deepstack(self, call: dict[str, Any]) -> None:
        """Visual features that the text model adds after its first layers (Qwen3-VL)."""
        embeds, where = call.get("deepstack_visual_embeds"), call.get("visual_pos_masks")
        if embeds is None or where is None:
            return
        c = self.compaction
        assert c is not None
        where = where[..., 0] if where.dim() == 3 else where
        now = c.cut(where, 1)
        now = now if c.valid is None else now & c.valid
        out = []
        for layer in embeds:
            full = layer.new_zeros(*where.shape, layer.shape[-1])
            full[where] = layer
            for row, positions, answer in self.merges:
                full[row, positions[answer.idx]] = answer.apply(full[row, positions])
            out.append(c.cut(full, 1)[now])
        call["deepstack_visual_embeds"], call["visual_pos_masks"] = out, now

    def cut_rest(self, call: dict[str, Any]) -> None:
        """Known arguments of sequence length; an unknown one would go out of step, so it is refused."""
        c = self.compaction
        assert c is not None
        for name, value in call.items():
            if not torch.is_tensor(value) or value.dim() < 1 or name in KNOWN[:4]:
                continue
            if name in CUT_AS_IDS:
                if value.shape[1] == c.length:
                    call[name] = c.cut(value, 1)
            elif c.length in value.shape[:3] and c.length > 1:
                raise UnsupportedCall(
                    f"the text model takes {name!r} of shape {tuple(value.shape)}, which has the sequence length "
                    f"{c.length}: the adapter of {self.adapter.model_type} does not know how to cut it"
                )

    # -- inside the LLM ---------------------------------------------------------------------------------------------

    def run_layer(self, i: int, hidden: Tensor) -> Tensor:
        """Hidden states entering layer i, after the stages there."""
        if not any(s.where == i for s in self.stages) or not self.run_stages(i, hidden):
            return hidden
        kv.enter()
        self.inner = self.cut_now if self.inner is None else self.inner.then(self.cut_now)
        return self.cut_now.cut(self.hidden, 1)

    def cut_layer_call(self, i: int, call: dict[str, Any]) -> None:
        """Give a layer behind a stage the mask and positions of the tokens that are left."""
        c = self.inner
        if c is None:
            return
        for name in ("position_embeddings", "position_ids"):
            if name in call:
                call[name] = self._once(call[name], lambda v: _cut_any(v, c))
        mask = call.get("attention_mask")
        if mask is not None:
            past = self._past_columns(tensor_mask(mask), i, c.length)
            call["attention_mask"] = self._once(mask, lambda m: c.cut_mask(m, past))
        elif c.valid is not None:
            call["attention_mask"] = self._once(c, lambda _: self.causal_mask(c.valid))

    def _once(self, value: Any, cut: Any) -> Any:
        """Layers share their arguments: cut each object once per stage (and keep it alive while its id is a key)."""
        key = (id(value), len(self.results))
        if key not in self.memo:
            self.memo[key] = (value, cut(value))
        return self.memo[key][1]

    def read_last_row(self, layer: int, q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Softmax row of each sample's last real token over the slots of this call, mean over heads: [B, n]."""
        batch, n = q.shape[0], q.shape[2]
        past = self.past - getattr(kv.state(self.cache, layer), "dropped", 0) if self.cache is not None else 0
        last = self._last_slot(n).to(q.device)
        rows = q.gather(2, last[:, None, None, None].expand(batch, q.shape[1], 1, q.shape[3]))
        k = k[:, :, : past + n]
        if mask is not None and mask.shape[-2] == n:
            mask = mask[..., : past + n].expand(batch, -1, -1, -1)
            bias = mask.gather(2, last[:, None, None, None].expand(batch, mask.shape[1], 1, past + n))
        else:  # causal, with no mask or (flash attention) one that knows padding only
            seen = torch.arange(past + n, device=q.device)[None] <= (last + past)[:, None]
            if mask is not None:
                seen = seen & mask.reshape(batch, -1)[:, : past + n].bool()
            bias = seen[:, None, None, :]
        self.rows[layer] = attention_rows(rows, k, bias, scaling).mean(1)[:, 0, past:]

    def _last_slot(self, n: int) -> Tensor:
        if self.compaction is not None:  # pads were dropped: rows end with a real token
            return torch.full((len(self.host),), n - 1)
        position = torch.arange(1, self.host.shape[1] + 1)
        return ((self.host != 0) * position).amax(1) - 1

    # -- closing ----------------------------------------------------------------------------------------------------

    def shrink_cache(self, cache: Any) -> None:
        """Let every layer of the cache answer for what it did not store."""
        length = self.host.shape[1]
        for i in range(min(len(cache.layers), len(self.lengths))):
            if self.lengths[i] < length or kv.state(cache, i) is not None:
                kv.shrink(
                    cache, i, past=self.past, fed=length, ran=self.lengths[i], valid=self.valids[i],
                    remask=self.holes, shift=self.shift,
                )  # fmt: skip

    def report(self) -> Last:
        """What `Handle.last` shows."""
        batch, length = self.host.shape
        c = self.compaction
        if c is None:
            index = torch.arange(length, device=self.code.device).expand(batch, -1)
            c = Compaction(index, None, index)
        return Last(c.index, c.valid, c.src, self.results, self.lengths, self.notes, self.clocks)


class _Clock:
    """Seconds between start and stop, without making the host wait for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self.begin = time.perf_counter()
        if self.events:
            self.events[0].record()

    def stop(self) -> _Clock:
        self.end = time.perf_counter()
        if self.events:
            self.events[1].record()
        return self

    def seconds(self) -> float:
        if not self.events:
            return self.end - self.begin
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def _check(stage: Stage, views: list[Visual], answers: list[Assignment]) -> None:
    """Raise unless every answer is a selection of its budget; one transfer to the host for all units."""
    name = stage.method.name or type(stage.method).__name__
    steps = []
    for view, answer in zip(views, answers):
        if not isinstance(answer, Assignment) or answer.idx.dim() != 1 or answer.idx.dtype != torch.int64:
            raise VtpruneError(f"{name} must answer an Assignment with idx [K] int64, not {answer!r:.80}")
        count = answer.idx.shape[0]
        if view.budget is not None and count != view.budget:
            raise VtpruneError(f"{name} kept {count} tokens of {view.n}, but its budget is {view.budget}")
        steps.append(torch.cat([answer.idx[:1] + 1, answer.idx.diff(), view.n - answer.idx[-1:]]))
    if steps and not bool((torch.cat(steps) > 0).all()):
        i = next(i for i, step in enumerate(steps) if not bool((step > 0).all()))
        raise VtpruneError(
            f"{name} answered idx={answers[i].idx.tolist()!r:.80} for a unit of {views[i].n} tokens: kept positions "
            f"must be distinct, ascending and within 0..{views[i].n - 1}; sort them (Assignment.order holds pick order)"
        )


def _cut_any(value: Any, c: Compaction) -> Any:
    """Position ids ([.., B, L]) or rotary embeddings ([.., B, L, d], in tuples or dicts) of a layer."""
    if isinstance(value, tuple):
        return tuple(_cut_any(v, c) for v in value)
    if isinstance(value, dict):
        return {k: _cut_any(v, c) for k, v in value.items()}
    if not torch.is_tensor(value):
        return value
    return c.cut(value, -2 if value.is_floating_point() else -1)


def _joined_spans(group: list[Alive]) -> tuple[Span, ...]:
    """Spans of several whole units side by side; none once a unit was cut."""
    if not all(a.whole for a in group):
        return ()
    spans, start = [], 0
    for a in group:
        spans += [Span(s.start + start, s.grid, s.newline) for s in a.unit.spans]
        start += a.unit.n
    return tuple(spans)


def _frames(a: Alive) -> list[Alive]:
    """The frames of a video as units of their own (an image is its own single frame)."""
    grid = a.unit.grid or (a.unit.spans[0].grid if len(a.unit.spans) == 1 and not a.unit.spans[0].newline else None)
    if not a.whole or grid is None or grid[0] <= 1:
        return [a]
    t, h, w = grid
    each, flat = h * w, torch.cat([torch.arange(s, s + m) for s, m in a.unit.ranges])
    frames = []
    for start in range(0, t * each, each):
        part = flat[start : start + each]
        signals = {k: v[start : start + each] for k, v in a.unit.signals.items()}
        runs = [(int(part[0]), each)] if int(part[-1]) - int(part[0]) == each - 1 else [(int(p), 1) for p in part]
        unit = Unit(a.unit.row, a.unit.modality, runs, (Span(0, (1, h, w)),), signals)
        frames.append(Alive(unit, part.to(a.positions.device), torch.arange(each, device=a.positions.device)))
    return frames
