"""Queries and keys of the blocks of a plain vision transformer, from what the blocks' own modules put out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .vit_blocks import Given, Vit


@dataclass(frozen=True)
class Part:
    """Images of a batch that have equally many tokens: rows [I] of the batch, and the first n tokens of each."""

    rows: Tensor | None = None
    n: int | None = None

    def of(self, x: Tensor) -> Tensor:
        """x [B, N, ...] -> [I, n, ...], and x itself for all of it."""
        return x if self.rows is None else x[self.rows, : self.n]


WHOLE_BATCH = Part()


class Attention:
    """Queries and keys of one block, from what its own modules put out."""

    def __init__(self, vit: Vit, k: int, seen: dict[str, Tensor], given: Given, part: Part = WHOLE_BATCH) -> None:
        """part: the images, and of each the tokens, to read them of."""
        self.parts, self.block, self.given = vit.parts, vit.blocks[k], given
        self.seen = {name: part.of(x) for name, x in seen.items()}
        self.module: Any = getattr(self.block, self.parts.attention)

    @property
    def scaling(self) -> float:
        """Factor on q.k."""
        return self.module.head_dim**-0.5

    def queries(self) -> Tensor:
        """[B, H, N, d], rotated."""
        return self._rotated(self._heads(self.seen["q"] if self.parts.queries else self._packed(0)))

    def keys(self) -> Tensor:
        """[B, H, N, d], rotated."""
        return self._rotated(self._heads(self.seen["k"] if self.parts.queries else self._packed(1)))

    def mean_keys(self) -> Tensor:
        """[B, N, d], before rotation: the mean over heads, which a packed projection takes of its weights."""
        if self.parts.keys:
            return self._heads(self.seen["k"]).mean(1)
        w, b = self._slice(1)
        heads, d = self.module.num_heads, self.module.head_dim
        return self._project(w.view(heads, d, -1).mean(0), None if b is None else b.view(heads, d).mean(0))

    def _rotated(self, x: Tensor) -> Tensor:
        return x if self.parts.rotate is None else self.parts.rotate(self.block, x, self.given)

    def _heads(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unflatten(-1, (-1, self.module.head_dim)).transpose(1, 2)

    def _slice(self, part: int) -> tuple[Tensor, Tensor | None]:
        w, b = self.module.in_proj_weight, self.module.in_proj_bias
        rows = slice(part * w.shape[1], (part + 1) * w.shape[1])
        return w[rows], None if b is None else b[rows]

    def _packed(self, part: int) -> Tensor:
        return self._project(*self._slice(part))

    def _project(self, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(self.seen["norm"].to(w.dtype), w, b)  # autocast puts out other dtypes than the weights have


def watch(vit: Vit, k: int, note: Callable[[int, str, Tensor], None]) -> list[Callable[[], None]]:
    """Call note(k, "q" | "k" | "norm", output) when those modules of block k ran; returns the undo."""
    block: Any = vit.blocks[k]
    attention = getattr(block, vit.parts.attention)
    names = {"q": vit.parts.queries, "k": vit.parts.keys}
    found = {name: getattr(attention, path) for name, path in names.items() if path}
    if vit.parts.norm:
        found["norm"] = getattr(block, vit.parts.norm)
    return [module.register_forward_hook(partial(_noted, note, k, name)).remove for name, module in found.items()]


def _noted(note: Callable[[int, str, Tensor], None], k: int, name: str, module: Any, args: Any, output: Tensor) -> None:
    note(k, name, output)
