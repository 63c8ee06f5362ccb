"""Which of the current slots of a prompt hold what: padding, the prompt, the words behind its first visual token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.units import arange_of, runs_of
from .prefill import Prefill

WORDLESS = "no text stands behind the image of a row: its last token is asked in place of that text"


def real_slots(prefill: Prefill) -> Tensor:
    """[B, n] bool: which of the current slots hold no padding."""
    whole = prefill.prompt.whole
    if whole is None:
        return prefill.token_kind != 0
    if prefill.holes:
        real = whole.cut(prefill.token_kind, 1) != 0
        return real if whole.valid is None else real & whole.valid.to(real.device)
    return whole.valid if whole.valid is not None else torch.ones_like(whole.index, dtype=torch.bool)


def prompt_slots(prefill: Prefill) -> Tensor:
    """[B, n] bool: which of the current slots hold tokens of the prompt, and so may be asked."""
    real, whole = real_slots(prefill), prefill.prompt.whole
    if not prefill.behind:
        return real
    return real & ((prefill.token_kind if whole is None else whole.cut(prefill.token_kind, 1)) > 0)


def visual_slots(prefill: Prefill) -> Tensor:
    """[B, n] bool: which of the current slots hold visual tokens of this call."""
    whole = prefill.prompt.whole
    visual = (prefill.token_kind if whole is None else whole.cut(prefill.token_kind, 1)) > 1
    return visual if whole is None or whole.valid is None else visual & whole.valid.to(visual.device)


def text_behind(prefill: Prefill, row: int) -> list[tuple[int, int]]:
    """Runs of the text behind the row's first visual token; its last token, if the prompt ends with an image."""
    host = prefill.token_kind_on_host
    seen = runs_of(host[row] > 1)
    behind = [run for run in prefill.text[row] if seen and run[0] > seen[0][0]]
    if seen and not behind:
        prefill.prompt.note(WORDLESS)
        return [(host.shape[1] - 1 - prefill.behind, 1)]
    return behind


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
