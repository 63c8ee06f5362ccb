"""VScan: what the tower looks at in each window and in the whole image; the rest is averaged in, then the LLM picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.method import Method, Newlines, Per, Positions, Rounding, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import Fallback, best_first, budget_of, check_choices, check_fallback, cls_attention, cls_needs, select
from ..in_llm.pyramiddrop import PyramidDrop
from ..in_llm.schedule import in_proportion, tidy
from ..shared.nearest import nearest
from ..shared.windows import ranks_within, windows_of

Windows = Literal["auto", "4x4_windows", "4x4_tokens"]
MIDDLE, OF = (16,), 32  # the published layer of the second stage, and the depth it is meant for


@register("vscan", paper="https://arxiv.org/abs/2505.22654", seam="pre_llm")
@dataclass(frozen=True)
class VScan(Method):
    """Tokens by the CLS attention of an early layer in every window, and by that of the layer before the projector.

    1. Local: n // 2 of n tokens, the best of each window by the early layer.
    2. Global: of the others, the best by the layer that feeds the projector, until there are n.
    3. Every dropped token goes to the kept one of highest cosine, and a kept token becomes the mean of all it took in.

    By name both stages run: this, and at the middle layer of the LLM the top of the last prompt token's attention, by
    `pyramiddrop`. With keep=96 of 576 tokens 96 enter the LLM and 32 stay behind layer 16 of 32, as published. The
    official code for Qwen leaves out rotary embedding in that second stage. Here it is always applied.

    As officially shares are cut off, int(share * n). Towers without a CLS token rank by the attention that each token
    receives, as the official code for Qwen2.5-VL does. Each crop has its own budget, and newlines stay beside it.
    Tokens outside the rasters come last and are never merged.

    The official code renumbers position ids, positions="compact". (That for Qwen keeps them.)

    layer: of the local scores, as in `Signal`. 0.25 is layer 6 of 24 (LLaVA), and layer 8 of 32 (Qwen2.5-VL).
    windows: "4x4_windows" cuts a raster into 16 equal windows of n // 32 local tokens each, the official rule for
        LLaVA. "4x4_tokens" cuts it into windows of 4 x 4 tokens, the last ones longer; none gets more than an even
        share, rounded up, and the best fill n // 2: the official rule for Qwen2.5-VL, whose code fails where windows
        are full or the raster is smaller. "auto" is the first on towers with a CLS token, the second elsewhere.
    exact_budget: global tokens take the places that windows could not fill. False leaves these empty, as the official
        code for LLaVA does (98 of 100 tokens, 10 of 20).
    inner: the second stage. inner_share: of the tokens that enter the LLM, those that stay in it.
    fallback: as for `cls_attention`.
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "keep"
    rounding: ClassVar[Rounding] = "down"
    official_positions: ClassVar[Positions] = "compact"

    layer: int | float = 0.25
    windows: Windows = "auto"
    exact_budget: bool = True
    inner: bool = True
    inner_share: float = 1 / 3
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_choices(self, windows=Windows)
        check_fallback(self.fallback)
        Signal("cls", self.layer)  # checks a share
        if not 0.0 < self.inner_share <= 1.0:
            raise ValueError(
                f"inner_share={self.inner_share}: use a share in (0, 1], or inner=False for no second stage"
            )

    @property
    def exact(self) -> bool:
        return self.exact_budget

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (*cls_needs(self.layer, self.fallback), *cls_needs(None, self.fallback))

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        first = Stage("llm", self, keep=keep)
        if not self.inner or (isinstance(keep, float) and keep == 1.0):  # nothing may change then
            return [first]
        left = None if keep is None else tidy(keep * self.inner_share)
        per: Per = "image"
        if isinstance(keep, int):  # a count is one of each crop, as in the first stage
            left, per = max(1, int(tidy(keep * self.inner_share))), "crop"
        return [first, *(Stage(at, PyramidDrop(), keep=left, per=per) for at in in_proportion(MIDDLE, OF, depth))]

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        scores = [[cls_attention(v, at, self.fallback, self.name) for at in (self.layer, None)] for v in units]
        xs = [v.x.float() for v in units]
        check_finite([t for pair in scores for t in pair] + xs, "attention rows and features")
        return [self._scan(v, n, x, *pair) for v, n, x, pair in zip(units, budgets, xs, scores)]

    def _scan(self, v: Visual, n: int, x: Tensor, shallow: Tensor, deep: Tensor) -> Assignment:
        number, sizes = windows_of(v, self._equal(v), self.name)
        half, inside = n // 2, number >= 0
        most = half // len(sizes) if self._equal(v) else -(-half // len(sizes))
        found = min(half, sum(min(most, size) for size in sizes))
        low = torch.finfo(torch.float32).min
        local = best_first(shallow.masked_fill((ranks_within(number, shallow) >= most) | ~inside, low))[:found]
        apart = deep.masked_fill(~inside, low).index_fill(0, local, -torch.inf)
        ranked = torch.cat([local, best_first(apart)[: v.n - found]])
        if not self.exact_budget and n < v.n:
            n -= half - found
        order, rest = ranked[:n], ranked[n : sum(sizes)].sort().values
        if not len(rest):
            return select(order, deep)
        idx = order.sort().values
        target = nearest(normalize(x, dim=1), idx, rest)
        own = 1 / torch.ones_like(deep[:n]).index_add(0, target, torch.ones_like(deep[: len(rest)]))
        src, dst = torch.cat([idx, rest]), torch.cat([torch.arange(n, device=idx.device), target])
        return Assignment(idx, order, src, dst, torch.cat([own, own[target]]), deep)

    def _equal(self, v: Visual) -> bool:
        """True if a raster has 4 x 4 windows, False if a window has 4 x 4 tokens."""
        return self.windows == "4x4_windows" or (self.windows == "auto" and Signal("cls", None) in v.signals)
