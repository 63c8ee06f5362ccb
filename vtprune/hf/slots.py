"""Which of the current slots of a prompt hold what: padding, the prompt, the words behind its first visual token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.units import runs_of
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
