"""SpAtten: a token that received little attention so far leaves, and is gone in all later layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.method import Method, Per, Stage, Where, check_keep
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import best_first
from .schedule import check_layers, check_one, check_shares, in_proportion, in_steps_of
from .spatten_heads import SpAttenHeads, best_of

RECEIVED = Signal("received_so_far", -1)
# Of the authors' workload for GPT-2 medium (mit-han-lab/spatten, spatten_hardware/hardware/workloads), 24 layers.
PUBLISHED, OF, SHARES = (2, 3, 5, 11), 24, (0.9, 0.8, 0.6, 0.3)
PUBLISHED_HEADS, HEAD_SHARES = (16, 22), (0.8, 0.6)


@register("spatten", paper="https://arxiv.org/abs/2012.09852", seam="in_llm")
@dataclass(frozen=True)
class SpAtten(Method):
    """Top-k of s_j = the sum of A_ij over heads, queries i and all layers so far, at a few layers, for good (cascade).

    1. In every layer each token j gathers s_j, and the sum goes on from layer to layer and from stage to stage. The
       queries of text count as those of images do. Under a causal mask early tokens gather more, because more queries
       see them: so it is in the paper.
    2. At each of `layers` the visual tokens of the highest s_j stay. Text is never dropped here.
    3. What is dropped is gone in all later layers.

    `keep` is what the last stage leaves; the stages before it drop 1/7, 2/7 and 4/7 of what it drops. Without keep the
    shares are 0.9, 0.8, 0.6 and 0.3, the authors' workload (they prune while generating, this while the prompt is
    read). A count is tripled, multiplied by 8/3 and doubled there. A `Stage` of your own without keep leaves half of
    the tokens it sees. Counts are rounded, and position ids are kept. The heads and values below are made zero: that
    shows what accuracy they cost, and the gain is one of hardware.

    layers: decoder layers >= 1 whose input is pruned, ascending; None: 2, 3, 5 and 11 of 24, in proportion.
    ratios: shares that stay at each of `layers`, none above the one before, in place of `keep`.
    heads: share (or number) of query heads that speak from 22/24 of the depth on; half of the others fall silent at
        16/24 (`SpAttenHeads`), neither before the last of `layers`. The authors use 0.6; None: all speak.
    values: in all layers and calls, text alone included, the share of the keys it may see whose values a query of a
        head fetches, those of its largest softmax weights, cut off to an integer >= 1. The others count as zero, and
        weights are not normalised again (from memory of the paper, unverified). The authors use 0.3; None: all.
    """

    reads_text: ClassVar[bool] = True
    per: ClassVar[Per] = "sample"
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    heads: float | int | None = None
    values: float | None = None

    def __post_init__(self) -> None:
        check_layers(self.name, self.layers)
        check_shares(self.name, self.ratios, len(self.layers or PUBLISHED))
        object.__setattr__(self, "heads", check_keep(self.heads, "heads"))
        if self.layers and self.layers[0] < 1:
            raise ValueError(f"layers={self.layers}: {self.name} reads the layers before, so use >= 1")
        if self.values is not None and not (isinstance(self.values, float) and 0.0 < self.values <= 1.0):
            raise ValueError(f"values={self.values!r}: use a float in (0, 1], a share of the keys, or None for all")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def reweighs(self) -> bool:
        return self.values is not None

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (RECEIVED,)

    def default_where(self) -> Where:
        return self.layers[0] if self.layers else PUBLISHED[0]

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        check_one(self.name, keep, self.ratios)
        layers = self.layers or in_proportion(PUBLISHED, OF, depth)
        shares = self.ratios or in_steps_of(SHARES, SHARES[-1] if keep is None else keep, len(layers))
        stages = [Stage(layer, self, keep=share) for layer, share in zip(layers, shares)]
        if self.heads is None:
            return stages
        silent = in_proportion(PUBLISHED_HEADS, OF, depth, floor=layers[-1])
        count = in_steps_of(HEAD_SHARES, self.heads, len(silent))
        return stages + [Stage(layer, SpAttenHeads(), keep=share) for layer, share in zip(silent, count)]

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        return best_of(self, units, RECEIVED)

    def reweigh(self, rows: Tensor, seen: Tensor) -> Tensor:
        assert self.values is not None
        count = (seen.double() * self.values).floor().clamp(min=1)[..., None]
        first = torch.arange(rows.shape[-1], device=rows.device) < count
        return rows * torch.zeros_like(rows).scatter(-1, best_first(rows), first.expand(rows.shape).to(rows))
