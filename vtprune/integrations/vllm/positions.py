"""Where kept tokens and the text around them stand: pruning moves no text, and a kept token keeps its own position.

The engine numbers a prompt before its images are encoded, and again when they are. In between, and where the beginning
of a prompt is cached, only what does not depend on the choice may be used. So text gets its position in the unpruned
prompt at once, and a kept token brings its position inside its image along, in columns behind its features.

A model with one position a token (LLaVA) runs on three rows here: the position, the position at which the token's
image begins, and the one behind the whole prompt. A model with three (M-RoPE) has words between any two images, and
these tell where an image begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 256  # bfloat16 holds whole numbers up to this one exactly
COLUMNS = 6  # two digits for each of three coordinates
LARGEST = BASE * BASE


def with_places(features: Tensor, places: Tensor) -> Tensor:
    """features [K, D] with the places [3, K] in the image behind them: [K, D + 6], in the dtype of the features."""
    digits = torch.stack([places // BASE, places % BASE]).flatten(0, 1).T
    return torch.cat([features, digits.to(features)], 1)


def without_places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What `with_places` put together."""
    digits = rows[:, -COLUMNS:].round().long().T
    return rows[:, :-COLUMNS], digits[:3] * BASE + digits[3:]


def begin(whole: Tensor, lengths: Sequence[tuple[int, int, int]], length: int, one_row: bool) -> tuple[Tensor, int]:
    """Positions of a pruned prompt before its images are encoded: [3, length], and what decoding adds to the length.

    whole: [3, L] positions of the unpruned prompt. lengths: for every image where it begins in the pruned prompt, how
    many tokens it has there, and how many unpruned. The tokens of an image all get the position where it begins.
    """
    parts, taken, done = [], 0, 0
    for start, kept, full in lengths:
        text = start - done
        first = whole[:, taken + text : taken + text + 1]
        parts += [whole[:, taken : taken + text], first.expand(-1, kept)]
        taken, done = taken + text + full, start + kept
    parts.append(whole[:, taken:])
    positions = torch.cat(parts, 1).clone()
    end = int(whole.max()) + 1 if whole.numel() else 0
    if one_row:
        positions[1], positions[2] = positions[0].clone(), end
    return positions, end - length


def arrive(positions: Tensor, is_visual: Tensor, places: Tensor, computed: int, one_row: bool) -> tuple[Tensor, int]:
    """Positions [3, N] once tokens of images arrive: those from `computed` on, as many as there are places [3, n].

    is_visual: [N] bool, the tokens of the prompt that stand for an image. Also what decoding adds to the length.
    """
    positions, length = positions.clone(), positions.shape[1]
    at = is_visual.nonzero().flatten()
    at = at[at >= computed][: places.shape[1]]
    if one_row:
        positions[0, at] = positions[1, at] + places[0].to(positions)
        return positions, int(positions[2, -1]) - length
    begins = (is_visual & ~torch.roll(is_visual, 1)).nonzero().flatten()
    before = begins[torch.searchsorted(begins, at, right=True) - 1] - 1
    first = torch.where(before < 0, 0, positions[0, before.clamp(min=0)] + 1)
    positions[:, at] = places.to(positions) + first
    return positions, int(positions[0, -1]) + 1 - length
