"""Withdraw: drop all visual tokens behind a decoder layer, once the text no longer looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.kernels import check_finite

from ...core.method import Method, Per, Stage, trust
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import part
from .. import signal_of

FROM_TEXT, TO_TEXT = Signal("from_text", -1), Signal("to_text", -1)


@trust
@part
@dataclass(frozen=True)
class Withdraw(Method):
    """Stage 2 of ToDRE (https://arxiv.org/abs/2505.18757), and with threshold=None visual tokens withdrawal
    (https://arxiv.org/abs/2405.05803). Use it in a `Stage` without keep:

    >>> vtprune.patch(model, Stage(28, Withdraw()))

    threshold: drop them iff both the share of attention that the text gives to all visual tokens and the share that
        these give to the text are below it in the layer that ran just before (means over heads and queries); text is
        what stands behind the first visual token. None drops them without a test. The test waits for the device.
    """

    reads_text: ClassVar[bool] = True
    name: ClassVar[str] = "withdraw"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.05803"
    seam: ClassVar[str] = "in_llm"
    per: ClassVar[Per] = "sample"

    threshold: float | None = 0.1

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold={self.threshold}: choose a share in (0, 1], or None to drop without a test")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return () if self.threshold is None else (FROM_TEXT, TO_TEXT)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        whole = [torch.arange(v.n, device=v.x.device) for v in units]
        if any(v.budget is not None for v in units):
            raise ValueError(f"{self.name} drops all visual tokens of a sample or none: leave out keep")
        if self.threshold is None:
            return [Assignment(all_[:0]) for all_ in whole]
        looked = [signal_of(v, FROM_TEXT, self.name).sum() for v in units]  # alpha t -> v
        looks = [signal_of(v, TO_TEXT, self.name).mean() for v in units]  # alpha v -> t
        check_finite([*looked, *looks], "shares of attention")
        fades = (torch.stack([*looked, *looks]) < self.threshold).view(2, -1).all(0).tolist()
        return [Assignment(all_[:0] if gone else all_) for all_, gone in zip(whole, fades)]


def withdrawals(depth: int, threshold: float) -> list[Stage]:
    """ToDRE's second stage: layers from 7/8 of the depth on are tested, and the tokens go behind the first that passes.

    depth: decoder layers of the model; a model of fewer than 9 has none to test and to spare.
    """
    return [Stage(layer + 1, Withdraw(threshold)) for layer in range(7 * depth // 8, depth - 1)]
