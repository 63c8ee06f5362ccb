"""GlobalCom2: the overview of an image shares the budget out over its crops and has a say in what each crop keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.kernels import check_finite

from ...core.method import Method, Newlines, Positions, Rounding
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import create
from ...registry import register_own as register
from .. import Fallback, best_first, budget_of, check_choices, check_fallback, cls_attention
from ..shared.arrange import Order, arranged
from ..shared.counting import ranks
from ..shared.parts import Parts, ask_each, enlarged, parts_of, raster_turns
from ..shared.quota import quota, shares_of_cells

LOGITS = Signal("cls_logits", -1)
LAST = 1 << 60  # behind every turn


@register("globalcom2", paper="https://arxiv.org/abs/2501.05179", seam="pre_llm")
@dataclass(frozen=True)
class GlobalCom2(Method):
    """Overview and crops of an any-resolution image, each with its own share of the budget.

    l: [N] scores, the CLS row of the tower's last layer before the softmax. With retention R the overview keeps the
    int(n R) tokens of largest l. Crop p of n_p tokens keeps int(n_p min(1, R s_p)), s the shares that the scores of the
    overview give to its cells (`shares_of_cells`): those of largest l / |l| + g / |g|, norms over the crop, g the
    scores of the overview enlarged to the mosaic. With a budget, n and n_p s_p share it (`quota`), and what a crop
    cannot take goes to the others; a share of all tokens is cut off to a count. An image without crops, and a video,
    is an overview alone. Newlines are kept beside the budget; the official code also has those of rows that are
    padding. The official code renumbers position ids, positions="compact". Several images of a prompt each go by their
    own overview, officially by that of the first.

    ratio: R without keep; the counts then need one transfer to the host per batch. At least one token stays.
    temperature: of the softmax over cells; the smaller it is, the more the best cell takes.
    inside: name of a registered method that acts before the LLM, with its default options: it is asked about the
        overview and each crop on its own, with the share that the part has of the budget, in place of the scores
        above. Needs one transfer to the host per batch. A part without a share keeps nothing.
    order: "positional", or "official": the kept places are filled with the overview by descending score, then with the
        crops in raster order, where token number i of those of a crop that are no padding counts as number i of all.
    fallback: on towers without CLS token "received" takes the logarithm of the attention that every token receives,
        less its mean, noted in `Visual.state["note"]`, and "error" raises UnsupportedModel.
    """

    newlines: ClassVar[Newlines] = "keep"
    rounding: ClassVar[Rounding] = "down"
    official_positions: ClassVar[Positions] = "compact"

    ratio: float = 0.25
    temperature: float = 10.0
    inside: str | None = None
    order: Order = "positional"
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_choices(self, order=Order)
        check_fallback(self.fallback)
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio={self.ratio}: use a share in (0, 1]")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: use a finite number > 0, such as 10")
        if self.inside is not None and (self._inner.seam != "pre_llm" or isinstance(self._inner, GlobalCom2)):
            raise ValueError(
                f"inside={self.inside!r}: name another method that acts before the LLM, such as 'divprune'"
            )

    @property
    def _inner(self) -> Method:
        return create(self.inside or "").resolved

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def exact(self) -> bool:
        return self.inside is None or self._inner.exact

    @property
    def trusted(self) -> bool:
        return super().trusted and (self.inside is None or self._inner.trusted)

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        """As of the method that chooses inside the parts."""
        return self.inside is not None and self._inner.reads_text

    @property
    def needs(self) -> tuple[Signal, ...]:
        own = (LOGITS,) if self.fallback == "error" else (LOGITS, Signal("received", -1, without_cls=True))
        return own if self.inside is None else tuple(dict.fromkeys((*own, *self._inner.needs)))

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        budgets = [None if v.budget is None else budget_of(v, self.name) for v in units]
        logits = [self._logits(v) for v in units]
        check_finite(logits, "CLS rows")
        parts = [parts_of(v) for v in units]
        counts = [self._counts(row, p, n) for row, p, n in zip(logits, parts, budgets)]
        read: list[list[int]] = []
        if self.inside is not None or None in budgets:
            read = [c.tolist() for c in torch.cat(counts).cpu().split([len(c) for c in counts])]
        if self.inside is not None:
            inner = self._inner
            return [ask_each(inner, v, p, c) for v, p, c in zip(units, parts, read)]
        totals = [sum(read[i]) if n is None else n for i, n in enumerate(budgets)]
        return [self._pick(*unit) for unit in zip(logits, parts, counts, totals)]

    def _logits(self, v: Visual) -> Tensor:
        if LOGITS in v.signals:
            return v.signals[LOGITS].float()
        row = cls_attention(v, -1, self.fallback, self.name).clamp(min=torch.finfo(torch.float32).tiny).log()
        return row - row.mean()

    def _counts(self, logits: Tensor, parts: Parts, budget: int | None) -> Tensor:
        """[parts] int64: how many tokens each keeps."""
        each = torch.cat([torch.full((1,), len(at), device=logits.device) for at in parts.at]).double()
        share = torch.ones_like(each)
        if parts.cells != (0, 0):
            overview = logits[parts.at[0]].view(parts.grids[0])
            share[1:-1] = shares_of_cells(overview.double(), parts.cells, self.temperature)
        share[-1] = 0
        if budget is not None:
            return quota(each * share, budget, each.long())
        counts = (each * (self.ratio * share).clamp(max=1)).floor().long()
        return torch.cat([counts[:1].clamp(min=1), counts[1:]])

    def _scores(self, logits: Tensor, parts: Parts) -> list[Tensor]:
        """One score [n_p] for each token of each part."""
        own = [logits[at] for at in parts.at]
        if parts.cells == (0, 0):
            return own
        pairs = zip(own[1:-1], enlarged(own[0], parts))
        return [own[0], *(normalize(a, dim=0) + normalize(g, dim=0) for a, g in pairs), own[-1]]

    def _pick(self, logits: Tensor, parts: Parts, counts: Tensor, total: int) -> Assignment:
        scores = self._scores(logits, parts)
        kept = torch.cat([ranks(s) < n for s, n in zip(scores, counts)])
        first = best_first(scores[0])
        # Positions, the overview by score; then how the official code orders those of the crops.
        at = torch.cat([parts.at[0][first], *parts.at[1:]])
        kept = torch.cat([kept[: len(first)][first], kept[len(first) :]])
        turn = torch.cat([torch.arange(len(first), device=at.device), len(first) + raster_turns(parts, at.device)])
        order = at[torch.where(kept, turn, LAST).argsort(stable=True)[:total]]
        return arranged(order, torch.zeros_like(logits).scatter(0, torch.cat(parts.at), torch.cat(scores)), self.order)
