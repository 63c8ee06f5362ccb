"""`Prefill`: one forward pass over a prompt, from the arguments of the base model to `Last`.

Order of the calls: `start_host_copies` (before the vision tower runs) -> `open_prompt` (units, once embeddings are
there) -> `run_before_llm` -> the layers (`hf.layers`) -> `close` (cache and output) -> `report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.compaction import Compaction
from ..core.errors import UnsupportedCall
from ..core.framing import clips_seen, clips_told
from ..core.masks import visible
from ..core.method import Stage
from ..core.prompt import Merge, PromptState, encoded_signals, run_stage, take_whole
from ..core.result import Last, TowerStep, UnitResult, joined_by_row
from ..core.signal import KEPT
from ..core.units import Unit, begin_rows, groups
from ..core.visual import Assignment
from ..kernels import HostCopy, to_device
from ..model_adapters.base import Adapter
from ..model_adapters.entries import MODALITIES, Features
from . import cache as kv
from .checks import check_runs
from .decode_selection import DecodeSelection
from .plan import Plan

GRIDLESS = "features were encoded elsewhere: image grids are unknown, every run of tokens is a unit"


@dataclass
class LayerStates:
    """What each decoder layer runs on. lengths: tokens a row. valid: [B, n] bool, False at padding, or None.

    position_offset: [B, n] int64, how much lower than the text model's own the position ids of a layer are, or None.
    heads: [B, H] bool, the query heads that speak, or None for all.
    """

    lengths: list[int]
    valid: list[Tensor | None]
    position_offset: list[Tensor | None]
    heads: list[Tensor | None]

    @classmethod
    def of(cls, length: int, depth: int) -> LayerStates:
        """Of a decoder in which nothing was cut."""
        return cls([length] * depth, [None] * depth, [None] * depth, [None] * depth)


@dataclass
class Readings:
    """Signals that were read inside the LLM, by kind and layer: [B, n, ..] of the current slots.

    words: signals of words by kind and layer (None: of the embeddings), a tensor [T, ..] each row. heads: signals of
    query heads by kind, [B, H]. rope: rotary embeddings (cos, sin) of layers whose attention signals ask for them.
    """

    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    words: dict[tuple[str, int | None], list[Tensor]] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    rope: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict)


@dataclass
class Prefill:
    """The data of one forward pass; what is done with it stands in functions.

    token_kind: [B, L] int8 on the device: 1 text, 2.. visual, 0 padding, and -1 (-2 ..) tokens behind the end of the
    prompt, which stay and are not asked: what greedy decoding would not know yet. `token_kind_on_host`: the same on the
    host, with 0 at tokens that the mask hides.
    past: tokens of earlier calls on `cache`; real_past: [B, past] bool, which of them are no padding. behind: tokens of
    this call behind the end of the prompt. holes: some tokens are padding or hidden.
    others: tokens of all rows that stay and are not visual. text: runs (start, length) of words, row by row.
    prompt: which tokens are left; there from `open_prompt` on, which sets `opened`. acting: stages act and read signals
    by now; never where all tokens stay. position_offset: [B], by how much new tokens' ids are lower.
    inner: the cut made inside the LLM, inner_cuts: its steps with their merges. memo: arguments that were cut already.
    keys: by layer [B, n, d] what its key projection made in a look before it runs, until it takes them.
    selections: by layer what stages at decode will know. active_heads: by layer [K] the heads that speak, row by row.
    """

    adapter: Adapter
    plan: Plan
    token_kind: Tensor
    notes: list[str] = field(default_factory=list)
    cache: Any = None
    past: int = 0
    behind: int = 0
    holes: bool = False
    token_kind_on_host: Tensor = field(default_factory=lambda: torch.empty(0))
    real_past: Tensor | None = None
    copies: list[HostCopy] = field(default_factory=list)
    prompt: PromptState = field(init=False)
    text: list[list[tuple[int, int]]] = field(default_factory=list)
    opened: bool = False
    acting: bool = False
    dtype: torch.dtype = torch.float32
    others: int = 0
    clips: dict[tuple[int, ...] | None, list[int]] = field(default_factory=dict)
    layers: LayerStates = field(default_factory=lambda: LayerStates.of(0, 0))
    readings: Readings = field(default_factory=Readings)
    position_offset: Tensor | None = None
    inner: Compaction | None = None
    inner_cuts: list[tuple[list[Merge], Compaction]] = field(default_factory=list)
    memo: dict[Any, Any] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    selections: dict[int, DecodeSelection] = field(default_factory=dict)
    active_heads: dict[int, list[Tensor]] = field(default_factory=dict)
    tower_steps: list[TowerStep] = field(default_factory=list)
    tower_lengths: dict[str, list[int]] = field(default_factory=dict)

    @property
    def units(self) -> list[Unit]:
        """Images and videos of this call."""
        return self.prompt.units

    def past_at(self, layer: int) -> int:
        """Tokens of earlier calls that a layer of the cache stores."""
        return self.past - getattr(kv.state(self.cache, layer), "dropped", 0) if self.cache is not None else 0

    def start_host_copies(self, call: Mapping[str, Any], prompt: int | None = None) -> None:
        """From the arguments of the base model: send what the host must know on its way while the tower runs.

        prompt: tokens up to the end of the prompt, those of earlier calls included, where `generate` told.
        """
        length = self.token_kind.shape[1]
        self.cache = call.get(kv.NAME)
        self.past = int(self.cache.get_seq_length()) if self.cache is not None else 0
        real = self._real(call.get("attention_mask"), length)
        self.behind = 0 if prompt is None else min(length - 1, max(0, self.past + length - prompt))
        if self.behind:
            self.token_kind = torch.cat([self.token_kind[:, : -self.behind], -self.token_kind[:, -self.behind :]], 1)
        named = self.token_kind
        if real is not None:
            self.token_kind = self.token_kind * real[:, -length:]
        seen = () if real is None else (real[:, -length:].to(named), real[:, :-length].to(named))
        self.copies = [HostCopy(torch.cat([named, *seen], dim=1))]
        if self.plan.by_clip:
            ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
            # Equal words have equal embeddings.
            self.copies.append(HostCopy(ids if ids is not None else embeds.double().sum(-1)))  # type: ignore

    def _real(self, mask: Any, length: int) -> Tensor | None:
        """[B, past + L] or [B, L] bool: which tokens are no padding, as far as the mask tells."""
        if isinstance(mask, dict):
            mask = mask.get("full_attention")
        if not torch.is_tensor(mask):
            return None
        if mask.dim() == 4:
            start = self.past_columns(mask, 0, length)
            rows = self.token_kind.shape[0]
            return visible(mask[..., start : start + length]).expand(rows, -1).to(self.token_kind.device)
        return (mask[:, : self.past + length] != 0).to(self.token_kind.device)

    def past_columns(self, mask: Tensor, layer: int, new: int) -> int:
        """Columns of a mask that stand before the `new` tokens of this call."""
        held = getattr(self.cache, "layers", ())
        held = held[layer] if layer < len(held) else None
        if mask.dim() == 4 and held is not None and kv.is_static(held):
            return self.past - getattr(held, "dropped", 0)
        return mask.shape[-1] - new


# -- opening ----------------------------------------------------------------------------------------------------------


def open_prompt(prefill: Prefill, call: Mapping[str, Any], features: Mapping[str, Features | None]) -> list[str]:
    """Make the units. Their indices are made on the device, so nothing here waits for it.

    Returns the modalities whose features this model did not encode in this call or an earlier one.
    """
    embeds = call["inputs_embeds"]
    batch, length = embeds.shape[:2]
    if prefill.token_kind.shape != (batch, length):
        raise UnsupportedCall(
            f"the base model saw {tuple(prefill.token_kind.shape)} tokens and hands {(batch, length)} to its text "
            "model: this call shape is not supported"
        )
    plan, named = prefill.plan, _read_copies(prefill, length)
    host = prefill.token_kind_on_host
    stays = _staying(prefill, named)
    keep = (prefill.token_kind != 0).to(embeds.device) if stays is host else (stays != 0).to(embeds.device)
    units = _units(prefill, named, features)
    left, prefill.text, text = begin_rows(units, host == 1, embeds.device)
    counts = (stays != 0).sum(1).tolist()
    state = PromptState(units, left, embeds, keep, counts, text_positions=text, notes=prefill.notes)
    prefill.prompt, prefill.dtype = state, embeds.dtype
    prefill.opened, prefill.acting = True, not plan.keeps_all
    elsewhere = [m for m in modalities(units) if (known := features.get(m)) is None or known.elsewhere]
    if elsewhere:
        if not plan.keeps_all:
            check_runs(prefill)
        if any(u.modality in elsewhere and not u.spans for u in units):
            state.notes.append(GRIDLESS)
    if units and not plan.keeps_all and bool(((named > 1) & (host == 0)).any()):
        _leave_out_hidden(prefill)
    for modality, found in features.items():
        if found is not None:
            _take_tower(prefill, modality, found)
    prefill.others = sum(state.counts) - int((host > 1).sum())
    prefill.layers = LayerStates.of(length, plan.depth)
    return elsewhere


def _read_copies(prefill: Prefill, length: int) -> Tensor:
    """The kinds of tokens [B, L] as named, on the host; sets what follows from them and from the mask."""
    named, seen, past = prefill.copies[0].read().tensor_split([length, 2 * length], dim=1)
    if prefill.behind and bool((named < -1).any()):  # visual tokens there: this call is about another prompt
        named, prefill.token_kind, prefill.behind = named.abs(), prefill.token_kind.abs(), 0
    host = named * seen if seen.shape[1] else named  # tokens that the mask hides are no candidates
    prefill.token_kind_on_host = host
    prefill.holes = bool((host == 0).any() or (past == 0).any())
    prefill.real_past = past.to(prefill.token_kind.device) != 0 if past.shape[1] else None
    return named


def _units(prefill: Prefill, named: Tensor, features: Mapping[str, Features | None]) -> list[Unit]:
    """Images and videos of this call; none where all tokens stay and the call shows a part of an image only."""
    try:
        return prefill.adapter.units(named, dict(features))
    except UnsupportedCall:
        if not prefill.plan.keeps_all:
            raise
        return []


def modalities(units: list[Unit]) -> list[str]:
    """Modalities that occur in this batch."""
    return [m for m in MODALITIES if any(u.modality == m for u in units)]


def _staying(prefill: Prefill, named: Tensor) -> Tensor:
    """[B, L] on the host, 0 at what goes with the first cut: padding and hidden tokens, which nobody sees.

    The state of linear attention fades over hidden words within a row, so these stay, hidden.
    """
    host = prefill.token_kind_on_host
    if not prefill.holes or not prefill.plan.linear:
        return host
    seen = (host != 0).int()
    inside = (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1).flip(1) > 0)
    return torch.where(inside & (named.abs() == 1), named, host)


def _leave_out_hidden(prefill: Prefill) -> None:
    """Images and their parts without the tokens that the attention mask hides: budgets count what is seen."""
    state = prefill.prompt
    for stage in (s for s in prefill.plan.stages if not isinstance(s.where, tuple) and s.method.of == "tokens"):
        state.groups, _ = groups(state.groups, stage)
    for group in state.groups:
        seen = prefill.token_kind_on_host[group.row].index_select(0, group.positions.cpu()) != 0
        group.keep(to_device(seen.nonzero().flatten(), group.positions.device))
        group.total = group.left


def _take_tower(prefill: Prefill, modality: str, found: Features) -> None:
    """What stages and readers in the vision tower did."""
    state = prefill.prompt
    state.clocks += found.clocks
    state.kernels |= found.kernels
    if found.tower is not None:
        prefill.tower_steps += found.tower.steps
        state.notes += found.tower.notes
        prefill.tower_lengths[modality] = found.tower.lengths


# -- stages before the LLM --------------------------------------------------------------------------------------------


def run_before_llm(prefill: Prefill) -> bool:
    """Run the stages between projector and LLM on the embeddings. True if tokens were dropped."""
    state, plan = prefill.prompt, prefill.plan
    before = sum(state.counts)
    if plan.in_tower:
        _drop_unseen(prefill)
    for number, stage in enumerate(plan.stages):
        if stage.where == "llm" and "prefill" in stage.method.phases:
            run_stage(state, number, stage, clips_of(prefill, stage), encoded_signals)
    return sum(state.counts) != before


def keep_all(prefill: Prefill) -> None:
    """Report the units of every stage as whole, for a patch that keeps all tokens and so asks no method."""
    state = prefill.prompt
    stages = [s for s in prefill.plan.stages if "prefill" in s.method.phases and s.method.of == "tokens"]
    later = [s for s in stages if not isinstance(s.where, tuple)]
    # Stages behind the tower report what it left, so its own are reported only where none stands behind.
    for stage in later or stages[-1:]:
        first = len(state.results)
        for unit in groups(state.groups, stage, clips_of(prefill, stage))[1]:
            take_whole(state, stage, unit)
        if stage.per == "sample":
            state.results[first:] = joined_by_row(state.results[first:])


def _drop_unseen(prefill: Prefill) -> None:
    """Drop what stages in the vision tower dropped. The encoder's output repeats rows of kept tokens in its place."""
    state, tower = prefill.prompt, prefill.plan.in_tower
    later = [s for s in prefill.plan.stages if not isinstance(s.where, tuple) and s.method.of == "tokens"]
    for stage in later if any(KEPT in unit.signals for unit in state.units) else ():
        state.groups, _ = groups(state.groups, stage)
    # Newlines (-1) never were in the tower: they stay to compete, or go with the first token that goes.
    no_newlines = any(s.newlines == "drop" for s in tower)
    place = prefill.tower_steps[-1].where if prefill.tower_steps else tower[-1].where
    for group in state.groups:
        kept = group.unit.signals.get(KEPT)
        if kept is None or not bool((kept == 0).any()):
            if not later and not group.separator:
                take_whole(state, tower[-1], [group], place)
            continue
        stays = kept == 1 if no_newlines else kept != 0
        stays = stays if group.total == group.unit.n else stays[group.origin.cpu()]
        idx = to_device(stays.nonzero().flatten(), group.positions.device)
        if not group.separator:
            state.results.append(
                UnitResult(
                    group.row, group.image, group.part, group.unit.modality, tower[-1].method.name, place, group.left,
                    group.positions.index_select(0, idx), idx, None, None, group.spans, group.grid, Assignment(idx),
                    group.positions,
                )
            )  # fmt: skip
        state.shrink(group, idx)


