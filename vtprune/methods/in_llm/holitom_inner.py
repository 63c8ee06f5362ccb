"""HoliTom's inner merge: what the last prompt token looks at stays, the rest flows into what it resembles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.method import Method, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, signal_of
from ..shared.nearest import nearest
from .schedule import check_layer, layer_at

LAST_ROW = Signal("last_row", -1)


@register("holitom_inner", paper="https://arxiv.org/abs/2505.21334", seam="in_llm")
@dataclass(frozen=True)
class HoliTomInner(Method):
    """Top-k of the last query's softmax row in the layer before; each dropped token merges into its likeness.

    A dropped token goes to the kept one of highest cosine similarity of hidden states (the lower index among equals).
    As in the official code the merge is a running halving in ascending order, h <- (h + h_i) / 2: of n tokens that
    join, the q-th weighs 2^-(n - q + 1), the kept one 2^-n. Here it is one weighted sum of the states as they came.
    Position ids are kept. The layer before is causal; the official code under SDPA runs it without a mask.

    Without keep half of the tokens that reach the layer stay, as the authors have it. Shares are rounded to a count,
    half to even, as officially.

    layer: the first decoder layer that runs on the pruned sequence: an int >= 1, or a share of the depth in (0, 1),
        rounded. The authors use 18 of 28 layers.
    """

    reads_text: ClassVar[bool] = True
    layer: int | float = 18 / 28

    def __post_init__(self) -> None:
        check_layer(self.name, self.layer)

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (LAST_ROW,)

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        return [Stage(layer_at(self.layer, depth), self, keep=keep)]

    def __call__(self, v: Visual) -> Assignment:
        row = signal_of(v, LAST_ROW, self.name)
        n = max(1, round(v.n / 2)) if v.budget is None else budget_of(v, self.name)
        x = v.x.float()
        check_finite([row, x], "last-query attention rows and hidden states")
        order = best_first(row)
        idx, rest = order[:n].sort().values, order[n:].sort().values
        target = nearest(normalize(x, dim=1), idx, rest)
        joined, own = _halvings(target, n)
        src, dst = torch.cat([idx, rest]), torch.cat([torch.arange(n, device=idx.device), target])
        return Assignment(idx, order[:n], src, dst, torch.cat([own, joined]), row)


def _halvings(target: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Weights of a running halving: of the tokens that join, in order, each going to target, and of the n that stay."""
    by_target = target.sort(stable=True)
    places = torch.arange(n, device=target.device)
    ends = torch.searchsorted(by_target.values, places, right=True)
    later = ends[by_target.values] - torch.arange(1, len(target) + 1, device=target.device)
    joined = torch.empty_like(later, dtype=torch.float32).scatter(0, by_target.indices, 0.5 * 0.5**later)
    count = ends - torch.searchsorted(by_target.values, places)
    return joined, 0.5**count
