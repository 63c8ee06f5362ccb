"""`Frame`: the pruning of one forward pass, from units to one `Compaction`; `Last`: what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import cache as kv
from .clock import Clock, capturing
from .compact import Compaction, hidden_like, mask_for, tensor_mask, visible
from .framing import clips_seen, clips_told
from .kernels import (
    Arriving,
    Verdict,
    compact,
    deferring,
    full_precision,
    recording,
    to_device,
)
from .kernels.dispatch import Backend
from .model_adapters.generic import MODALITIES, Adapter, Features, Unit, runs_of
from .recall import Recall, pick
from .signals import LayerAttention, kind_of
from .types import KEPT, Assignment, Signal, Span, Stage, UnsupportedCall, Visual, Where, ask
from .units import Alive, arange_of, begin, emptied, groups, kept_by_crop

LINEAR = "linear_attention"  # the kind of layer whose memory is a state and no keys
WORDLESS = "no text stands behind the image of a row: its last token is asked in place of that text"
GRIDLESS = "features were encoded elsewhere: image grids are unknown, every run of tokens is a unit"
# Arguments of text models that have the sequence length and no say in which tokens are visual.
CUT_AS_IDS = ("token_type_ids", "mm_token_type_ids")
OF_THE_HEAD = ("labels", "shift_labels", "logits_to_keep", "num_items_in_batch")  # as long as logits are again
CUT_BEFORE = ("attention_mask", "position_ids", "inputs_embeds", "deepstack_visual_embeds", "visual_pos_masks")


@dataclass(frozen=True)
class UnitResult:
    """What one stage did to one unit, also where it kept all of it and the method was not asked.

    positions: [K] int64, kept positions in the row as fed. idx: [K] the same counted inside the unit's n tokens as
    the stage found them. order: [K] pick order, or None. scores: [n] or None. spans, grid: rasters of the unit.
    image: number of the image in the batch; part: number of the crop or frame in it, None for the whole.
    seen: [n] int64, where the tokens that the stage found stand in the row as fed; None inside the vision tower.
    With per="sample" a row is one unit, also where the method saw its clips one by one.
    """

    row: int
    image: int
    part: int | None
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
    seen: Tensor | None = None

    @property
    def kept_by_crop(self) -> list[int]:
        """Kept tokens in each crop of the unit, newlines not counted; waits for the device."""
        return kept_by_crop(self.spans, self.n, self.idx)


@dataclass(frozen=True)
class Last:
    """What the last prefill kept. Of packed rows every sample is a row of its own here, left-padded to the longest.

    index: [B, n] int64 positions in the rows as fed, after all stages. valid: [B, n] bool or None (no padding).
    src: [B, L] int64, the slot that answers for each position fed. units: one `UnitResult` per unit and stage of which
    the method was asked; where a stage leaves all units whole, these.
    lengths: tokens each decoder layer ran on. said: fallbacks that were used, see `notes`. policies: how each stage
    dealt out its budget. kernels: which implementation of each kernel ran, "reference" or "triton".
    tower_units, tower_lengths: if stages stand inside the vision tower, what each did to each crop (or packed image):
        `row` is the row of the tower's batch, `image` the crop's number, `positions` are its tokens; and by modality
        the rows each block ran on, of its longest crop (of all images where the tower packs them). `units` then starts
        with what all of them together left of each image.
    heads: of stages that choose among heads, by layer: for each row [K] int64 the query heads that speak behind it.
    recalled: of stages that act at decode, by layer: for each row the positions as fed [K] of the visual tokens that
        the last decode step saw there; empty before the first step that chose.
    images, together: every image and video of the rows as fed, cut or not: where its tokens stand, and their rasters;
        and which of them shared a budget.
    """

    index: Tensor
    valid: Tensor | None
    src: Tensor
    units: list[UnitResult]
    lengths: list[int]
    said: list[str]
    policies: list[str]
    kernels: dict[str, Backend]
    clocks: list[Clock] = field(default_factory=list, repr=False)
    tower_units: list[UnitResult] = field(default_factory=list)
    tower_lengths: dict[str, list[int]] = field(default_factory=dict)
    recalled: dict[int, list[Tensor]] = field(default_factory=dict)
    heads: dict[int, list[Tensor]] = field(default_factory=dict)
    images: list[Unit] = field(default_factory=list, repr=False)
    together: list[int] = field(default_factory=list, repr=False)

    @cached_property
    def notes(self) -> list[str]:
        """Fallbacks that were used, and how many frames or crops a budget left empty; on a GPU this waits for it."""
        return [*self.said, *(emptied(self.images, self.together, self.index, self.valid))]

    @classmethod
    def untouched(cls, embeds: Tensor, depth: int, note: str) -> Last:
        """Of a call of embeddings [B, L, D] in which nothing was visual, as far as could be told."""
        batch, length = embeds.shape[:2]
        index = torch.arange(length, device=embeds.device).expand(batch, -1)
        return cls(index, None, index, [], [length] * depth, [note], [], {})

    @property
    def seconds(self) -> float:
        """Time spent in methods and in reading their signals; on a GPU this waits for them."""
        return sum(clock.seconds() for clock in self.clocks)


# A merge in a row: the slots of a unit's tokens when a stage saw them, and the answer.
Merge = tuple[int, Tensor, Assignment]


@dataclass
class Frame:
    """One forward pass of the text model. `code` is [B, L] int8 on the device: 1 text, 2.. visual, 0 padding, and -1
    tokens behind the end of the prompt, which stay and are not asked: what greedy decoding would not know yet.
    """

    adapter: Adapter
    stages: list[Stage]
    code: Tensor
    opened: bool = False
    past: int = 0
    behind: int = 0  # tokens of this call behind the end of the prompt
    cache: Any = None
    compaction: Compaction | None = None
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    alive: list[Alive] = field(default_factory=list)
    results: list[UnitResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    valids: list[Tensor | None] = field(default_factory=list)
    shift: Tensor | None = None
    lags: list[Tensor | None] = field(default_factory=list)
    clips: dict[tuple[int, ...] | None, list[int]] = field(default_factory=dict)
    state: dict[int, dict[str, Any]] = field(default_factory=dict)
    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    embedded: dict[str, list[Tensor]] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    clocks: list[Clock] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    inner: Compaction | None = None
    inner_cuts: list[tuple[list[Merge], Compaction]] = field(default_factory=list)
    kernels: dict[str, Backend] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    tower_units: list[UnitResult] = field(default_factory=list)
    tower_lengths: dict[str, list[int]] = field(default_factory=dict)
    recalls: dict[int, Recall] = field(default_factory=dict)
    said: dict[str, Tensor] = field(default_factory=dict)  # signals of heads [B, H], by kind
    heads: list[Tensor | None] = field(default_factory=list)
    speaking: dict[int, list[Tensor]] = field(default_factory=dict)

    # -- setting up -------------------------------------------------------------------------------------------------

    def foresee(self, call: dict[str, Any], prompt: int | None = None) -> None:
        """From the arguments of the base model: send what the host must know on its way while the tower runs.

        prompt: tokens up to the end of the prompt, those of earlier calls included, where `generate` told.
        """
        length = self.code.shape[1]
        self.cache = call.get(kv.NAME)
        self.past = int(self.cache.get_seq_length()) if self.cache is not None else 0
        real = self._real(call.get("attention_mask"), length)
        self.behind = 0 if prompt is None else min(length - 1, max(0, self.past + length - prompt))
        if self.behind:
            self.code = torch.cat([self.code[:, : -self.behind], -self.code[:, -self.behind :]], 1)
        named = self.code
        if real is not None:
            self.code = self.code * real[:, -length:]
        seen = () if real is None else (real[:, -length:].to(named), real[:, :-length].to(named))
        self._arriving = Arriving(torch.cat([named, *seen], dim=1))
        if self.by_clip:
            ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
            # Equal words have equal embeddings.
            self._words_arriving = Arriving(ids if ids is not None else embeds.double().sum(-1))  # type: ignore

    def open(self, call: dict[str, Any], features: dict[str, Features | None], inert: bool = False) -> None:
        """Make the units. Their indices are made on the device, so nothing here waits for it.

        inert: all tokens stay, so that nothing is refused for what cannot be known of them.
        """
        embeds = call["inputs_embeds"]
        batch, length = embeds.shape[:2]
        if self.code.shape != (batch, length):
            raise UnsupportedCall(
                f"the base model saw {tuple(self.code.shape)} tokens and hands {(batch, length)} to its text model: "
                "this call shape is not supported"
            )
        named, seen, past = self._arriving.read().tensor_split([length, 2 * length], dim=1)
        if self.behind and bool((named < -1).any()):  # visual tokens there: this call is about another prompt
            named, self.code, self.behind = named.abs(), self.code.abs(), 0
        self.host = named * seen if seen.shape[1] else named  # tokens that the mask hides are no candidates
        self.holes = bool((self.host == 0).any() or (past == 0).any())
        self.real_past = past.to(self.code.device) != 0 if past.shape[1] else None
        stays = self._staying(named)
        self.keep = (self.code != 0).to(embeds.device) if stays is self.host else (stays != 0).to(embeds.device)
        self.units = self._units(named, features, inert)
        brought = [m for m in self.modalities() if (known := features.get(m)) is None or known.elsewhere]
        if brought:
            if not inert:
                self._check_runs()
            if any(u.modality in brought and not u.spans for u in self.units):
                self.notes.append(GRIDLESS)
        self.alive = [begin(u, i, embeds.device) for i, u in enumerate(self.units)]
        if self.units and not inert and bool(((named > 1) & (self.host == 0)).any()):
            self._leave_out_hidden()
        for modality, found in features.items():
            if found is None:
                continue
            self.clocks += found.clocks
            self.kernels |= found.kernels
            if found.tower is not None:
                self.tower_units += found.tower.results
                self.notes += found.tower.notes
                self.tower_lengths[modality] = found.tower.lengths
        self.counts = (stays != 0).sum(1).tolist()
        self.others = sum(self.counts) - int((self.host > 1).sum())
        self.text = [runs_of(row == 1) for row in self.host]
        depth = len(self.adapter.layers)
        self.lengths, self.valids, self.lags = [length] * depth, [None] * depth, [None] * depth
        self.heads = [None] * depth
        self.dtype, self.opened = embeds.dtype, True

    def _units(self, named: Tensor, features: dict[str, Features | None], inert: bool) -> list[Unit]:
        """Images and videos of this call; none where all tokens stay and the call shows a part of an image only."""
        try:
            return self.adapter.units(named, features)
        except UnsupportedCall:
            if not inert:
                raise
            return []

    def _staying(self, named: Tensor) -> Tensor:
        """[B, L] on the host, 0 at what goes with the first cut: padding and hidden tokens, which nobody sees.

        The state of linear attention fades over hidden words within a row, so these stay, hidden.
        """
        if LINEAR not in self.adapter.layer_types or not self.holes:
            return self.host
        seen = (self.host != 0).int()
        inside = (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1).flip(1) > 0)
        return torch.where(inside & (named.abs() == 1), named, self.host)

    def _leave_out_hidden(self) -> None:
        """Images and their parts without the tokens that the attention mask hides: budgets count what is seen."""
        for stage in (s for s in self.stages if not isinstance(s.where, tuple) and s.method.of == "tokens"):
            self.alive, _ = groups(self.alive, stage)
        for a in self.alive:
            seen = self.host[a.row].index_select(0, a.positions.cpu()) != 0
            a.keep(to_device(seen.nonzero().flatten(), a.positions.device))
            a.n = a.m

    def _real(self, mask: Any, length: int) -> Tensor | None:
        """[B, past + L] or [B, L] bool: which tokens are no padding, as far as the mask tells."""
        if isinstance(mask, dict):
            mask = mask.get("full_attention")
        if not torch.is_tensor(mask):
            return None
        if mask.dim() == 4:
            start = self._past_columns(mask, 0, length)
            return visible(mask[..., start : start + length]).expand(self.code.shape[0], -1).to(self.code.device)
        return (mask[:, : self.past + length] != 0).to(self.code.device)

    def _check_runs(self) -> None:
        """Features of unknown origin come without sizes, so a part of an image must be told by where it stands."""
        first = [int(row.nonzero()[0, 0]) if row.any() else 0 for row in self.host]
        starts = self.past > 0 and any(row[i] > 1 for row, i in zip(self.host, first))
        if starts or bool((self.host[:, -1 - self.behind] > 1).any()):
            raise UnsupportedCall(
                "this call ends or goes on inside an image, as chunked prefill does, so a method would see only a part "
                "of it: set prefill_chunk_size=None"
            )

    def modalities(self) -> list[str]:
        """Modalities that occur in this batch."""
        return [m for m in MODALITIES if any(u.modality == m for u in self.units)]

    # -- running stages ---------------------------------------------------------------------------------------------

    def run_stages(self, where: Where, hidden: Tensor) -> bool:
        """Run the stages at `where` on hidden [B, n, D] (n = current slots). True if tokens were dropped."""
        self.hidden, self.merges = hidden, []
        before = sum(self.counts)
        if where == "llm":
            self._drop_unseen()
        for number, stage in enumerate(self.stages):
            if stage.where != where or "prefill" not in stage.method.phases:
                continue
            if stage.method.of == "heads":
                self._run_heads(number, stage)
            else:
                self._run(number, stage)
        if sum(self.counts) == before:
            return False
        if isinstance(where, int):  # before the LLM, one kernel cuts everything at once: `cut_call`
            self._compact(where)
        return True

    def keep_all(self) -> None:
        """Show the units of every stage, where all tokens stay: they are whole, and no method is asked."""
        stages = [s for s in self.stages if "prefill" in s.method.phases and s.method.of == "tokens"]
        later = [s for s in stages if not isinstance(s.where, tuple)]
        for stage in later or stages[-1:]:  # what the tower left shows in the stages behind it
            first = len(self.results)
            for group in groups(self.alive, stage, self._clips(stage))[1]:
                self._take_all(stage, group)
            if stage.per == "sample":
                self.results[first:] = _joined_by_row(self.results[first:])

    def _drop_unseen(self) -> None:
        """Drop what stages in the vision tower dropped: the encoder's output repeats kept tokens in its place."""
        tower = [s for s in self.stages if isinstance(s.where, tuple)]
        if not tower:
            return
        later = [s for s in self.stages if not isinstance(s.where, tuple) and s.method.of == "tokens"]
        for stage in later if any(KEPT in unit.signals for unit in self.units) else ():
            self.alive, _ = groups(self.alive, stage)
        # Newlines (-1) never were in the tower: they stay to compete, or go with the first token that goes.
        no_newlines = any(s.newlines == "drop" for s in tower)
        place = self.tower_units[-1].where if self.tower_units else tower[-1].where
        for a in self.alive:
            kept = a.unit.signals.get(KEPT)
            if kept is None or not bool((kept == 0).any()):
                if not later and not a.separator:
                    self._take_all(tower[-1], [a], place)
                continue
            stays = kept == 1 if no_newlines else kept != 0
            stays = stays if a.n == a.unit.n else stays[a.origin.cpu()]
            idx = to_device(stays.nonzero().flatten(), a.positions.device)
            if not a.separator:
                self.results.append(
                    UnitResult(
                        a.row, a.image, a.part, a.unit.modality, tower[-1].method.name, place, a.m,
                        a.positions.index_select(0, idx), idx, None, None, a.spans, a.grid, Assignment(idx),
                        a.positions,
                    )
                )  # fmt: skip
            self._shrink(a, idx)

    def _run(self, number: int, stage: Stage) -> None:
        self.alive, units = groups(self.alive, stage, self._clips(stage))
        budgets = self._budgets(stage, units)
        todo = [i for i, group in enumerate(units) if (k := budgets[i]) is None or k < sum(a.m for a in group)]
        views = [self._visual(number, stage, units[i], budgets[i]) for i in todo]
        asked = dict(zip(todo, zip(views, self._ask(stage, views) if views else ())))
        first = len(self.results)
        for i, (view, answer) in asked.items():
            self._take(stage, units[i], view, answer)
            note = view.state.get("note")
            if note and note not in self.notes:
                self.notes.append(note)
        for group in units if not asked else ():
            self._take_all(stage, group)
        if stage.per == "sample":  # a method may have seen the clips of a row one by one
            self.results[first:] = _joined_by_row(self.results[first:])
        if stage.newlines == "drop":
            touched = {(a.row, a.image) for i in todo for a in units[i]}
            for a in self.alive:
                if a.separator and (a.row, a.image) in touched:
                    self._shrink(a, a.positions[:0])

    def _clips(self, stage: Stage) -> list[int] | None:
        """The clip of every image, for a stage that sees samples: as the user counts them, or as frames are told."""
        if stage.per != "sample" or not self.units or not (stage.clips or self.by_clip):
            return None
        if stage.clips not in self.clips:
            if stage.clips:
                self.clips[stage.clips] = clips_told(self.units, len(self.host), stage.clips)
            else:
                self.clips[None] = clips_seen(self.units, self._words_arriving.read().tolist())
        return self.clips[stage.clips]

    @property
    def by_clip(self) -> bool:
        """True if a stage compares the frames of a sample: then what stages see of a sample are its clips."""
        return any(s.per == "sample" and s.method.video for s in self.stages)

    def _ask(self, stage: Stage, views: list[Visual]) -> list[Assignment]:
        """What the method answers, checked."""
        clock = Clock(self.hidden.device)
        with deferring() as checks, recording(self.kernels), full_precision(self.hidden.device):
            answers = ask(stage, views)
        self.clocks.append(clock.stop())
        if not capturing(self.hidden.device):  # a CUDA graph replays what its warm-up run has checked
            self.verdicts.append(Verdict(checks))
        # On a GPU the methods of this package, which never answer out of range, are judged when the LLM is under way.
        if not self.hidden.is_cuda or not stage.method.trusted:
            self.settle()
        return answers

    def _run_heads(self, number: int, stage: Stage) -> None:
        """Let the method choose heads in every row with visual tokens; the others are silent from this layer on."""
        k, output = stage.where, next(iter(self.said.values()))
        assert isinstance(k, int)
        count = output.shape[1]
        every = torch.arange(count, device=output.device)
        speaking = list(next(reversed(self.speaking.values()), [every] * len(self.host)))
        budget = stage.budgets([count])[0]
        rows = [i for i, row in enumerate(self.host) if (row > 1).any()]
        rows = [i for i in rows if budget is None or budget < len(speaking[i])]
        if not rows:
            return
        state, views = self.state.setdefault(number, {}), []
        for i in rows:
            signals = {need: self.said[need.kind][i].index_select(0, speaking[i]) for need in stage.method.needs}
            views.append(Visual(output.new_zeros(len(speaking[i]), 0), budget, signals=signals, state=state))
        before = self.heads[k]
        if before is None and self.cache is not None:  # rows without an image in this turn
            before = getattr(kv.state(self.cache, k), "heads", None)
        heads = torch.ones_like(output, dtype=torch.bool) if before is None else before.to(output.device, copy=True)
        for i, answer in zip(rows, self._ask(stage, views)):
            speaking[i] = speaking[i].index_select(0, answer.idx)
            heads[i].fill_(False).index_fill_(0, speaking[i], True)
        self.speaking[k] = speaking
        self.heads[k:] = [heads] * len(self.heads[k:])

    def read_heads(self, kinds: Iterable[str], out: Tensor) -> None:
        """Keep signals of what each head says in one layer: out [B, n, H, d], its output before the projection."""
        real = self.real().to(out.device)
        for known in map(kind_of, kinds):
            found, before = known(out, real), self.said.get(known.name) if known.so_far else None
            self.said[known.name] = found if before is None else before.to(out.device) + found

    def settle(self) -> None:
        """Raise what the checks of the stages found; the caller gets no answer that was computed from bad input."""
        while self.verdicts:
            self.verdicts.pop(0).settle()

    def _budgets(self, stage: Stage, units: list[list[Alive]]) -> list[int | None]:
        """Budgets of the units, row by row."""
        budgets: list[int | None] = [None] * len(units)
        for row in range(len(self.host)):
            mine = [i for i, group in enumerate(units) if group[0].row == row]
            dealt = stage.budgets([sum(a.n for a in units[i]) for i in mine]) if mine else []
            for i, budget in zip(mine, dealt):
                budgets[i] = budget
        return budgets

    def _visual(self, number: int, stage: Stage, group: list[Alive], budget: int | None) -> Visual:
        row = group[0].row
        one = group[0] if len(group) == 1 else None
        positions, order = _tokens(group)
        slots = self._slots(row, positions)
        if one and one.run and self.compaction is None:
            start, length = one.run
            x = self.hidden[row, start : start + length]
        else:
            x = self.hidden[row].index_select(0, slots.to(self.hidden.device))
        signals: dict[Signal, Tensor] = {}
        for need in stage.method.needs:
            if need.kind in self.embedded:
                signals[need] = self.embedded[need.kind][row]
            elif isinstance(stage.where, int):
                rows = self.rows[need.kind, stage.where + need.offset][row].index_select(0, slots)
                signals[need] = rows[..., : self._words(row)] if kind_of(need).per_word else rows
            elif all(need in a.unit.signals for a in group):
                joined = torch.cat([a.unit.signals[need].to(a.origin.device).index_select(0, a.origin) for a in group])
                signals[need] = joined if order is None else joined.index_select(0, order)
        return Visual(
            x=x,
            budget=budget,
            grid=one.grid if one else None,
            spans=one.spans if one else _joined_spans(group),
            video=stage.per == "sample" or group[0].unit.modality == "video",
            signals=signals,
            text=self._text(row, stage.where),
            state=self.state.setdefault(number, {}),
        )

    def _slots(self, row: int, positions: Tensor) -> Tensor:
        """Where tokens stand in the current hidden states."""
        return positions if self.compaction is None else self.compaction.src[row].index_select(0, positions)

    def _text(self, row: int, place: Where) -> Tensor:
        key = ("text", row, place)
        if key not in self.memo:
            where = arange_of(self.text[row], self.hidden.device)
            self.memo[key] = self.hidden[row].index_select(0, self._slots(row, where))
        return self.memo[key]

    def _take(self, stage: Stage, group: list[Alive], view: Visual, answer: Assignment) -> None:
        row, (positions, order) = group[0].row, _tokens(group)
        if answer.merges:
            with recording(self.kernels):
                merged = answer.apply(view.x)
            slots = self._slots(row, positions).to(self.hidden.device)
            places = slots.index_select(0, answer.idx)
            self.hidden = self.hidden.index_put((torch.full_like(places, row), places), merged)
            self.merges.append((row, slots, answer))
        first = group[0]
        self.results.append(
            UnitResult(
                row, first.image, first.part, first.unit.modality, stage.method.name, stage.where, view.n,
                positions.index_select(0, answer.idx), answer.idx, answer.order, answer.scores, view.spans, view.grid,
                answer, positions,
            )
        )  # fmt: skip
        if len(group) == 1:
            self._shrink(first, answer.idx)
            return
        chosen = answer.idx if order is None else order.index_select(0, answer.idx).sort().values
        for a, start in zip(group, list(accumulate((a.m for a in group), initial=0))):
            # How many tokens each member keeps is known to the device alone.
            self._shrink(a, chosen[(chosen >= start) & (chosen < start + a.m)] - start)

    def _take_all(self, stage: Stage, group: list[Alive], where: Where | None = None) -> None:
        """Note a unit that keeps all it has, of which the method is not asked."""
        first, one = group[0], group[0] if len(group) == 1 else None
        positions = _tokens(group)[0]
        idx = torch.arange(len(positions), device=positions.device)
        self.results.append(
            UnitResult(
                first.row, first.image, first.part, first.unit.modality, stage.method.name,
                stage.where if where is None else where, len(idx), positions, idx, None, None,
                one.spans if one else _joined_spans(group), one.grid if one else None, Assignment(idx), positions,
            )
        )  # fmt: skip

    def _shrink(self, a: Alive, idx: Tensor) -> None:
        """Cut one member of a unit down to its tokens idx [K]."""
        self.counts[a.row] += idx.shape[0] - a.m
        keep = self.keep[a.row]
        keep.index_fill_(0, a.positions, False)
        a.keep(idx)
        keep.index_fill_(0, a.positions, True)

    def _compact(self, where: int) -> None:
        """One cut from the rows as fed to what is alive now; `self.cut_now` is the cut of the current slots."""
        whole = Compaction.of(self.keep, self.counts)
        if self.compaction is None:
            self.cut_now = whole
        else:
            old = self.compaction.index
            now = self.keep.gather(1, old)
            now = now if self.compaction.valid is None else now & self.compaction.valid
            self.cut_now = Compaction.of(now, self.counts)
        self._set(whole, where)

    def _set(self, whole: Compaction, first: int) -> None:
        if whole.valid is not None and self.past and LINEAR in self.adapter.layer_types:
            raise UnsupportedCall(
                f"rows keep different numbers of tokens ({self.counts}) behind a cache, and the linear-attention "
                f"layers of {self.adapter.model_type} would run over the padding between: continue the rows one by one"
            )
        self.compaction = whole
        for i in range(first, len(self.lengths)):
            self.lengths[i], self.valids[i] = whole.n, whole.valid

    # -- cutting arguments ------------------------------------------------------------------------------------------

    def cut_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Every argument of the text model that has the sequence length, cut; in one launch, but for 4-D masks."""
        embeds, device = self.hidden, self.hidden.device
        mask, ids = call.get("attention_mask"), call.get("position_ids")
        flat = mask.to(device) if torch.is_tensor(mask) and mask.dim() == 2 else None
        where, deepstack = call.get("visual_pos_masks"), call.get("deepstack_visual_embeds")
        fused = where is not None and deepstack is not None and not self.merges
        visual, layers = None, []
        if fused:
            visual = (where[..., 0] if where.dim() == 3 else where).to(device)  # type: ignore
            layers = [layer.to(device) for layer in deepstack]  # type: ignore
        if ids is None:
            ids = torch.arange(embeds.shape[1], device=device)[None] + self.past
        with recording(self.kernels):
            cut = compact(
                self.keep, self.counts, embeds, ids.to(device), flat,
                past=0 if flat is None else flat.shape[1] - embeds.shape[1],
                visual=visual,
                deepstack=layers,
                kept_visual=sum(self.counts) - self.others,
            )  # fmt: skip
        self._set(Compaction(cut.index, cut.valid, cut.src), 0)
        assert cut.position_ids is not None
        new = {**call, "inputs_embeds": cut.hidden, "position_ids": self.positions(cut.position_ids)}
        if flat is not None:
            new["attention_mask"] = cut.mask
        elif isinstance(mask, dict):
            made = {LINEAR: self.compaction.valid if self.compaction else None}  # it knows padding only
            new["attention_mask"] = {
                k: self.cut_mask(m) if m is not None else made[k] if k in made else self.causal_mask()
                for k, m in mask.items()
            }
        else:
            new["attention_mask"] = self.cut_mask(mask)
        if fused:
            new["deepstack_visual_embeds"], new["visual_pos_masks"] = cut.deepstack, cut.visual
        else:
            self.cut_deepstack(new)
        self.cut_rest(new)
        return new

    def positions(self, cut: Tensor) -> Tensor:
        """Position ids of the kept tokens: the original ones as cut, or renumbered (positions="compact")."""
        c = self.compaction
        assert c is not None
        if any(not isinstance(s.where, int) and s.compact for s in self.stages):
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

    def causal_mask(self, layer: int | None = None) -> Tensor | None:
        """The mask of a layer that was given none, where rows hold padding now: [B, K] for flash, else 4-D.

        layer: one behind a stage inside the LLM; None for what the text model is given for all of a kind.
        """
        assert self.compaction is not None
        valid = self.compaction.valid
        if valid is None:
            return None
        i = kv.reference_layer(self.cache) if layer is None else layer
        held = getattr(self.cache, "layers", ())
        stored, room = self.past_at(i), held[i].max_cache_len if i < len(held) and kv.is_static(held[i]) else 0
        key = ("causal", len(self.results), stored, room)
        if key not in self.memo:
            keys = torch.nn.functional.pad(valid, (stored, 0), value=True)
            if (before := getattr(kv.state(self.cache, i), "valid", None)) is not None:
                keys[:, : before.shape[1]] = before
            mask = mask_for(self.adapter.attention(), keys, valid.shape[1], self.dtype)
            if mask.dim() == 4 and room:  # what a static layer hands out is as wide as all it has room for
                rest = hidden_like(mask, (*mask.shape[:-1], max(0, room - mask.shape[-1])))
                mask = torch.cat([mask, rest], dim=-1)
            self.memo[key] = mask
        return self.memo[key]

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
        assert self.compaction is not None
        cuts = [(self.merges, self.compaction)]
        cut = [_cut_features(where, layer, cuts) for layer in embeds]
        call["deepstack_visual_embeds"], call["visual_pos_masks"] = [rows for _, rows in cut], cut[0][0]

    def cut_features(self, where: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [S, D] of the True positions of where [B, L] as the text model has them, for the layer running."""
        return _cut_features(where, features, self.inner_cuts) if self.inner_cuts else (where, features)

    def cut_rest(self, call: dict[str, Any]) -> None:
        """Known arguments of sequence length; an unknown one would go out of step, so it is refused."""
        c = self.compaction
        assert c is not None
        for name, value in call.items():
            if not torch.is_tensor(value) or value.dim() < 1 or name in CUT_BEFORE or name in OF_THE_HEAD:
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

    def run_layer(self, i: int, hidden: Tensor, ids: Tensor | None, rope: Any = None) -> Tensor:
        """Hidden states entering layer i, after the stages there.

        ids, rope: position ids and rotary embeddings as the text model was given them.
        """
        here = [s for s in self.stages if s.where == i]
        if not here:
            return hidden
        recall = self._remember(i, hidden, rope, [s for s in here if "decode" in s.method.phases])
        hidden = self._run_layer(i, hidden, ids)
        if recall is not None:
            self._remembered(i, recall)
        return hidden

    def _run_layer(self, i: int, hidden: Tensor, ids: Tensor | None) -> Tensor:
        before, real = self._ids_at(i, ids), self._real_slots()
        if not self.run_stages(i, hidden):
            return hidden
        self.inner = self.cut_now if self.inner is None else self.inner.then(self.cut_now)
        self.inner_cuts.append((self.merges, self.cut_now))
        self.rows = {key: self.cut_now.cut(row, 1) for key, row in self.rows.items()}
        if any(s.compact for s in self.stages if s.where == i):
            self._renumber(i, ids, before, real)
        elif (lag := self.lags[i]) is not None:
            self.lags[i:] = [self.cut_now.cut(lag, 1)] * len(self.lags[i:])
        return self.cut_now.cut(self.hidden, 1)

    def _remember(self, i: int, hidden: Tensor, rope: Any, stages: list[Stage]) -> Recall | None:
        """What a stage at layer i that acts at decode will want to know of the visual tokens entering it."""
        if not stages:
            return None
        first = next(iter(self.recalls.values()), None)
        if first is None:
            rows = [[a for a in self.alive if a.row == row] for row in range(len(self.host))]
            counts, totals = [sum(a.m for a in row) for row in rows], [sum(a.n for a in row) for row in rows]
            where = torch.full((len(rows), max(counts)), -1, dtype=torch.int64, device=hidden.device)
            for line, row, n in zip(where, rows, counts):
                line[:n] = torch.cat([line[:0], *(a.positions for a in row)]).sort().values
        else:
            where, counts, totals = first.where, first.counts, first.totals
        if not max(counts):
            return None
        slots = where.clamp(min=0) if self.compaction is None else self.compaction.src.gather(1, where.clamp(min=0))
        entry = slots.masked_fill(where < 0, -1) if first is None else first.entry
        recall = Recall(where, where, slots, counts, totals, entry)
        if any("prefill" in s.method.phases for s in stages):
            recall.hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1])).detach()
            recall.rope = first.rope if first is not None else self._ropes(rope, slots)
        return recall

    def _ropes(self, rope: Any, slots: Tensor) -> tuple[Tensor, ...]:
        """Rotary embeddings [.., B, V, d] of the current slots [B, V]."""
        if not isinstance(rope, tuple) or not all(torch.is_tensor(x) and x.dim() >= 3 for x in rope):
            raise UnsupportedCall(
                f"{self.adapter.model_type} hands its layers no rotary embeddings (cos, sin) of shape [.., B, n, d], "
                "so tokens cannot come back at decode: use a method that acts while the prompt is read"
            )
        rope = rope if self.inner is None else _cut_any(rope, self.inner)
        return tuple(pick(x, slots) for x in rope)

    def _remembered(self, i: int, recall: Recall) -> None:
        """Where what the stages at layer i left is stored from there on, counted in this call alone."""
        c, place = self.compaction, recall.where.clamp(min=0)
        kept = (recall.where >= 0) & self.keep.gather(1, place)
        slots = place if c is None else c.src.gather(1, place)
        recall.slots = slots.masked_fill(~kept, -1)
        if c is None:
            order = torch.arange(self.code.shape[1], device=place.device).where(self.code != 0, -1)
        else:
            order = c.index if c.valid is None else c.index.masked_fill(~c.valid, -1)
        recall.order = order
        self.recalls[i] = recall

    def _real_slots(self) -> Tensor:
        """[B, n] bool: which of the current slots hold no padding."""
        c = self.compaction
        if c is None:
            return self.code != 0
        if self.holes:
            real = c.cut(self.code, 1) != 0
            return real if c.valid is None else real & c.valid.to(real.device)
        return c.valid if c.valid is not None else torch.ones_like(c.index, dtype=torch.bool)

    def real(self) -> Tensor:
        """[B, n] bool: which of the current slots hold tokens of the prompt, and so may be asked."""
        real, c = self._real_slots(), self.compaction
        if not self.behind:
            return real
        return real & ((self.code if c is None else c.cut(self.code, 1)) > 0)

    def _ids_at(self, i: int, ids: Tensor | None) -> Tensor | None:
        """Position ids [B or 1, n] of the current slots at layer i, earlier calls left out of account."""
        if ids is None:
            return None
        cut = ids if self.inner is None else self.inner.cut(ids, -1)
        lag = self.lags[i]
        return cut if lag is None else cut - lag

    def _renumber(self, i: int, ids: Tensor | None, before: Tensor | None, real: Tensor) -> None:
        """positions="compact": from layer i on ids go up by one from the row's first, which is `before` the cut."""
        if ids is None or before is None:
            raise UnsupportedCall(
                f"{self.adapter.model_type} hands its decoder layers no position ids, so they cannot be renumbered "
                "inside the LLM: use positions='keep'"
            )
        last = torch.iinfo(before.dtype).max
        before = before.expand(len(real), -1)
        first = before.masked_fill(~real.to(before.device), last).amin(1, keepdim=True)
        real = self._real_slots().to(before.device)
        compact = (first + real.cumsum(1) - 1).clamp(min=0)
        assert self.inner is not None
        self.lags[i:] = [self.inner.cut(ids, -1) - compact] * len(self.lags[i:])

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
        elif c.valid is not None and self.adapter.layer_types[i] == LINEAR:
            call["attention_mask"] = c.valid
        elif c.valid is not None:
            call["attention_mask"] = self.causal_mask(i)

    def past_at(self, layer: int) -> int:
        """Tokens of earlier calls that a layer of the cache stores."""
        return self.past - getattr(kv.state(self.cache, layer), "dropped", 0) if self.cache is not None else 0

    def _once(self, value: Any, cut: Any) -> Any:
        """Layers share their arguments: cut each object once per stage (and keep it alive while its id is a key)."""
        key = (id(value), len(self.results))
        if key not in self.memo:
            self.memo[key] = (value, cut(value))
        return self.memo[key][1]

    def read_rows(
        self, kind: str, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Keep a signal of this layer's attention, [B, n, ...] for the slots of this call."""
        known, clock = kind_of(kind), Clock(q.device)
        with recording(self.kernels):
            found = known(LayerAttention(q, k, v, mask, scaling, self.past_at(layer), self))
            before = self.rows.pop((kind, layer - 1), None) if known.so_far else None  # read by now, if a stage did
            self.rows[kind, layer] = found if before is None else found + before.to(q.device)
        self.clocks.append(clock.stop())

    def read_module(self, kind: str, layer: int, before: Tensor, after: Tensor) -> None:
        """Add a signal of what one module of a layer does to its tokens, before and after [B, n, D]."""
        clock = Clock(before.device)
        found = kind_of(kind)(before, after, self.real().to(before.device))
        self.rows[kind, layer] = self.rows[kind, layer] + found if (kind, layer) in self.rows else found
        self.clocks.append(clock.stop())

    # -- what signals may ask of the prompt (`vtprune.signals.Prompt`) ------------------------------------------------

    @property
    def batch(self) -> int:
        """How many rows the batch has."""
        return len(self.host)

    def visual(self) -> Tensor:
        """[B, n] bool: which of the current slots hold visual tokens."""
        c = self.compaction
        visual = (self.code if c is None else c.cut(self.code, 1)) > 1
        return visual if c is None or c.valid is None else visual & c.valid.to(visual.device)

    def visual_slots(self, row: int) -> Tensor:
        """Current slots of the row's visual tokens, image by image."""
        mine = [a.positions for a in self.alive if a.row == row]
        return self._slots(row, torch.cat(mine) if mine else self.hidden.new_zeros(0).long())

    def text_slots(self, row: int, device: torch.device) -> Tensor:
        """Current slots of the text behind the row's first visual token."""
        return self._slots(row, arange_of(self._text_behind(row), device))

    def text_is_seen(self, row: int) -> bool:
        """False if all visual tokens of the row stand before that text."""
        behind, seen = self._text_behind(row), runs_of(self.host[row] > 1)
        return bool(seen and behind and behind[0][0] <= seen[-1][0])

    def _words(self, row: int) -> int:
        """Number of tokens of that text."""
        return sum(length for _, length in self._text_behind(row))

    def read_embeds(self, kind: str, x: Tensor) -> None:
        """Keep a signal of what enters the first layer, x [B, n, D]: a tensor for each row."""
        self.embedded[kind] = kind_of(kind)(x, self)

    def read_places(self, kind: str, layer: int, rope: tuple[Tensor, Tensor]) -> None:
        """Keep a signal of the rotary embeddings (cos, sin) [B or 1, n, d] of a layer."""
        self.rows[kind, layer] = kind_of(kind)(*rope, self)

    def _text_behind(self, row: int) -> list[tuple[int, int]]:
        """Runs of the text behind the row's first visual token; its last token, if the prompt ends with an image."""
        seen = runs_of(self.host[row] > 1)
        behind = [run for run in self.text[row] if seen and run[0] > seen[0][0]]
        if seen and not behind:
            if WORDLESS not in self.notes:
                self.notes.append(WORDLESS)
            return [(self.host.shape[1] - 1 - self.behind, 1)]
        return behind

    def last(self, n: int) -> Tensor:
        """[B] where the last token of the prompt stands among n slots."""
        if self.compaction is not None:  # pads were dropped: rows end with a real token
            return torch.full((len(self.host),), n - 1 - self.behind)
        position = torch.arange(1, self.host.shape[1] + 1)
        return ((self.host > 0) * position).amax(1) - 1

    # -- closing ----------------------------------------------------------------------------------------------------

    def check_cache(self, cache: Any) -> None:
        """Refuse a cache that cannot hold what this call would leave on it."""
        cache = self.cache if cache is None else cache
        back = any(recall.hidden is not None for recall in self.recalls.values())
        if back and any(kv.is_static(layer) for layer in getattr(cache, "layers", ())):
            raise UnsupportedCall(
                "a static cache has no room for tokens that come back at decode: use the default dynamic cache"
            )

    def shrink_cache(self, cache: Any) -> None:
        """Let every layer of the cache answer for what it did not store."""
        length = self.host.shape[1]
        lags = {id(lag): lag[:, -1] for lag in self.lags if lag is not None}  # rows end with a real token
        first = min(self.recalls, default=0)
        befores = {i: self._stored_before(cache, i) for i in self.recalls}
        entered = self.past_at(first - 1) if self.recalls else 0
        reference, tail = kv.reference_layer(cache), self._text_at_end()
        for i in range(min(len(cache.layers), len(self.lengths))):
            kv.shrink(  # layers that were not cut as well: none may be cropped where another refuses
                cache, i, past=self.past, fed=length, ran=self.lengths[i], valid=self.valids[i], tail=tail,
                remask=self.holes and self.lengths[i] < length, shift=self.shift, lag=lags.get(id(self.lags[i])),
                uneven=self.lengths[i] != self.lengths[reference] or self.valids[i] is not self.valids[reference],
                heads=self.heads[i],
            )  # fmt: skip

        for i, recall in self.recalls.items():
            layer: Any = kv.state(cache, i)
            if layer is None:  # nothing is stored under gradient checkpointing
                continue
            before = befores[i]
            later = replace(
                recall,
                where=recall.where + self.past * (recall.where >= 0),
                order=torch.cat([before, recall.order + self.past * (recall.order >= 0)], 1),
                slots=recall.slots + before.shape[1] * (recall.slots >= 0),
                entry=recall.entry + entered * (recall.entry >= 0),
                memory=[],
            )
            layer.recall = later if layer.recall is None else layer.recall.joined(later)
        if (layer := kv.state(cache, reference)) is not None:
            held = [getattr(kv.state(cache, i), "recall", None) for i in range(len(cache.layers))]
            layer.gate = tuple(recall for recall in held if recall is not None)

    def _text_at_end(self) -> int:
        """How many of the last tokens are text in every row: these are stored one by one as they were fed."""
        place = torch.arange(1, self.host.shape[1] + 1)
        return self.host.shape[1] - int((((self.host > 1) | (self.host == 0)) * place).max())

    def _stored_before(self, cache: Any, i: int) -> Tensor:
        """[B, P] positions as fed of what layer i stored before this call, -1 for padding."""
        was = kv.state(cache, i)
        order = torch.arange(self.past, device=self.code.device).expand(len(self.code), -1)
        if self.real_past is not None:
            order = order.where(self.real_past, -1)
        if was is None:
            return order
        order = order[:, was.dropped :]
        if was.recall is not None:
            return torch.cat([was.recall.order, order[:, was.recall.order.shape[1] :]], 1)
        if was.valid is not None:
            head = order[:, : was.prefix].where(was.valid, -1)
            order = torch.cat([head, order[:, was.prefix :]], 1)
        return order

    def report(self) -> Last:
        """What `Handle.last` shows."""
        batch, length = self.host.shape
        c = self.compaction
        if c is None:
            index = torch.arange(length, device=self.code.device).expand(batch, -1)
            c = Compaction(index, None, index)
        policies = [f"{s.method.name} at {s.where!r}: {s.policy}" for s in self.stages]
        return Last(
            c.index, c.valid, c.src, self.results, self.lengths, self.notes, policies, self.kernels, self.clocks,
            self.tower_units, self.tower_lengths, heads=self.speaking,
            images=[replace(unit, signals={}) for unit in self.units],
            together=self._together(),
        )  # fmt: skip

    def _together(self) -> list[int]:
        """For every unit the number of the clip or row with which it shared a budget; empty if it had its own."""
        shared = [s for s in self.stages if s.per == "sample" and s.method.of == "tokens"]
        numbers = next((found for s in shared if (found := self._clips(s))), None)
        return numbers or ([u.row for u in self.units] if shared else [])


def _cut_features(where: Tensor, features: Tensor, cuts: list[tuple[list[Merge], Compaction]]) -> tuple[Tensor, Tensor]:
    """Features [S, D] of the True positions of where [B, L] (or [B, L, D]) and those positions, after some cuts.

    A merged token gets its members' features by the weights that merged their states: had they been added before the
    merge, it would hold the same.
    """
    where = where[..., 0] if where.dim() == 3 else where
    full = features.new_zeros(*where.shape, features.shape[-1])
    full[where] = features
    for merges, c in cuts:
        for row, slots, answer in merges:
            full[row, slots[answer.idx]] = answer.apply(full[row, slots])
        full, where = c.cut(full, 1), c.cut(where, 1)
        where = where if c.valid is None else where & c.valid.to(where.device)
    return where, full[where]


def _cut_any(value: Any, c: Compaction) -> Any:
    """Position ids ([.., B, L]) or rotary embeddings ([.., B, L, d], in tuples or dicts) of a layer."""
    if isinstance(value, tuple):
        return tuple(_cut_any(v, c) for v in value)
    if isinstance(value, dict):
        return {k: _cut_any(v, c) for k, v in value.items()}
    if not torch.is_tensor(value):
        return value
    return c.cut(value, -2 if value.is_floating_point() else -1)


def _tokens(group: list[Alive]) -> tuple[Tensor, Tensor | None]:
    """Positions in the row of all tokens of a unit; for parts of an image also the order that makes them ascend."""
    if len(group) == 1:
        return group[0].positions, None
    positions = torch.cat([a.positions for a in group])
    if not any(a.part is not None or a.separator for a in group):
        return positions, None
    order = positions.argsort()
    return positions.index_select(0, order), order


def _joined_spans(group: list[Alive]) -> tuple[Span, ...]:
    """Spans of several whole images side by side; none once one was cut or divided."""
    if not all(a.whole and a.n == a.unit.n for a in group):
        return ()
    spans, start = [], 0
    for a in group:
        spans += [replace(span, start=span.start + start) for span in a.spans]
        start += a.n
    return tuple(spans)


def _joined_by_row(results: list[UnitResult]) -> list[UnitResult]:
    """One result a row: the clips of a sample side by side, in the order in which they stand there."""
    rows: dict[int, list[UnitResult]] = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return [parts[0] if len(parts) == 1 else _side_by_side(parts) for parts in rows.values()]


def _side_by_side(parts: list[UnitResult]) -> UnitResult:
    """Results of units that follow each other in a row, as one of all their tokens."""
    starts = list(accumulate((p.n for p in parts), initial=0))
    kept = list(accumulate((len(p.idx) for p in parts), initial=0))
    answers = [p.assignment for p in parts]
    spans = [replace(s, start=s.start + n) for p, n in zip(parts, starts) for s in p.spans]
    merged: dict[str, Tensor] = {}
    if any(a.merges for a in answers):
        weights = [_weights(a) for a in answers]
        merged = {
            "src": torch.cat([src + n for (src, _, _), n in zip(weights, starts)]),
            "dst": torch.cat([dst + k for (_, dst, _), k in zip(weights, kept)]),
            "w": torch.cat([w for _, _, w in weights]),
        }
    scores = [p.scores for p in parts]
    orders = [p.order for p in parts]
    answer = Assignment(
        torch.cat([p.idx + n for p, n in zip(parts, starts)]),
        None if any(o is None for o in orders) else torch.cat([o + n for o, n in zip(orders, starts)]),  # type: ignore
        **merged,
        scores=None if any(x is None for x in scores) else torch.cat(scores),  # type: ignore[arg-type]
    )
    return replace(
        parts[0],
        n=starts[-1],
        positions=torch.cat([p.positions for p in parts]),
        idx=answer.idx,
        order=answer.order,
        scores=answer.scores,
        spans=tuple(spans) if all(p.spans for p in parts) else (),
        grid=None,
        assignment=answer,
        seen=torch.cat([p.seen for p in parts if p.seen is not None]),
    )


def _weights(answer: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """(src, dst, w) of an answer, also of one that merges nothing."""
    if answer.src is not None and answer.dst is not None and answer.w is not None:
        return answer.src, answer.dst, answer.w
    return answer.idx, torch.arange(len(answer.idx), device=answer.idx.device), torch.ones_like(answer.idx).float()
