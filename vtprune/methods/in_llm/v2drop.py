"""V2Drop: drop the visual tokens that the layer before hardly changed, in three steps down to a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.method import Method, Rounding, Stage, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, select, signal_of
from .schedule import check_layers, check_one, in_proportion, in_steps_of, pyramid

CHANGE = Signal("layer_change", -1)
PUBLISHED, OF = (3, 17, 22), 32  # the published layers, and the depth they are meant for
SHARES = (0.5, 0.25, 0.0)  # of the tokens before the first stage; the last stage leaves a single one


@register("v2drop", paper="https://arxiv.org/abs/2509.01552", seam="in_llm")
@dataclass(frozen=True)
class V2Drop(Method):
    """Top-k of |h_out - h_in|, the L2 norm of what the layer before added to a token, at three layers.

    Without keep: the published list, which leaves half of the tokens, a quarter, and then a single one; in a `Stage` of
    your own half of the tokens it sees. `keep` is what the last stage leaves. For a share the stages before drop half
    and three quarters of what it drops, as published; a count is doubled for each stage before. Shares are of the
    tokens as the model sees them unpruned, cut off to a count as officially: int(share * n), at least one. No attention
    is read, so any attention implementation serves, and layers of linear attention do too. Position ids are kept.

    layers: decoder layers >= 1 whose input is pruned, ascending; None: 3, 17 and 22 of 32, in proportion to the depth.
    ratios: shares of the unpruned tokens that stay at each of `layers`, none above the one before, in place of `keep`;
        0 leaves one token. The official list (0.5, 0.5, 0) is of what the stage before left, here (0.5, 0.25, 0).
    """

    rounding: ClassVar[Rounding] = "down"
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_layers(self.name, self.layers)
        if self.layers and self.layers[0] < 1:
            raise ValueError(f"layers={self.layers}: {self.name} reads the layer before the first stage, so use >= 1")
        if self.ratios is None:
            return
        count = len(PUBLISHED if self.layers is None else self.layers)
        if len(self.ratios) != count:
            raise ValueError(f"ratios={self.ratios!r}: {self.name} has {count} stages, give one share for each")
        if not all(0.0 <= s <= 1.0 for s in self.ratios) or list(self.ratios) != sorted(self.ratios)[::-1]:
            raise ValueError(f"ratios={self.ratios!r}: {self.name} needs shares in [0, 1], none above the one before")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (CHANGE,)

    def default_where(self) -> Where:
        return self.layers[0] if self.layers else PUBLISHED[0]

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        check_one(self.name, keep, self.ratios)
        layers = self.layers or in_proportion(PUBLISHED, OF, depth)
        shares: Sequence[float | int] = self.ratios or ()
        if isinstance(keep, int):
            shares = pyramid(keep, len(layers))
        elif not shares:
            shares = in_steps_of(SHARES, 0.0 if keep is None else keep, len(layers))
        # A share of nothing leaves one token, as the official code does.
        return [Stage(layer, self, keep=share or 1) for layer, share in zip(layers, shares)]

    def __call__(self, v: Visual) -> Assignment:
        change = signal_of(v, CHANGE, self.name)
        check_finite([change], "signals of changing hidden states")
        count = max(1, v.n // 2) if v.budget is None else budget_of(v, self.name)
        return select(best_first(change)[:count], scores=change)
