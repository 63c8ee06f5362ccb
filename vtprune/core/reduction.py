"""Fewer tokens in the middle of a transformer block, all images of a batch at once: X' = W X.

`Tokens` is what a method sees there, `Reduction` what it answers, `Reducer` the base class of such methods. Inside a
VLM's tower images of equal length and budget are one batch each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels import best_first, check_finite, full_precision, recorded
from ..kernels.merge import merge
from .errors import VtpruneError
from .method import Method, Where, budget
from .reading import budget_of, cls_attention, signal_of
from .signal import Signal
from .visual import Assignment, Visual

Reads = Literal["mean_keys", "attention", "queries", "keys"]
_SIGNALS: dict[str, tuple[Signal, ...]] = {
    "mean_keys": (Signal("mean_keys"),),
    "attention": (Signal("cls"), Signal("received", without_cls=True)),
    "queries": (Signal("queries"), Signal("mean_keys")),
    "keys": (Signal("keys"), Signal("mean_keys")),
}


@dataclass(frozen=True)
class Tokens:
    """A batch behind the attention of block k and before its MLP.

    x: [B, N, C] residual stream. prefix: the first rows (CLS, registers, distillation) that nobody may touch; has_cls:
        row 0 is a CLS token. n0: patches before anything was reduced.
    size: [B, N] float32, for how many patches a token stands; None: one each.
    signals: what `Reducer.reads` asked for, of this block's attention: "mean_keys" [B, N, d] (mean over heads),
        "attention" [B, N] (the CLS token's softmax row, mean over heads, size bias included; without a CLS token what
        each token receives from all), "queries" and "keys" [B, H, N, d].
    block: (k, number of blocks). scaling: factor on q.k.
    """

    x: Tensor
    prefix: int = 0
    size: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    block: tuple[int, int] = (0, 1)
    n0: int = 0
    has_cls: bool = False
    scaling: float = 1.0

    @property
    def n(self) -> int:
        """Number of patches, the prefix not counted."""
        return self.x.shape[1] - self.prefix

    def sizes(self) -> Tensor:
        """[B, N] float32, ones where nobody merged yet."""
        return self.x.new_ones(self.x.shape[:2], dtype=torch.float32) if self.size is None else self.size

    def read(self, what: Reads) -> Tensor:
        """A signal in float32; ValueError if the host did not provide it."""
        if what not in self.signals:
            raise ValueError(f"the signal {what!r} is missing: add it to Tokens.signals ({', '.join(self.signals)})")
        return self.signals[what].float()


@dataclass(frozen=True)
class Reduction:
    """The rows of W, which sum to 1: output row m is x[index_m] plus w * (x[src] - x[index_m]) over its sources.

    index: [B, M] int64, the token each output row stands for, in output order; the prefix first.
    src, dst, w: [B, E] sources, the output row (0..M-1) that takes them, and their weight; None: tokens are dropped.
    gain: [B, E] float32, what a source adds to the size of its output row; None: sizes only follow their token.
    matrix: [B, M, N] float32, all of W where old tokens feed several new ones; then `mass` [B, M] are the new sizes
        (None: as without merging).
    stats: tensors for inspection, such as the share of heads that passed a filter.
    """

    index: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    w: Tensor | None = None
    gain: Tensor | None = None
    matrix: Tensor | None = None
    mass: Tensor | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, M, C] in x's dtype; sums in float32, and only rows that take something are touched."""
        if self.matrix is not None:
            with full_precision(x.device):
                return (self.matrix @ x.float()).to(x.dtype)
        batch, n, width = x.shape
        m = self.index.shape[1]
        rows, at = x.reshape(batch * n, width), _flat(self.index, n)
        if self.src is None or self.dst is None or self.w is None:
            return rows.index_select(0, at).view(batch, m, width)
        if recorded():
            return self._of_plain_operations(x)
        src, dst = _flat(self.src, n), _flat(self.dst, m)
        if x.is_cpu and x.dtype == torch.float32:
            out = rows.index_select(0, at)
            delta = rows.index_select(0, src) - out.index_select(0, dst)
            return out.index_add_(0, dst, delta.mul_(self.w.view(-1, 1))).view(batch, m, width)
        own = torch.ones(batch * m, device=x.device).index_add(0, dst, -self.w.flatten())
        pairs = torch.arange(batch * m, device=x.device)
        weights = torch.cat([own, self.w.flatten()])
        merged: Tensor = merge(rows, torch.cat([at, src]), torch.cat([pairs, dst]), weights, batch * m)
        return merged.view(batch, m, width)

    def _of_plain_operations(self, x: Tensor) -> Tensor:
        """`apply` of what other runtimes know, a product with the sources of every row in place of adding in place."""
        assert self.src is not None
        assert self.dst is not None
        assert self.w is not None
        out, src = _rows(x, self.index).float(), _rows(x, self.src).float()
        delta = (src - _rows(out, self.dst)) * self.w[..., None]
        takes = self.dst[:, None] == torch.arange(self.index.shape[1], device=x.device)[:, None]  # [B, M, E]
        return (out + takes.to(delta.dtype) @ delta).to(x.dtype)

    def resize(self, size: Tensor | None) -> Tensor | None:
        """The sizes [B, M] float32 after this step, of sizes [B, N] before; None stays None where nothing merges."""
        if self.mass is not None:
            return self.mass
        if self.gain is None or self.dst is None:
            return None if size is None else size.gather(1, self.index)
        before = torch.ones_like(self.index, dtype=torch.float32) if size is None else size.gather(1, self.index)
        return before.scatter_add(1, self.dst, self.gain)

    def slots(self, n: int) -> Tensor:
        """[B, N] int64: the output row that holds each of n tokens, -1 for a dropped one."""
        if self.matrix is not None:
            fed = self.matrix.max(1)
            return fed.indices.masked_fill(fed.values <= 0, -1)
        slot = torch.full((self.index.shape[0], n), -1, dtype=torch.int64, device=self.index.device)
        slot.scatter_(1, self.index, torch.arange(self.index.shape[1], device=slot.device).expand_as(self.index))
        return slot if self.src is None or self.dst is None else slot.scatter_(1, self.src, self.dst)

    def dense(self, n: int) -> Tensor:
        """W [B, M, n] float32: pruning has one-hot rows, merging one entry in a column."""
        if self.matrix is not None:
            return self.matrix
        return self.apply(torch.eye(n, device=self.index.device).expand(self.index.shape[0], -1, -1))

    def assignment(self, image: int = 0) -> Assignment:
        """The same for one image of the batch (no prefix): rows in positional order, pairs of x' = A x."""
        index, order = self.index[image].sort()
        if self.matrix is not None:
            rows = self.matrix[image, order]
            dst, src = (rows > 0).nonzero().unbind(1)
            return Assignment(idx=index, src=src, dst=dst, w=rows[dst, src])
        if self.src is None or self.dst is None or self.w is None:
            return Assignment(idx=index, order=self.index[image])
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        src, dst, w = self.src[image], rank[self.dst[image]], self.w[image].float()
        own = torch.ones(len(index), device=w.device).index_add_(0, dst, -w)
        pairs = torch.arange(len(index), device=w.device)
        return Assignment(index, None, torch.cat([index, src]), torch.cat([pairs, dst]), torch.cat([own, w]))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C], index [B, K] -> [B, K, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _flat(index: Tensor, n: int) -> Tensor:
    """Rows [B, K] of n entries each as rows of the flattened batch, [B * K]."""
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * n).flatten()


