"""Batches for training: all questions of each image or clip laid side by side."""

from __future__ import annotations

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


def lay(
    pixels: Tensor, asks: list[list[Ask]], ids: dict[str, int], start: int, topics: dict[str, int], weighted: bool
) -> Batch:
    """Lay all questions of each image side by side; see `fast.prefixed_hidden` for what makes that exact.

    `ids` is the vocabulary, in which padding and the end token are the shared ones; every question begins at
    rotary position `start`; `topics` numbers the kinds of question and grows.
    """
    rows: list[list[tuple[int, int, int, int, float, int]]] = []
    for image_asks in asks:
        row = []
        for segment, ask in enumerate(image_asks):
            prompt, answer = encode(ask.prompt, ids), encode(ask.answer, ids)
            targets = [-100] * (len(prompt) - 1) + answer + [EOS]
            weight = ask.weight if weighted else 1.0
            topic = topics.setdefault(ask.template if ask.capability == "caption" else ask.capability, len(topics))
            for i, (token, target) in enumerate(zip(prompt + answer, targets, strict=True)):
                w = weight * (0.2 if target == EOS else 1.0)
                row.append((token, segment, start + i, target, w, topic))
        rows.append(row)
    width = max(len(row) for row in rows)
    filler = (PAD, -1, start, -100, 0.0, 0)
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
