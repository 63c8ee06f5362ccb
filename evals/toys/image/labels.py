"""Dense labels of scenes and the auxiliary losses that teach the tower to see before it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.evals.toys.alignment import pointing_loss
from vtprune.evals.toys.image.model import VOCABULARY
from vtprune.evals.toys.image.scenes import COLOR_NAMES, DIGIT_OWNER, GRID, PATCH, SHAPES, SIDE, Scene, place_words

IGNORE = -100
_DENSE = {
    "shape": 5,
    "color": 9,
    "digit": 11,
    "row": GRID,
    "column": GRID,
    "center_row": GRID,
    "center_column": GRID,
}
_DENSE_WEIGHT = {
    "shape": 1.0,
    "color": 1.0,
    "digit": 1.5,
    "row": 0.2,
    "column": 0.2,
    "center_row": 0.4,
    "center_column": 0.4,
}
_BACKGROUND = {"shape": 0.3, "color": 0.3, "digit": 0.1}  # weight of the class "none"
_PRESENCE = len(SHAPES) + len(COLOR_NAMES) + len(SHAPES) * len(COLOR_NAMES) + 1
_TOTAL = 9
_KINDS = len(SHAPES) + len(COLOR_NAMES)
_PER_KIND = 7


@dataclass
class Labels:
    """What there is to see.

    `dense` name -> class of each patch [B, 256]; `center` [B, 256] 1 where a shape's centre lies; `presence`
    [B, 36] shapes, colours, pairs, number; `total` [B] shapes; `kinds` [B, 11] shapes of each shape and colour;
    `side`, `half` [B, 256] right of the middle, below the middle. -100 where a class is undefined.
    """

    dense: dict[str, Tensor]
    center: Tensor
    presence: Tensor
    total: Tensor
    kinds: Tensor
    side: Tensor
    half: Tensor


def _owner_of_patch(owners: np.ndarray) -> np.ndarray:
    """[B, 64, 64] -> [B, 256]: the item or digit with most pixels of the patch, 0 if it has fewer than 3."""
    slots = np.where(owners >= DIGIT_OWNER, owners - DIGIT_OWNER + 9, owners)
    patches = slots.reshape(-1, GRID, PATCH, GRID, PATCH).transpose(0, 1, 3, 2, 4).reshape(len(owners), GRID * GRID, -1)
    counts = np.stack([(patches == slot).sum(-1) for slot in range(1, 11)])
    best = counts.argmax(0)
    return np.where(counts.max(0) >= 3, best + 1, 0)


def _table(scene: Scene) -> np.ndarray:
    """[7, 11]: shape, colour, digit, centre row, centre column, side, half of each owner; 0 is background."""
    table = np.zeros((7, 11), np.int64)
    table[3:, 0] = IGNORE
    for i, item in enumerate(scene.items):
        row, column = place_words(item)
        side = IGNORE if column is None else int(column == "right")
        half = IGNORE if row is None else int(row == "bottom")
        center = (int(item.cy) // PATCH, int(item.cx) // PATCH)
        table[:, i + 1] = (item.shape + 1, item.color + 1, 0, *center, side, half)
    for i, digit in enumerate(scene.number or ""):
        ys, xs = np.nonzero(scene.owner == DIGIT_OWNER + i)
        cy, cx = ys.mean(), xs.mean()
        center = (int(cy) // PATCH, int(cx) // PATCH)
        table[:, 9 + i] = (4, 0, int(digit) + 1, *center, int(cx > SIDE / 2), int(cy > SIDE / 2))
    return table


def make_labels(scenes: list[Scene]) -> Labels:
    """The dense and whole-image labels of a batch of scenes."""
    owner = _owner_of_patch(np.stack([s.owner for s in scenes]))
    tables = np.stack([_table(s) for s in scenes])
    looked = np.take_along_axis(tables, np.broadcast_to(owner[:, None], (len(scenes), 7, GRID * GRID)), 2)
    values = torch.from_numpy(looked)
    cells = torch.arange(GRID * GRID).expand(len(scenes), -1)
    dense = {
        "shape": values[:, 0],
        "color": values[:, 1],
        "digit": values[:, 2],
        "row": cells // GRID,
        "column": cells % GRID,
        "center_row": values[:, 3],
        "center_column": values[:, 4],
    }
    center = torch.zeros(len(scenes), GRID * GRID)
    presence = torch.zeros(len(scenes), _PRESENCE)
    kinds = torch.zeros(len(scenes), _KINDS, dtype=torch.long)
    for b, scene in enumerate(scenes):
        presence[b, -1] = float(scene.number is not None)
        for item in scene.items:
            center[b, int(item.cy) // PATCH * GRID + int(item.cx) // PATCH] = 1
            kinds[b, item.shape] += 1
            kinds[b, 3 + item.color] += 1
            presence[b, [item.shape, 3 + item.color, 11 + item.shape * 8 + item.color]] = 1
    total = torch.tensor([len(s.items) for s in scenes])
    return Labels(dense, center, presence, total, kinds.clamp(max=_PER_KIND - 1), values[:, 5], values[:, 6])


class Heads(nn.Module):
    """Linear read-outs used in training only: one over the patch features, one over the CLS output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(_DENSE.values()) + 1)
        self.cls = nn.Linear(width, _PRESENCE + _TOTAL + _KINDS * _PER_KIND)

    def losses(self, features: Tensor, cls: Tensor, labels: Labels) -> dict[str, Tensor]:
        """Weighted losses of patch features [B, 256, d] and CLS output [B, d]; they sum to the tower loss."""
        parts = self.patch(features).float().split([*_DENSE.values(), 1], -1)
        out: dict[str, Tensor] = {}
        for (name, size), logits in zip(_DENSE.items(), parts[:-1], strict=True):
            weight = torch.ones(size)
            weight[0] = _BACKGROUND.get(name, 1.0)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.dense[name].flatten(), weight, ignore_index=IGNORE)
            out[name] = _DENSE_WEIGHT[name] * loss
        positive = torch.tensor(5.0)
        out["center"] = F.binary_cross_entropy_with_logits(parts[-1][..., 0], labels.center, pos_weight=positive)
        presence, total, kinds = self.cls(cls).float().split([_PRESENCE, _TOTAL, _KINDS * _PER_KIND], -1)
        out["presence"] = F.binary_cross_entropy_with_logits(presence, labels.presence)
        out["total"] = 0.3 * F.cross_entropy(total, labels.total)
        weight = torch.ones(_PER_KIND)
        weight[0] = 0.3
        out["kinds"] = 0.3 * F.cross_entropy(
            kinds.unflatten(-1, (_KINDS, -1)).flatten(0, 1), labels.kinds.flatten(), weight
        )
        return out


def _word_ids(words: tuple[str, ...]) -> Tensor:
    return torch.tensor([VOCABULARY[w] for w in words])


_ALIGN: tuple[tuple[str, Tensor, float], ...] = (
    ("color", _word_ids(COLOR_NAMES), 1.0),
    ("shape", _word_ids(SHAPES), 1.0),
    ("digit", _word_ids(tuple("0123456789")), 1.0),
    ("side", _word_ids(("left", "right")), 0.5),
    ("half", _word_ids(("top", "bottom")), 0.5),
)


def alignment_loss(visual: Tensor, embeddings: Tensor, labels: Labels, digits: bool) -> Tensor:
    """Projected patches [B, 256, d] should point at the word embeddings that name what they show."""
    targets: dict[str, Any] = {name: labels.dense[name] - 1 for name in ("color", "shape", "digit")}
    targets["shape"] = targets["shape"].masked_fill(targets["shape"] == 3, -1)  # digits have no shape word
    targets |= {"side": labels.side, "half": labels.half}
    kinds = [(targets[name], words, weight) for name, words, weight in _ALIGN if digits or name != "digit"]
    return pointing_loss(visual, embeddings, kinds)
