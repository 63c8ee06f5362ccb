"""FlowCut: prune a little after every other tower block, by what flows to and from the CLS token."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...core.method import Method, Newlines, Stage, Where
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_rows_finite, to_device
from ...registry import register_own as register
from .. import best_first, budget_of, check_choices, signal_of
from ..in_llm.flowcut_llm import FlowCutLLM
from ..shared.ragged import Ragged

End = Literal["before", "after"]
Count = Literal["unit", "batch"]
Unit = Literal["block", "patch"]
CLS, CLS_VALUE, VALUE_NORM = Signal("cls"), Signal("cls_value"), Signal("value_norm")
MEAN_QUERY = Signal("mean_query", without_cls=True)
NO_CLS = "no CLS token in this tower; the mean query stands in, no value similarity"


@register("flowcut", paper="https://arxiv.org/abs/2505.19536", seam="in_vit")
@dataclass(frozen=True)
class FlowCut(Method):
    """Cumulative information flow, with a schedule that prunes faster the more concentrated the attention is.

    After a block with n tokens left and t to reach, token j scores (p_j + q_j) * e_j: its share p of the CLS token's
    attention, its share q of the softmax of value similarity with CLS, and the L1 norm e of its mean value. Scores
    accumulate, half old, half new. With R blocks to go the block prunes if R is even: round((n - t) / sqrt(R) *
    (1 - H^2)) tokens, H the entropy of p relative to log n; at R = 0 whatever is above t.
    A tower without CLS uses the attention of the mean query for p and no q, as the official code for Qwen2-VL does.
    In towers that merge patches a token is a whole merge block and its score is made of the means over its patches.

    end: "before" reaches t as the last block is entered (official code for LLaVA), "after" as it is left (Qwen).
    llm_layer: a decoder layer (2 in the official codes) where `flowcut_llm` goes on to the budget of the sample; the
        tower then keeps `tower` budgets. None prunes in the tower only, as the official code for LLaVA-1.5 does.
    tower: budgets that a crop keeps in the tower before that, a count cut off. 2 in the official code for Qwen2-VL; in
        that for LLaVA-NeXT half of the count that the sample ends with, so 0.5.
    count: "unit" lets each crop have its own number of tokens on the way, so a batch equals its images alone; "batch"
        prunes from all crops the most any of them would, as the official code does.
    unit: "patch" drops single patches where the tower merges several into a token, as the official Qwen code does: a
        token is then made of patches that need not have been neighbours, and stands where the first of them stood.
    """

    newlines: ClassVar[Newlines] = "drop"
    end: End = "before"
    count: Count = "unit"
    llm_layer: int | None = None
    tower: float = 2.0
    unit: Unit = "block"

    def __post_init__(self) -> None:
        check_choices(self, end=End, count=Count, unit=Unit)
        if isinstance(self.tower, bool) or not isinstance(self.tower, int | float) or not self.tower > 0:
            raise ValueError(f"tower={self.tower!r}: use a number above 0, the budgets that a crop keeps in the tower")

    @property
    def by_patch(self) -> bool:
        return self.unit == "patch"

    @property
    def needs(self) -> tuple[Signal, ...]:
        return CLS, CLS_VALUE, MEAN_QUERY, VALUE_NORM

    def default_where(self) -> Where:
        return "vit", slice(1, None if self.end == "before" else sys.maxsize)

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        if self.llm_layer is None or keep is None:
            return super().stages(keep, depth)
        first = min(1.0, self.tower * keep) if isinstance(keep, float) else max(1, int(self.tower * keep))
        second = FlowCutLLM(layer=self.llm_layer)
        return [Stage(self.default_where(), self, keep=first), Stage(self.llm_layer, second, keep=keep)]

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        left = [v.block[1] - v.block[0] if v.block else 0 for v in units]
        all_of = Ragged([v.n for v in units], units[0].x.device)
        p, scores = self._scored(units, all_of)
        check_rows_finite(scores, "scores")
        stay = Ragged([v.n - cut for v, cut in zip(units, self._cuts(units, p, left))], p.device)
        # Scores are 0 or more, and equal ones stay in positional order: the zeros of padding come last.
        order = best_first(scores)
        kept = stay.ascending(order)
        if any(left):
            for v, own in zip(units, stay.parted(scores.gather(1, kept.clamp(max=all_of.width - 1)))):
                v.state["scores"] = own
        answers = zip(stay.parted(kept), stay.parted(order), all_of.parted(scores))
        return [Assignment(idx=idx, order=picked, scores=own) for idx, picked, own in answers]

    def _scored(self, units: Sequence[Visual], rows: Ragged) -> tuple[Tensor, Tensor]:
        """Attention shares p and cumulative scores, [I, most tokens] float32."""
        of_cls = [CLS in v.signals or MEAN_QUERY not in v.signals for v in units]
        seen = [signal_of(v, CLS if cls else MEAN_QUERY, self.name) for v, cls in zip(units, of_cls)]
        norms = [signal_of(v, VALUE_NORM, self.name) for v in units]
        found = zip(units, of_cls, seen)
        alike = [signal_of(v, CLS_VALUE, self.name) if cls else torch.zeros_like(x) for v, cls, x in found]
        attention, likeness, norm = rows.joined(seen, alike, norms)
        p = _share(attention)
        scores = (p + _share(likeness)) * norm
        for v, cls in zip(units, of_cls):
            if not cls:
                v.state["note"] = f"{self.name}: {NO_CLS}"
        olds: list[Tensor] = [v.state["scores"] for v in units if "scores" in v.state]
        if olds and len(olds) < len(units):
            olds = [v.state.get("scores", new) for v, new in zip(units, rows.parted(scores))]
        if olds:
            scores = 0.5 * rows.joined(olds)[0] + 0.5 * scores
        return p, scores

    def _cuts(self, units: Sequence[Visual], p: Tensor, left: Sequence[int]) -> list[int]:
        """Tokens to drop now; their number depends on the data, so the host waits for it once per pruning block."""
        above = [v.n - budget_of(v, self.name) for v in units]
        if any(r % 2 for r in left):
            return [0] * len(units)
        if not any(left):
            return above
        # (n - t) / sqrt(R) * (1 - H^2), where x log x is 0 at 0.
        logs, paces = [log(max(2, v.n)) for v in units], [a / sqrt(r) for a, r in zip(above, left)]
        log_n, pace = to_device(torch.tensor([logs, paces], dtype=torch.float64), p.device)
        wanted = pace * (1 - (torch.xlogy(p, p).sum(1, dtype=torch.float64) / log_n).square())
        drop = (wanted.max().expand_as(wanted) if self.count == "batch" else wanted).round().long().tolist()
        return [max(0, min(d, a)) for d, a in zip(drop, above)]


def _share(x: Tensor) -> Tensor:
    """x [I, M] by its row sums; these in double precision, where the zeros of padding change no bit."""
    return x / x.sum(1, keepdim=True, dtype=torch.float64).to(x.dtype).clamp(min=torch.finfo(x.dtype).tiny)
