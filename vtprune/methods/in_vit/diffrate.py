"""DiffRate: in every block drop what the CLS token looks at least, then merge the least of the rest into the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.reduction import Reads, Reducer, Reduction, Tokens, keep_rows
from ...core.visual import Visual
from ...kernels import best_first
from ...registry import register_own as register

SMALLEST = 1e-3  # sizes shrink where sources point away from their destination; log needs a positive one


@register("diffrate", paper="https://arxiv.org/abs/2305.17997", seam="in_vit")
@dataclass(frozen=True)
class DiffRate(Reducer):
    """Two counts a block, prune to p and merge to q: of the patches ranked by the CLS row (size bias included) the
    first p stay, and of these the last p - q go into their most similar one among the first q.

    Similarity g is the cosine of the residual stream. Features become the plain mean of a destination and its sources,
    sizes the sum s + g s_source; attention adds log size. Published counts came from a gradient search over them.

    prune, merge: tokens left by each block's two steps, CLS included, of `tokens` (other lengths in proportion; the
        published counts are of 197); a count above what is there does nothing. None: as `keep` says, evenly over the
        blocks, and of what goes the share `pruned` is pruned and the rest merged.
    """

    reads: ClassVar[tuple[Reads, ...]] = ("attention",)
    prune: Sequence[int] | None = None
    merge: Sequence[int] | None = None
    tokens: int = 197
    pruned: float = 0.5

    def __post_init__(self) -> None:
        if self.tokens < 2 or not 0 <= self.pruned <= 1:
            raise ValueError(f"diffrate: tokens={self.tokens} must be above 1, pruned={self.pruned} from 0 to 1")
        if (self.prune is None) != (self.merge is None):
            raise ValueError("diffrate: prune and merge go together, one count a block each")
        if self.prune is None or self.merge is None:
            return
        counts = (*self.prune, *self.merge)
        if len(self.prune) != len(self.merge) or not all(isinstance(c, int) and c > 1 for c in counts):
            raise ValueError(f"diffrate: prune={self.prune} and merge={self.merge} must be counts above 1, one a block")
        object.__setattr__(self, "prune", tuple(self.prune))
        object.__setattr__(self, "merge", tuple(self.merge))

    @property
    def adaptive(self) -> bool:
        return self.prune is not None

    @property
    def weighs(self) -> bool:
        return True

    def counts(self, n: int, depth: int, keep: float | int | None) -> list[int]:
        if self.prune is None or self.merge is None:
            return super().counts(n, depth, keep)
        if keep is not None:
            raise ValueError(f"diffrate: prune and merge say how many tokens stay; leave out keep={keep}")
        if len(self.prune) != depth:
            raise ValueError(f"diffrate: counts for {len(self.prune)} blocks, but the model has {depth}")
        left, now = [], n
        for p, q in zip(self.prune, self.merge):
            now = min(now, self._scaled(p, n), self._scaled(q, n))
            left.append(now)
        return left

    def due(self, v: Visual) -> int:
        if self.prune is not None:
            raise ValueError(
                "diffrate: prune and merge are counts for the blocks of a plain ViT; give keep in a VLM's tower"
            )
        return super().due(v)

    def _scaled(self, count: int, n: int) -> int:
        """Patches that a count of `tokens`, CLS included, means for n patches."""
        return max(1, round((count - 1) * n / (self.tokens - 1)))

    def reduce(self, t: Tokens, left: int) -> Reduction:
        if self.prune is None:
            kept = t.n - int(self.pruned * (t.n - left))
        else:
            kept = max(left, min(t.n, self._scaled(self.prune[t.block[0]], t.n0)))
        order = best_first(t.read("attention")[:, t.prefix :])
        stay, go = order[:, :left].sort(1).values, order[:, left:kept]
        if kept == left:
            return Reduction(keep_rows(t, stay))
        return merge_into(t.x.float(), t.sizes(), keep_rows(t, stay), go + t.prefix, t.prefix)


def merge_into(x: Tensor, size: Tensor, index: Tensor, src: Tensor, prefix: int) -> Reduction:
    """Every source [B, E] into the most similar of index [B, M] behind the prefix; x [B, N, C] float32, size [B, N]."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    width = unit.shape[-1]
    a = unit.gather(1, src[..., None].expand(-1, -1, width))
    b = unit.gather(1, index[:, prefix:, None].expand(-1, -1, width))
    g, dst = (a @ b.transpose(-1, -2)).max(-1)  # [B, E]
    dst = dst + prefix
    count = torch.ones_like(index, dtype=torch.float32).scatter_add_(1, dst, torch.ones_like(g))
    # The floor acts on the sum, so it stands on the gain: no destination falls below it.
    gain = g * size.gather(1, src)
    before = size.gather(1, index)
    total = before.scatter_add(1, dst, gain)
    short = (SMALLEST - total).clamp(min=0) / (count - 1).clamp(min=1)
    return Reduction(index, src, dst, 1 / count.gather(1, dst), gain + short.gather(1, dst))