def stacked(
    parts: Sequence[tuple[Tensor, int, Reduction | None]], batch: int, n: int, size: Tensor | None
) -> Reduction:
    """One reduction of a padded batch, x [batch, n, C] and size [batch, n], of those of images with equal counts.

    parts: (rows [I] of the batch, their tokens, their reduction; None leaves all). The real rows of an image stand in
    front; rows behind them are padding, for which `index` names the last token.
    """
    m = max(now if step is None else step.index.shape[1] for _, now, step in parts)
    device = parts[0][0].device
    index = torch.full((batch, m), n - 1, dtype=torch.int64, device=device)
    matrix, mass = torch.zeros(batch, m, n, device=device), torch.ones(batch, m, device=device)
    merges = any(step is not None and (step.src is not None or step.matrix is not None) for _, _, step in parts)
    for rows, now, step in parts:
        whole = torch.arange(now, device=device).expand(len(rows), -1)
        step = Reduction(whole) if step is None else step
        index[rows, : step.index.shape[1]] = step.index
        if merges:
            matrix[rows, : step.index.shape[1], :now] = step.dense(now)
            after = step.resize(None if size is None else size[rows, :now])
            if after is not None:
                mass[rows, : step.index.shape[1]] = after
    return Reduction(index, matrix=matrix, mass=mass) if merges else Reduction(index)


