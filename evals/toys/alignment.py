"""The loss that teaches a tower to speak the words of the language model before it is asked anything."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor


def pointing_loss(visual: Tensor, embeddings: Tensor, targets: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Visual tokens [B, n, d] should point at the word embeddings [V, d] that name what they show.

    targets: for each kind of word which of them a token shows, int64 [B, n] (below 0: none); the ids of the words;
    and the weight of the kind. Returns a float32 scalar.
    """
    total = visual.new_zeros(()).float()
    for shown, words, weight in targets:
        wanted = shown.flatten()
        where = (wanted >= 0).nonzero()[:, 0]
        if len(where):
            logits = visual.flatten(0, 1)[where] @ embeddings[words].T
            total = total + weight * F.cross_entropy(logits.float(), wanted[where])
    return total
