"""What each patch of a picture shows, and the losses that teach the projector to say it in the model's own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.evals.toys.alignment import pointing_loss
from vtprune.evals.toys.mid.content import DIGITS, GARMENTS
from vtprune.evals.toys.mid.scenes import COLOR_NAMES, GRID, PATCH, SHAPES, SIDE, Scene

KINDS = ("shape", "digit", "garment", "background")
_WORDS: dict[str, tuple[tuple[str, ...], float]] = {
    "kind": (KINDS, 0.5),
    "shape": (SHAPES, 1.0),
    "digit": (DIGITS, 1.0),
    "garment": (GARMENTS, 1.0),
    "color": (COLOR_NAMES, 1.0),
    "side": (("left", "right"), 0.5),
    "half": (("top", "bottom"), 0.5),
}
_PLACES = ("row", "column", "center_row", "center_column")
_LEAST = 0.12  # of its pixels: an item that covers less of a patch does not own it
_LENGTH = 5.0  # of a visual token; the words' embeddings are about 3 long, and a token says several of them


def _owners(scenes: Sequence[Scene]) -> np.ndarray:
    """[B, 256]: the item with most pixels of each patch, counted from 1; 0 where none has enough."""
    owner = np.stack([s.owner for s in scenes]).reshape(-1, GRID, PATCH, GRID, PATCH)
    patches = owner.transpose(0, 1, 3, 2, 4).reshape(len(scenes), GRID * GRID, -1)
    most = max(1, *(len(s.items) for s in scenes))
    counts = np.stack([(patches == slot).sum(-1) for slot in range(1, most + 1)])
    return np.where(counts.max(0) >= _LEAST * PATCH * PATCH, counts.argmax(0) + 1, 0)


def make_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """int64 [B, 256] for each kind of word and each place; -100 where a patch has nothing to say."""
    owners = _owners(scenes)
    cells = np.arange(GRID * GRID)
    found = {name: np.full(owners.shape, -100, np.int64) for name in (*_WORDS, *_PLACES)}
    found["kind"][:] = KINDS.index("background")
    found["row"][:], found["column"][:] = cells // GRID, cells % GRID
    found["half"][:], found["side"][:] = cells // GRID >= GRID // 2, cells % GRID >= GRID // 2
    for b, scene in enumerate(scenes):
        for i, item in enumerate(scene.items):
            mine = owners[b] == i + 1
            values = {"kind": KINDS.index(item.kind), item.kind: item.value}
            values |= {"center_row": int(item.cy) // PATCH, "center_column": int(item.cx) // PATCH}
            values |= {"half": int(item.cy > SIDE / 2), "side": int(item.cx > SIDE / 2)}
            if item.kind == "shape":
                values["color"] = item.color
            for name, value in values.items():
                found[name][b, mine] = min(max(value, 0), GRID - 1)
    return {name: torch.from_numpy(values) for name, values in found.items()}


class Heads(nn.Module):
    """A linear read-out of places from the visual tokens, in training only: it keeps them exact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = nn.Linear(width, len(_PLACES) * GRID)

    def loss(self, visual: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the places that visual tokens [B, 256, d] speak of."""
        logits = self.places(visual).float().unflatten(-1, (len(_PLACES), GRID))
        parts = [
            F.cross_entropy(logits[..., i, :].flatten(0, 1), labels[name].flatten(), ignore_index=-100)
            for i, name in enumerate(_PLACES)
        ]
        return torch.stack([part for part in parts if part.isfinite()]).mean()


class Alignment:
    """Visual tokens should point at the words that name what they show, and be about as long as words are."""

    def __init__(self, tokenizer: Any) -> None:
        first = {name: [tokenizer(f" {word}").input_ids[0] for word in words] for name, (words, _) in _WORDS.items()}
        self.words = {name: torch.tensor(ids) for name, ids in first.items()}

    def loss(self, visual: Tensor, embeddings: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Visual tokens [B, 256, d] against the word embeddings [V, d]."""
        targets = [(labels[name], self.words[name], weight) for name, (_, weight) in _WORDS.items()]
        length = visual.float().square().sum(-1) / _LENGTH**2
        return pointing_loss(visual, embeddings, targets) + 0.1 * (length - 1).square().mean()

    @torch.no_grad()
    def right(self, visual: Tensor, embeddings: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
        """Share of patches that point at the right word, for each kind of word."""
        shares = {}
        for name, ids in self.words.items():
            known = labels[name] >= 0
            best = (visual[known] @ embeddings[ids].T).argmax(-1)
            shares[name] = (best == labels[name][known]).float().mean().item()
        return shares
