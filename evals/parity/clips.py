"""Stored features of clips, for the cases of methods that look at frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.evals.parity.compare import Mismatch, agree
from vtprune.evals.parity.registry import Arrays
from vtprune.types import Visual


def video(arrays: Arrays, **fields: Any) -> tuple[Visual, tuple[int, int, int]]:
    """The stored features [T, P, D] as one unit without a budget, and its grid."""
    grid = tuple(int(n) for n in arrays["grid"])
    agree("grid", arrays["feat"].shape[:2], (grid[0], grid[1] * grid[2]))
    return Visual(torch.from_numpy(arrays["feat"]).flatten(0, 1), None, grid=grid, **fields), grid  # type: ignore


def budgets(arrays: Arrays) -> list[str]:
    """The prefixes of the budgets in a file: b0, b1, ..."""
    tags = sorted({name.split("_")[0] for name in arrays if name[0] == "b" and name[1:2].isdigit()})
    if not tags:
        raise Mismatch("the file holds no budget: no array is called b0_...")
    if "n_budgets" in arrays:
        agree("budgets", len(tags), arrays["n_budgets"])
    return tags


def with_newlines(x: Tensor, row: Tensor, newline: Tensor) -> Tensor:
    """Tokens x [K, D] with one newline [D] behind the last of every row [K] that has any."""
    ends = torch.cat([row[1:] != row[:-1], torch.ones(1, dtype=torch.bool)])
    return torch.cat([torch.stack([token, newline]) if end else token[None] for token, end in zip(x, ends)])


def rounds_of(arrays: Arrays, tag: str) -> tuple[int, ...]:
    """Tokens merged in every round of a budget."""
    return tuple(arrays[f"{tag}_r_list"].tolist())