def keep_rows(t: Tokens, patches: Tensor) -> Tensor:
    """[B, P + K]: the places of the prefix, then those of patches [B, K] that are counted behind it."""
    if not t.prefix:
        return patches
    first = torch.arange(t.prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat([first, patches + t.prefix], 1)


def keep_best(t: Tokens, scores: Tensor, left: int) -> Reduction:
    """Keep the `left` patches of highest score [B, n], in raster order; ties go to the lower place."""
    best = best_first(scores)[:, :left]
    return Reduction(keep_rows(t, best.sort(1).values))


class Reducer(Method):
    """A method that reduces tokens inside a vision transformer, block by block.

    reads: which quantities of the block's attention it needs. weighs: sizes of merged tokens enter the attention of
    later blocks as log size, which is what attending to every copy gives. pools: and the mean over tokens at the end.
    """

    seam: ClassVar[str] = "in_vit"
    reads: ClassVar[tuple[Reads, ...]] = ()

    @property
    def weighs(self) -> bool:
        """True if attention and pooling count a merged token as often as its size says."""
        return False

    @property
    def pools(self) -> bool:
        """True if mean and attention pooling weigh tokens by their size."""
        return self.weighs

    @abstractmethod
    def reduce(self, t: Tokens, left: int) -> Reduction:
        """From t.n to `left` patches, 1 <= left < t.n, in every image of the batch."""

    def counts(self, n: int, depth: int, keep: float | int | None) -> list[int]:
        """Patches left behind each of `depth` blocks, of n: evenly down to the budget, which the last one reaches."""
        goal = self.goal(n, keep)
        return [n - round((n - goal) * (k + 1) / depth) for k in range(depth)]

    def goal(self, n: int, keep: float | int | None) -> int:
        """How many of n patches leave the last block; ValueError if nobody said."""
        if keep is None:
            raise ValueError(f"{self.name}: keep is missing; use a float in (0, 1] (share) or an int >= 1 (tokens)")
        return budget(keep, n, self.rounding)

    # -- inside the tower of a VLM ----------------------------------------------------------------------------------

    @property
    def needs(self) -> tuple[Signal, ...]:
        return tuple(dict.fromkeys(signal for what in self.reads for signal in _SIGNALS[what]))

    def default_where(self) -> Where:
        return "vit", slice(1, None)

    def __call__(self, v: Visual) -> Assignment:
        return self.batch([v])[0]

    def batch(self, units: Sequence[Visual]) -> list[Assignment]:
        check_finite([x for v in units for x in (v.signals[s] for s in self.needs if s in v.signals)], "signals")
        check_finite([v.x for v in units])
        return [self._one(v) for v in units]

    def due(self, v: Visual) -> int:
        """How many tokens of the unit stay now: a schedule spreads what is left to do over the blocks to come."""
        goal = budget_of(v, self.name)
        to_go = v.block[1] - v.block[0] if v.block else 0
        return goal + (v.n - goal) * to_go // (to_go + 1)

    def _one(self, v: Visual) -> Assignment:
        left = self.due(v)
        if left == v.n:
            return Assignment(torch.arange(v.n, device=v.x.device))
        for what in self.reads:
            self._require(v, what)
        size = v.state.get("size")
        signals = {signal: x[None] for signal, x in v.signals.items()}
        tokens = self.seen(v.x[None], signals, None if size is None else size[None], v.block or (0, 0))
        found = self.reduce(tokens, left)
        after, order = found.resize(tokens.size), found.index[0].argsort()
        if after is not None and v.block is not None:
            v.state["size"] = after[0, order]
        return found.assignment()

    def _require(self, v: Visual, what: Reads) -> None:
        """Raise ValueError where the unit lacks the signal, and note what stands in for a CLS token."""
        if what == "attention":
            cls_attention(v, -1, "received", self.name)
        else:
            signal_of(v, Signal(what), self.name)

    def seen(self, x: Tensor, signals: Mapping[Signal, Tensor], size: Tensor | None, block: tuple[int, int]) -> Tokens:
        """What `reduce` sees of images of equal length in a VLM's tower.

        x: [B, N, C]. signals: [B, N] or [B, N, C] of `needs`. size: [B, N] or None. block: (k, last) as in `Visual`.
        """
        mean = signals.get(Signal("mean_keys"))
        head_width = 1 if mean is None else mean.shape[-1]
        found: dict[str, Tensor] = {}
        for what in self.reads:
            read = next(signals[signal] for signal in _SIGNALS[what] if signal in signals)
            by_head = what in ("queries", "keys")
            found[what] = read.view(*read.shape[:2], -1, head_width).transpose(1, 2) if by_head else read
        return Tokens(
            x, size=size, signals=found, block=(block[0], block[1] + 1), n0=x.shape[1], scaling=head_width**-0.5
        )


def reduced(method: Reducer, t: Tokens, left: int) -> Reduction:
    """What the method answers; checked where it is not of this package, whose own are tested for that."""
    step, n, m = method.reduce(t, left), t.x.shape[1], t.prefix + left
    if method.trusted:
        return step
    name = method.name or type(method).__name__
    if step.index.shape != (t.x.shape[0], m):
        raise VtpruneError(
            f"{name} answered a Reduction with index {list(step.index.shape)}, not {[t.x.shape[0], m]}: its budget is "
            f"{left} of {t.n} tokens"
        )
    weights = step.w if step.matrix is None else step.matrix
    if not bool(((step.index >= 0) & (step.index < n)).all()):
        raise VtpruneError(f"{name} answered a Reduction with rows outside 0..{n - 1}")
    if not bool((step.index.sort(1).values.diff(dim=1) > 0).all()):
        raise VtpruneError(f"{name} answered a Reduction that keeps a row twice: rows must be distinct")
    if weights is not None and not bool(weights.isfinite().all()):
        raise VtpruneError(f"{name} answered a Reduction with weights that are not finite")
    return step
