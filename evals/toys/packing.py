"""Batches for training: all questions of each image or clip laid side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.evals.toys.asks import Ask
from vtprune.evals.toys.words import EOS, PAD, encode


@dataclass
class Batch:
    """Pixels as the tower takes them; packed questions [B, Q]; labels [B, Q] are the next token or -100."""

    pixels: Tensor
    ids: Tensor
    segments: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    topics: Tensor
    asks: list[list[Ask]]


Encode = Callable[[Ask], tuple[list[int], list[int]]]  # token ids of a question and of its answer


def word_by_word(ids: dict[str, int]) -> Encode:
    """Questions and answers as the words of a vocabulary."""
    return lambda ask: (encode(ask.prompt, ids), encode(ask.answer, ids))


def lay(
    pixels: Tensor,
    asks: list[list[Ask]],
    encoded: Encode,
    start: int,
    topics: dict[str, int],
    weighted: bool,
    ends: tuple[int, int] = (PAD, EOS),
) -> Batch:
    """Lay all questions of each image side by side; see `fast.prefixed_hidden` for what makes that exact.

    `ends` are padding and the end token; every question
    begins at rotary position `start`; `topics` numbers the kinds of question and grows.
    """
    pad, end = ends
    rows: list[list[tuple[int, int, int, int, float, int]]] = []
    for image_asks in asks:
        row = []
        for segment, ask in enumerate(image_asks):
            prompt, answer = encoded(ask)
            targets = [-100] * (len(prompt) - 1) + answer + [end]
            weight = ask.weight if weighted else 1.0
            topic = topics.setdefault(ask.template if ask.capability == "caption" else ask.capability, len(topics))
            for i, (token, target) in enumerate(zip(prompt + answer, targets, strict=True)):
                w = weight * (0.2 if target == end else 1.0)
                row.append((token, segment, start + i, target, w, topic))
        rows.append(row)
    width = max(len(row) for row in rows)
    filler = (pad, -1, start, -100, 0.0, 0)
    table = torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.float64)
    tokens, segments, positions, labels, weights, kinds = table.unbind(-1)
    return Batch(
        pixels,
        tokens.long(),
        segments.long(),
        positions.long(),
        labels.long(),
        weights.float(),
        kinds.long(),
        asks,
    )
