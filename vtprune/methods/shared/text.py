"""How well each visual token fits the prompt, on models that have no text tower paired with their vision tower."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...core.visual import Visual


def prompt_similarity(v: Visual) -> Tensor:
    """[N] float32: the largest cosine between the token's feature and a text token's embedding, / sqrt(D).

    Ours, not a paper's: the LLM's own embeddings stand in for a text encoder. `Visual.state["note"]` says so. A prompt
    without text gives zeros.
    """
    if v.text is None or not len(v.text):
        note(v, "the prompt has no text to compare with")
        return v.x.new_zeros(v.n).float()
    note(v, "text is compared by the LLM's own embeddings, in place of a paired text encoder")
    cosine = F.normalize(v.x.float(), dim=1) @ F.normalize(v.text.float(), dim=1).mT
    largest: Tensor = cosine.amax(1) / v.x.shape[1] ** 0.5
    return largest


def note(v: Visual, what: str) -> None:
    """Add a remark to those that end in `Handle.last.notes`, once."""
    said = v.state.get("note", "")
    if what not in said:
        v.state["note"] = f"{said}; {what}" if said else what