def clips_of(prefill: Prefill, stage: Stage) -> list[int] | None:
    """The clip of every image, for a stage that sees samples: as the user counts them, or as frames are told."""
    if stage.per != "sample" or not prefill.units or not (stage.clips or prefill.plan.by_clip):
        return None
    if stage.clips not in prefill.clips:
        if stage.clips:
            rows = len(prefill.token_kind_on_host)
            prefill.clips[stage.clips] = clips_told(prefill.units, rows, stage.clips)
        else:
            prefill.clips[None] = clips_seen(prefill.units, prefill.copies[1].read().tolist())
    return prefill.clips[stage.clips]


def together(prefill: Prefill) -> list[int]:
    """For every unit the number of the clip or row with which it shared a budget; empty if it had its own."""
    shared = [s for s in prefill.plan.stages if s.per == "sample" and s.method.of == "tokens"]
    numbers = next((found for s in shared if (found := clips_of(prefill, s))), None)
    return numbers or ([u.row for u in prefill.units] if shared else [])


def report(prefill: Prefill) -> Last:
    """What `Handle.last` shows."""
    state = prefill.prompt
    cut = state.whole
    if cut is None:
        batch, length = prefill.token_kind_on_host.shape
        index = torch.arange(length, device=prefill.token_kind.device).expand(batch, -1)
        cut = Compaction(index, None, index)
    return Last(
        cut.index, cut.valid, cut.src, state.results, prefill.layers.lengths, state.notes,
        [f"{s.method.name} at {s.where!r}: {s.policy}" for s in prefill.plan.stages], state.kernels, state.clocks,
        prefill.tower_steps, prefill.tower_lengths, heads=prefill.active_heads,
        images=[replace(unit, signals={}) for unit in state.units],
        together=together(prefill),
    )  # fmt: skip


def replaced(output: Any, hidden: Tensor) -> Any:
    """The output of a model, a tuple or a dataclass, with other last hidden states, in `hidden_states` too."""
    old = output[0]
    if isinstance(output, tuple):
        return (hidden, *(_last(x, old, hidden) for x in output[1:]))
    output.last_hidden_state = hidden
    if getattr(output, "hidden_states", None):
        output.hidden_states = _last(output.hidden_states, old, hidden)
    return output


def _last(entry: Any, old: Tensor, new: Tensor) -> Any:
    """A tuple of hidden states that ends with the old ones ends with the new ones."""
    return (*entry[:-1], new) if isinstance(entry, tuple) and entry and entry[-1] is old else entry
