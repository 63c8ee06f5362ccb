"""Recoverable Compression: keep what stands out, to the image or to the text, and merge the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.kernels import check_finite

from ...core.method import Method, Newlines
from ...core.signal import Signal
from ...core.visual import Assignment, Visual
from ...registry import register_own as register
from .. import Fallback, budget_of, check_fallback, cls_attention, signal_of
from ..shared.anchors import merge_into_anchors
from ..shared.counting import in_proportion, ranks
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

    Three counts come from the share of outliers (local outlier factor) among the CLS scores, the text similarities and
    the CLS scores of the rest: the best tokens of the first two stay as they are; of the rest, the best become merge
    centres, which take in the `nearest` tokens most like them, and one more token, at the place of the next best,
    gathers all but the centres. Weights are the CLS scores, not normalised. Without keep the counts are the method's
    (read by the host once per batch; at least one token stays). With keep they are scaled to the budget, centres
    and gathered token taking an eighth of it at most. Merging happens behind the projector, officially before it.

    faithful: as the official code: centres in proportion to the tower's width instead of the number of tokens,
        remaining token i is compared by the key of the image's token i, and a count is a share cut off, int(n * (f /
        n)), which may be f - 1.
    text_similarity: unit -> [N], say from a paired CLIP tower (officially cosine / sqrt(768), and the text vector
        is that of the last padded position, not of the end of text); by default from the LLM's embeddings, ours.
    text_weight: of the text similarity beside the cosine of keys when tokens look for their centre.
    neighbours: of the three outlier factors.
    fallback: as for `cls_attention`.
    """

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
                *main, places = next(read)
                answers.append(self._assign(s, count, sum(main) + places, places))
            else:
                budget = budget_of(v, self.name)
                places = max(1, budget // 8)
                answers.append(self._assign(s, in_proportion(count, budget, places), budget, places))
        return answers

    def _see(self, v: Visual) -> _Seen:
        scores = v.signals[CLS].float() if CLS in v.signals else cls_attention(v, -1, self.fallback, self.name)
        text = self.text_similarity(v).float()
        if text.shape != scores.shape:
            raise ValueError(f"text_similarity answered {list(text.shape)}: it owes one value to each of {v.n} tokens")
        return _Seen(scores, text, signal_of(v, KEYS, self.name))

    def _counts(self, s: _Seen) -> Tensor:
        """[3] int64 on the device: tokens kept for the image, for the text, and places for what is merged."""
        n, (of_scores, of_text, of_rest) = len(s.scores), self.neighbours
        vision = self._share(n, outliers(s.scores, of_scores).sum(), n)
        found = outliers(torch.where(ranks(s.scores) < vision, s.text.min(), s.text), of_text).sum()
        words = self._share(n - vision, found, n)
        rest = _rest(s, vision, words)
        odd, left = outliers(s.scores, of_rest, rest).sum(), rest.sum()
        centres = self._share(s.keys.shape[1], odd, left.clamp(min=1)) if self.faithful else odd
        places = torch.where(centres > 0, centres.minimum(left - 1) + 1, 0)
        vision = torch.where(vision + words + places > 0, vision, 1)
        return torch.stack([vision, words, places])

    def _share(self, whole: Tensor | int, part: Tensor, of: Tensor | int) -> Tensor:
        """whole * part / of as a count: exact, or in the official arithmetic."""
        return (whole * (part.double() / of)).long() if self.faithful else whole * part // of

    def _assign(self, s: _Seen, counts: Tensor, total: int, seats: int) -> Assignment:
        """Keep `total` tokens; the counts [3] sum to it, and the last of them is at most `seats`."""
        vision, words, places = counts
        n, rest = len(s.scores), _rest(s, vision, words)
        later = n + ranks(s.scores.masked_fill(~rest, -torch.inf))
        order = torch.where(rest, later, torch.arange(n, device=rest.device)).argsort()[:total]
        keys = F.normalize(s.keys, dim=1)
        if self.faithful:
            keys = keys[(rest.cumsum(0) - 1).clamp(min=0)]
        seats = seats if total < n else 0
        bias = self.text_weight * s.text
        return merge_into_anchors(order, rest, s.scores, keys, bias, places, seats, self.nearest)


def _rest(s: _Seen, vision: Tensor, words: Tensor) -> Tensor:
    """[N] bool: neither among the best `vision` scores nor among the best `words` text similarities of the others."""
    picked = ranks(s.scores) < vision
    return ~picked & (ranks(s.text.masked_fill(picked, -torch.inf)) >= words)
