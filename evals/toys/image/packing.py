"""Batches for training: normalised pictures and all questions of each image laid side by side."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vtprune.evals.toys.asks import Ask
from vtprune.evals.toys.image import fast
from vtprune.evals.toys.image.model import MEAN_RGB, STD, VOCABULARY
from vtprune.evals.toys.packing import Batch, lay, word_by_word


def normalise(pixels: list[np.ndarray]) -> Tensor:
    """uint8 pictures [64, 64, 3] -> bfloat16 [B, 3, 64, 64], as the processor does it."""
    images = torch.from_numpy(np.stack(pixels)).float()
    return ((images - torch.tensor(MEAN_RGB)) / (255 * STD)).permute(0, 3, 1, 2).to(torch.bfloat16)


def pack(pixels: list[np.ndarray], asks: list[list[Ask]], topics: dict[str, int], weighted: bool) -> Batch:
    """The questions of each picture side by side, behind `<s>` and its 256 visual tokens."""
    return lay(normalise(pixels), asks, word_by_word(VOCABULARY), fast.PREFIX, topics, weighted)
