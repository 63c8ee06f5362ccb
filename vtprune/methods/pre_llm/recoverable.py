"""Recoverable Compression: keep what stands out, to the image or to the text, and merge the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.method import Method, Newlines
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...kernels import check_finite
from ...registry import register_own as register
from .. import Fallback, budget_of, check_fallback, cls_attention, signal_of
from ..shared.anchors import merge_into_anchors
from ..shared.counting import beyond_best, in_proportion, ranks, share_of
from ..shared.lof import outliers
from ..shared.text import prompt_similarity

CLS, KEYS = Signal("cls_full", -1), Signal("keys", -1)
RECEIVED = Signal("received", -1, without_cls=True)


class _Seen(NamedTuple):
    """What is known of one unit, float32."""

    scores: Tensor  # [N]
    text: Tensor  # [N]
    keys: Tensor  # [N, C]


@register("recoverable", paper="https://arxiv.org/abs/2409.01179", seam="pre_llm")
@dataclass(frozen=True)
class Recoverable(Method):
    """Keep the tokens with outstanding CLS attention, recover those the text speaks of, merge the others.

    1. As many tokens of the best CLS scores stay as there are outliers (local outlier factor) among these scores.
    2. Of the others, as many of the most similar to the text stay, in proportion, as its similarities have outliers.
    3. Of the rest, as many become merge centres as its CLS scores have outliers. Each takes in the `nearest` tokens
       most like it, and one more token, at the place of the next best, gathers all that are no centre. The weights are
       the CLS scores, not normalised.

    Without keep these counts are the method's (the host reads them once a batch; at least one token stays). With keep
    they are scaled to the budget, of which centres and gathering token take an eighth at most. Tokens are merged behind
    the projector, officially before it.

    faithful: as the official code: centres in proportion to the tower's width instead of the number of tokens,
        remaining token i is compared by the key of the image's token i, and a count is a share cut off, int(n * (f /
        n)), which may be f - 1.
    text_similarity: unit -> [N], say from a paired CLIP tower (officially cosine / sqrt(768), and the text vector
        is that of the last padded position, not of the end of text); by default from the LLM's embeddings, ours.
    text_weight: of the text similarity beside the cosine of keys when tokens look for their centre.
    neighbours: of the three outlier factors.
    fallback: as for `cls_attention`.
    """

    reads_text: ClassVar[bool] = True
    newlines: ClassVar[Newlines] = "drop"  # they have neither scores nor keys

    faithful: bool = False
    text_similarity: Callable[[Visual], Tensor] = prompt_similarity
    text_weight: float = 50.0
    neighbours: tuple[int, int, int] = (20, 20, 10)
    nearest: int = 32
    fallback: Fallback = "received"

    def __post_init__(self) -> None:
        check_fallback(self.fallback)
        if self.nearest < 1 or min(self.neighbours) < 1:
            raise ValueError(f"nearest={self.nearest}, neighbours={self.neighbours}: all must be at least 1")

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def needs(self) -> tuple[Signal, ...]:
        return (CLS, KEYS) if self.fallback == "error" else (CLS, KEYS, RECEIVED)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        seen = [self._see(v) for v in units]
        for what, tensors in zip(("CLS attention rows", "text similarities", "keys"), zip(*seen)):
            check_finite(tensors, what)
        counts = [self._counts(s) for s in seen]
        own = [c for v, c in zip(units, counts) if v.budget is None]
        read = iter(torch.stack(own).tolist() if own else [])
        answers = []
        for v, s, count in zip(units, seen, counts):
            if v.budget is None:
                *alone, merging = next(read)
                total = sum(alone) + merging
            else:
                total = budget_of(v, self.name)
                merging = max(1, total // 8)
                count = in_proportion(count, total, merging)
            answers.append(self._assign(s, count, total, merging))
        return answers

    def _see(self, v: Visual) -> _Seen:
        scores = v.signals[CLS].float() if CLS in v.signals else cls_attention(v, -1, self.fallback, self.name)
        text = self.text_similarity(v).float()
        if text.shape != scores.shape:
            raise ValueError(f"text_similarity answered {list(text.shape)}: it owes one value to each of {v.n} tokens")
        return _Seen(scores, text, signal_of(v, KEYS, self.name))

    def _counts(self, s: _Seen) -> Tensor:
        """[3] int64 on the device: tokens kept for the image, kept for the text, and merge anchors."""
        n, cut, (of_scores, of_text, of_rest) = len(s.scores), self.faithful, self.neighbours
        vision = share_of(n, outliers(s.scores, of_scores).sum(), n, cut)
        found = outliers(torch.where(ranks(s.scores) < vision, s.text.min(), s.text), of_text).sum()
        words = share_of(n - vision, found, n, cut)
        rest = beyond_best(s.scores, vision, s.text, words)
        odd, left = outliers(s.scores, of_rest, rest).sum(), rest.sum()
        centres = share_of(s.keys.shape[1], odd, left.clamp(min=1), cut) if self.faithful else odd
        anchors = torch.where(centres > 0, centres.minimum(left - 1) + 1, 0)
        vision = torch.where(vision + words + anchors > 0, vision, 1)
        return torch.stack([vision, words, anchors])

    def _assign(self, s: _Seen, counts: Tensor, total: int, max_anchors: int) -> Assignment:
        """Keep `total` tokens; the counts [3] sum to it, and the last of them is at most `max_anchors`."""
        vision, words, n_anchors = counts
        n, rest = len(s.scores), beyond_best(s.scores, vision, s.text, words)
        later = n + ranks(s.scores.masked_fill(~rest, -torch.inf))
        order = torch.where(rest, later, torch.arange(n, device=rest.device)).argsort()[:total]
        keys = F.normalize(s.keys, dim=1)
        if self.faithful:
            keys = keys[(rest.cumsum(0) - 1).clamp(min=0)]
        most, bias = max_anchors if total < n else 0, self.text_weight * s.text
        return merge_into_anchors(order, rest, s.scores, keys, bias, n_anchors, most, self.nearest)
