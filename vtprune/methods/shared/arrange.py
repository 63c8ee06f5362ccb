"""Answers whose tokens stand in another order than that of their positions, as some official codes have them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...core.visual import Assignment

Order = Literal["positional", "official"]


def arranged(order: Tensor, scores: Tensor | None, how: Order) -> Assignment:
    """Keep the tokens of `order` [K]: each at its position, or ("official") the kept places filled in that order."""
    idx = order.sort().values
    if how == "positional":
        return Assignment(idx, order, scores=scores)
    row = torch.arange(len(order), device=order.device)
    return Assignment(idx, order, order, row, torch.ones_like(row, dtype=torch.float32), scores)
