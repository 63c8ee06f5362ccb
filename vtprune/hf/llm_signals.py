"""Signals of the decoder: what the readers in its layers keep, for the slots of this call (`vtprune.signals`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.clock import Clock
from ..core.signal import SignalKind
from ..core.units import arange_of, runs_of
from ..kernels import recording
from ..signals import LayerAttention
from .prefill import Prefill
from .slots import prompt_slots, text_behind, visual_slots


@dataclass(frozen=True)
class PromptSlots:
    """What signals may ask of the prompt (`vtprune.signals.Prompt`)."""

    prefill: Prefill

    @property
    def batch(self) -> int:
        """How many rows the batch has."""
        return len(self.prefill.token_kind_on_host)

    def real(self) -> Tensor:
        """[B, n] bool: which of the current slots hold tokens of the prompt, and so may be asked."""
        return prompt_slots(self.prefill)

    def last(self, n: int) -> Tensor:
        """[B] int64 on the host: the slot of the last token of each row's prompt, of n."""
        host = self.prefill.token_kind_on_host
        if self.prefill.prompt.whole is not None:  # pads were dropped: rows end with a real token
            return torch.full((len(host),), n - 1 - self.prefill.behind)
        position = torch.arange(1, host.shape[1] + 1)
        return ((host > 0) * position).amax(1) - 1

    def visual(self) -> Tensor:
        """[B, n] bool: which of the current slots hold visual tokens."""
        return visual_slots(self.prefill)

    def visual_slots(self, row: int) -> Tensor:
        """[V] int64: current slots of the row's visual tokens."""
        state = self.prefill.prompt
        mine = [group.positions for group in state.groups if group.row == row]
        return state.slots(row, torch.cat(mine)) if mine else state.keep.new_zeros(0, dtype=torch.int64)

    def text_slots(self, row: int, device: torch.device) -> Tensor:
        """[T] int64: current slots of the text behind the row's first visual token."""
        return self.prefill.prompt.slots(row, arange_of(text_behind(self.prefill, row), device))

    def text_is_seen(self, row: int) -> bool:
        """False if no visual token stands behind the first token of that text."""
        behind, seen = text_behind(self.prefill, row), runs_of(self.prefill.token_kind_on_host[row] > 1)
        return bool(seen and behind) and behind[0][0] <= seen[-1][0]


def read_attention(prefill: Prefill, kind: SignalKind, layer: int, attention: LayerAttention) -> None:
    """Keep a signal of this layer's attention, [B, n, ...] for the slots of this call."""
    rows, clock = prefill.readings.rows, Clock(attention.q.device)
    with recording(prefill.prompt.kernels):
        found = kind(attention)
        before = rows.pop((kind.name, layer - 1), None) if kind.so_far else None  # read by now, if a stage stands here
        rows[kind.name, layer] = found if before is None else found + before.to(found.device)
    prefill.prompt.clocks.append(clock.stop())


def read_module(prefill: Prefill, kind: SignalKind, layer: int, before: Tensor, after: Tensor) -> None:
    """Add a signal of what one module of a layer does to its tokens, before and after [B, n, D]."""
    rows, clock = prefill.readings.rows, Clock(before.device)
    found = kind(before, after, prompt_slots(prefill).to(before.device))
    rows[kind.name, layer] = rows[kind.name, layer] + found if (kind.name, layer) in rows else found
    prefill.prompt.clocks.append(clock.stop())


def read_rope(prefill: Prefill, kind: SignalKind, layer: int, rope: tuple[Tensor, Tensor]) -> None:
    """Keep a signal of the rotary embeddings (cos, sin) [B or 1, n, d] that a layer was given."""
    prefill.readings.rows[kind.name, layer] = kind(*rope, PromptSlots(prefill))


def read_embeddings(prefill: Prefill, kinds: Iterable[SignalKind], x: Tensor) -> None:
    """Keep signals of words: x [B, n, D] enters the first layer."""
    for known in kinds:
        prefill.readings.words[known.name] = known(x, PromptSlots(prefill))


def read_heads(prefill: Prefill, kinds: Iterable[SignalKind], out: Tensor) -> None:
    """Keep signals of what each head says in one layer: out [B, n, H, d], its output before the projection."""
    real, heads = prompt_slots(prefill).to(out.device), prefill.readings.heads
    for known in kinds:
        found, before = known(out, real), heads.get(known.name) if known.so_far else None
        heads[known.name] = found if before is None else before.to(out.device) + found
