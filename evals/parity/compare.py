"""Comparing our results with stored ones: equal in order, within the tolerance, or a `Mismatch` that says where."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.evals.parity.registry import Arrays
from vtprune.types import Assignment

TOLERANCE = 1e-4


class Mismatch(Exception):
    """Our result differs from the stored one; the message says where."""


def same(what: str, ours: Tensor, stored: Any) -> None:
    """Raise `Mismatch` unless two index sequences are equal, order included."""
    a, b = ours.tolist(), np.asarray(stored).tolist()
    if a != b:
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        raise Mismatch(
            f"{what}: {len(a)} against {len(b)} stored; at {at} ours {a[at : at + 3]}, stored {b[at : at + 3]}"
        )


def close(what: str, ours: Tensor, stored: Any) -> float:
    """Largest absolute difference; `Mismatch` if it exceeds the tolerance."""
    expected = torch.as_tensor(np.asarray(stored))
    if ours.shape != expected.shape:
        raise Mismatch(f"{what}: shape {tuple(ours.shape)} against {tuple(expected.shape)} stored")
    worst = float((ours.float() - expected.float()).abs().max())
    if not worst <= TOLERANCE:
        raise Mismatch(f"{what}: differs by {worst:.2g}, allowed {TOLERANCE:g}")
    return worst


def real(value: Any) -> float:
    """The Python float that a stored number was meant to be: files hold float32, counts are cut off in float64.

    >>> real(np.float32(0.29)), real(np.float32(5 / 6))
    (0.29, 0.8333333333333334)
    """
    stored: Any = np.asarray(value)[()]
    if stored.dtype != np.float32:
        return float(stored)
    short = np.format_float_scientific(stored)  # the shortest decimal number that rounds to it
    simple = Fraction(float(stored)).limit_denominator(1000)
    if len(short.split("e")[0].replace("-", "")) <= 7 or np.float32(float(simple)) != stored:
        return float(short)
    return float(simple)


def agree(what: str, ours: Any, stored: Any) -> None:
    """Raise `Mismatch` unless a setting, or what follows from it, is the stored one."""
    if np.asarray(ours).tolist() != np.asarray(stored).tolist():
        raise Mismatch(f"{what}: {np.asarray(ours).tolist()} by the settings, {np.asarray(stored).tolist()} stored")


def ordered(answer: Assignment) -> Tensor:
    """Positions in the method's own order."""
    return answer.idx if answer.order is None else answer.order


def listed(budgets: Sequence[int]) -> str:
    """Counts for a row's text."""
    return "/".join(map(str, budgets))


def grid_of(arrays: Arrays, n: int) -> tuple[int, int]:
    """Rows and columns of n tokens: as stored, or a square."""
    side = round(n**0.5)
    height, width = (int(size) for size in arrays["grid"][-2:]) if "grid" in arrays else (side, side)
    agree("tokens of the grid", height * width, n)
    return height, width


def tensor(arrays: Arrays, name: str) -> Tensor:
    """A stored array, also of one number."""
    return torch.from_numpy(np.asarray(arrays[name]))
