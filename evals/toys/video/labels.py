"""What every visual token of a clip shows, and the auxiliary losses that teach the tower to see before it is asked."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.evals.toys.alignment import pointing_loss
from vtprune.evals.toys.image.scenes import SHAPES
from vtprune.evals.toys.video.clips import COLOR_NAMES, GRID, MAX_EVENTS, SLOT, SLOTS, WAYS, Clip
from vtprune.evals.toys.video.model import VOCABULARY

_CELL = 8 * 8 * SLOT  # pixels of one visual token
_KINDS = {"shape": SHAPES, "color": COLOR_NAMES, "way": tuple(WAYS)}
_WORDS = {name: torch.tensor([VOCABULARY[w] for w in words]) for name, words in _KINDS.items()}


def make_labels(clips: list[Clip]) -> dict[str, Tensor]:
    """Name -> class of every visual token [B, 288]: 0 is the ground (way: or a shape that stays), else 1 + index.

    A token shows the event that covers most of its pixels, if that is an eighth of them or more.
    """
    owners = np.stack([c.owner for c in clips])
    side = owners.shape[-1] // GRID
    cells = owners.reshape(len(clips), SLOTS, SLOT, GRID, side, GRID, side).transpose(0, 1, 3, 5, 2, 4, 6)
    cells = cells.reshape(len(clips), SLOTS * GRID * GRID, -1)
    counts = np.stack([(cells == number).sum(-1) for number in range(1, MAX_EVENTS + 1)])
    owner = np.where(counts.max(0) * 8 >= _CELL, counts.argmax(0) + 1, 0)
    table = np.zeros((len(clips), 3, MAX_EVENTS + 1), np.int64)
    for b, clip in enumerate(clips):
        for i, event in enumerate(clip.events):
            way = tuple(WAYS).index(event.way) + 1 if event.way else 0
            table[b, :, i + 1] = (event.shape + 1, event.color + 1, way)
    looked = np.take_along_axis(table, np.broadcast_to(owner[:, None], (len(clips), 3, owner.shape[1])), 2)
    return dict(zip(_KINDS, torch.from_numpy(looked).unbind(1), strict=True))


class Heads(nn.Module):
    """Linear read-outs of visual tokens, used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Linear(width, sum(len(words) + 1 for words in _KINDS.values()))

    def losses(self, visual: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted losses of visual tokens [B, n, d]; the ground, most of a clip, counts a fifth."""
        parts = self.token(visual).float().split([len(words) + 1 for words in _KINDS.values()], -1)
        out = {}
        for (name, words), logits in zip(_KINDS.items(), parts, strict=True):
            weight = torch.ones(len(words) + 1)
            weight[0] = 0.2
            out[name] = F.cross_entropy(logits.flatten(0, 1), labels[name].flatten(), weight)
        return out


def alignment_loss(visual: Tensor, embeddings: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Visual tokens [B, n, d] should point at the word embeddings that name what they show."""
    return pointing_loss(visual, embeddings, [(labels[name] - 1, words, 1.0) for name, words in _WORDS.items()])
