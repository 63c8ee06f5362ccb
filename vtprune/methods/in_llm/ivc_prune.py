"""IVC-Prune: keep what the question's values look at, and visual tokens whose rotary positions anchor the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.method import Method, Stage
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import best_first, budget_of, check_parts, select, signal_of

ROWS, VALUES, LOGSUM = Signal("value_rows", -1), Signal("values", -1), Signal("value_logsum", -1)
COS, SIN = Signal("rope_cos", -1), Signal("rope_sin", -1)


@register("ivc_prune", paper="https://arxiv.org/abs/2602.03060", seam="in_llm")
@dataclass(frozen=True)
class IVCPrune(Method):
    """Foreground by the likeness of values, and anchors by rotary tables, in the layer before `layer`.

    1. w_ij is the softmax over all tokens j of v_i . v_j / sqrt(d), without a causal mask, averaged over the heads of
       the values. Seeds are the visual tokens of the largest mean w over the question's tokens i.
    2. The foreground are the visual tokens of the largest mean w over the seeds and the question's tokens together.
    3. Anchors are the visual tokens of the largest mean cosine in the rotary table of their positions, and those of the
       largest mean sine, so many of each.
    4. Foreground and anchors stay.

    Without keep the shares are of the n tokens that reach the layer: max(1, round(seeds * n)) seeds, round(foreground *
    n) tokens of the foreground (at least one) and round(anchors * n) anchors of each kind, half to even. How many there
    are together depends on the image, so the host waits for the device once. With keep exactly that many stay: of the
    budget anchors / (anchors + foreground), but half at most, are anchors of each kind, and the rest is the best
    foreground beside them. The official code drops the other tokens from the caches of the layers before, too; here
    these keep theirs. Position ids are kept.

    Layers of linear attention have no values to read, and are refused by name; so are rotary embeddings of several axes
    that decoder layers merge by themselves (Qwen2-VL in old releases of transformers).

    seeds, foreground, anchors: shares of the tokens.
    skip: tokens behind the image that are not of the question, such as line breaks; 2 in the prompt of LLaVA-1.5. A
        text that is not longer counts whole.
    layer: the first decoder layer that runs on the pruned sequence: an int >= 1, or a share of the depth in (0, 1),
        rounded. The authors use 16 of 32 layers, and others by model.
    """

    reads_text: ClassVar[bool] = True
    seeds: float = 0.01
    foreground: float = 0.2
    anchors: float = 0.05
    skip: int = 2
    layer: int | float = 0.5

    def __post_init__(self) -> None:
        check_parts(seeds=self.seeds, foreground=self.foreground, anchors=self.anchors)
        if not self.foreground:
            raise ValueError("foreground=0.0: use a share in (0, 1], because the anchors do not look at the image")
        if isinstance(self.skip, bool) or not isinstance(self.skip, int) or self.skip < 0:
            raise ValueError(f"skip={self.skip!r}: use an int >= 0")
        ways = "use an int >= 1 or a share of the depth in (0, 1)"
        if isinstance(self.layer, bool) or not isinstance(self.layer, int | float):
            raise TypeError(f"layer={self.layer!r} is a {type(self.layer).__name__}: {ways}")
        if not (self.layer >= 1 if isinstance(self.layer, int) else 0.0 < self.layer < 1.0):
            raise ValueError(f"layer={self.layer}: {self.name} reads the layer before, so {ways}")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return ROWS, VALUES, LOGSUM, COS, SIN

    def stages(self, keep: float | int | None, depth: int) -> list[Stage]:
        layer = self.layer if isinstance(self.layer, int) else max(1, min(depth - 1, round(self.layer * depth)))
        return [Stage(layer, self, keep=keep)]

    def __call__(self, v: Visual) -> Assignment:
        rows, values, logsum, cos, sin = (signal_of(v, need, self.name) for need in self.needs)
        check_finite([rows, values, logsum, cos, sin], "signals of values and rotary tables")
        question = rows[:, self.skip :] if rows.shape[1] > self.skip else rows  # [n, q]
        seeds = best_first(question.mean(1))[: max(1, round(self.seeds * v.n))]
        of_seeds = _rows_of(seeds, values, logsum)
        looked = (question.sum(1) + of_seeds.sum(0)) / (question.shape[1] + len(seeds))
        budget = None if v.budget is None else budget_of(v, self.name)
        if budget is None:
            anchors = round(self.anchors * v.n)
        else:
            anchors = min(budget // 2, round(budget * self.anchors / (self.anchors + self.foreground)))
        order = torch.cat([best_first(cos)[:anchors], best_first(sin)[:anchors]])
        anchored = torch.zeros_like(looked, dtype=torch.bool).index_fill(0, order, True)
        if budget is not None:
            return select(best_first(looked.masked_fill(anchored, torch.inf))[:budget], scores=looked)
        foreground = best_first(looked)[: max(1, round(self.foreground * v.n))]
        kept = anchored.index_fill(0, foreground, True)
        return Assignment(kept.nonzero().flatten(), scores=looked)


def _rows_of(seeds: Tensor, values: Tensor, logsum: Tensor) -> Tensor:
    """[s, n]: the rows of the seeds, restricted to the n tokens. values: [n, G * d]; logsum: [n, G]."""
    n, groups = logsum.shape
    by_head = values.view(n, groups, -1).transpose(0, 1)  # [G, n, d]
    logits = by_head[:, seeds] @ by_head.mT * by_head.shape[-1] ** -0.5
    rows: Tensor = (logits - logsum[seeds].T[:, :, None]).exp().mean(0)
    return rows
