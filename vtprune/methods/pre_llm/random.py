"""Random tokens: the control that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.kernels import check_finite, to_device

from ...core.method import Method
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import budget_of, select


@register("random", paper="https://arxiv.org/abs/2403.06764", seam="pre_llm")
@dataclass(frozen=True)
class Random(Method):
    """Uniformly random tokens (what FastV's code does at K = 0).

    seed: the draw depends on it and on the number of tokens only, so that repeated calls agree, a batch
        equals its samples one by one on every device, and a smaller budget keeps a subset of a larger one. Two
        images of equal size therefore keep the same positions; average over seeds.
    """

    seed: int = 0

    def __call__(self, v: Visual) -> Assignment:
        check_finite([v.x])
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(v.n, generator=generator)[: budget_of(v, self.name)]
        return select(to_device(order, v.x.device))
