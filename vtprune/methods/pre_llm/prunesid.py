"""PruneSID: tokens are grouped by principal directions, and every group keeps its best that have no double."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.errors import UnsupportedModel
from ...core.method import Method, Newlines, Per, Positions
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, check_choices, select, signal_of
from ..shared.doubles import mean_likeness, survivor_quota, survivors
from ..shared.principal import principal_parts
from ..shared.text import note

Rule = Literal["auto", "cls", "component"]
Directions = Literal["exact", "random"]
Order = Literal["positional", "official"]
Cls = Literal["absent", "keep"]
CLS, HIDDEN = Signal("cls", None), Signal("hidden", None)


@register("prunesid", paper="https://arxiv.org/abs/2603.09480", seam="pre_llm")
@dataclass(frozen=True)
class PruneSID(Method):
    """Principal directions of all tokens form groups; in each, suppression of doubles ranks the tokens.

    1. Of a budget of n tokens, G = n // 4 principal directions V [N, G] are taken of sigmoid(features) [N, C], each
       token less its own mean. The group of token i is the largest of |V_i|.
    2. In a group the best token by its score survives and suppresses those with a cosine above theta, and so on.
       Survivors rank first, then the suppressed by score.
    3. Every group gets one token, and the others in proportion to survivors (cumulative shares, half to even), up to
       5 * ceil(n / 64) and to its survivors; these limits are raised until n tokens fit. What is left goes to the
       groups of most survivors.

    rule: "cls" (officially for LLaVA) scores by the CLS attention of the layer before the projector and compares its
        features there. theta is n / 32 times the mean cosine of two tokens. "component" (officially for Qwen2-VL)
        scores by |V| of the own group and compares what the LLM gets, in 4 groups at least. theta is max(18 n / N, 1)
        times the mean of the whole cosine matrix with zeros below its diagonal. "auto" is the first on towers with a
        CLS token, and the second elsewhere.
    directions: "exact" ones, or "random" as in the official code: a randomised decomposition of rank G with two power
        iterations, here of `seed`. Two official runs share 56 to 84 % of their tokens.
    order: "positional", or "official": the kept places are filled group by group, as in the official code for LLaVA,
        meant for positions="compact".
    cls: "keep" if the unit's first token is the tower's CLS token (vision_feature_select_strategy="full"): it always
        stays and counts in the budget, as officially.

    All is computed in float64, so that a choice does not hang on the device. As officially for LLaVA each crop has its
    own budget and newlines are dropped. A share is rounded to a count, half to even; the official code for Qwen2-VL
    keeps 16 tokens at least. A GPU is waited for where it finds the directions.

    The official code renumbers position ids, positions="compact". (That for Qwen2-VL keeps them.)
    """

    per: ClassVar[Per] = "crop"
    newlines: ClassVar[Newlines] = "drop"
    official_positions: ClassVar[Positions] = "compact"

    rule: Rule = "auto"
    directions: Directions = "exact"
    seed: int = 0
    order: Order = "positional"
    cls: Cls = "absent"

    def __post_init__(self) -> None:
        check_choices(self, rule=Rule, directions=Directions, order=Order, cls=Cls)

    @property
    def needs(self) -> tuple[Signal, ...]:
        return () if self.rule == "component" else (CLS, HIDDEN)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [budget_of(v, self.name) for v in units]
        read = [self._read(v) for v in units]
        check_finite([t for pair in read for t in pair if t is not None], "attention rows and features")
        return [self._prune(n, *pair) for n, pair in zip(budgets, read)]

    def _read(self, v: Visual) -> tuple[Tensor, Tensor | None]:
        """Features [N, C] to compare, and the CLS attention [N] or None."""
        if self.rule == "auto" and CLS not in v.signals:
            note(v, f"{self.name}: the tower has no CLS token, rule='component' is used")
            return v.x.float(), None
        if self.rule == "component":
            return v.x.float(), None
        if CLS not in v.signals:
            raise UnsupportedModel(
                f"{self.name} with rule='cls' needs the attention of a CLS token, and this tower has none: pass "
                "rule='component' to rank by the principal directions"
            )
        return signal_of(v, HIDDEN, self.name), v.signals[CLS].float()

    def _prune(self, n: int, features: Tensor, scores: Tensor | None) -> Assignment:
        first = int(self.cls == "keep")
        if n == len(features):
            return select(torch.arange(n, device=features.device), scores)
        order = torch.arange(first, device=features.device)
        if n > first:
            picked = self._pick(n, n - first, features[first:], None if scores is None else scores[first:])
            order = torch.cat([order, picked + first])
        if self.order == "positional":
            return select(order, scores)
        shown = torch.arange(n, device=order.device)
        return Assignment(order.sort().values, order, order, shown, torch.ones_like(features[:n, 0]), scores)

    def _pick(self, budget: int, n: int, x: Tensor, scores: Tensor | None) -> Tensor:
        """n of the rows of x [N, C], group by group; the rule's counts are of the whole `budget`."""
        seed = None if self.directions == "exact" else self.seed
        parts = principal_parts(x, max(budget // 4, 4 if scores is None else 1), seed)
        group = parts.argmax(1)
        score = parts.gather(1, group[:, None])[:, 0] if scores is None else scores.double()
        empty = torch.zeros(parts.shape[1], dtype=torch.int64, device=x.device)
        del parts
        size = empty.scatter_add(0, group, torch.ones_like(group))
        unit = normalize(x.detach().double(), dim=1)
        theta = mean_likeness(unit, itself=scores is None)
        theta *= budget / 32 if scores is not None else max(18 * budget / len(x), 1.0)
        order = best_first(score)
        cuts = size.tolist() if x.device.type == "cpu" else [len(x)]  # a GPU would have to be waited for
        of, at = group[order].sort(stable=True)
        ranked = order[at]  # group by group, best first
        alive = torch.cat([survivors(unit[some], group[some], theta) for some in ranked.split(cuts) if len(some)])
        quota = survivor_quota(empty.scatter_add(0, of, alive.long()), size, budget, n)
        ranked = ranked[(2 * of + ~alive).argsort(stable=True)]  # survivors come first in their group
        rank = torch.arange(len(of), device=of.device) - torch.searchsorted(of, of)
        return ranked[best_first((rank < quota[of]).to(torch.int8))[:n]]
