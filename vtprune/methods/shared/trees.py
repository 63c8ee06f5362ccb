"""Trees of tokens through the frames of a segment: each token may hang on the one it is most like, a frame before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .segments import Segment

Counts = Literal["all", "direct"]


class Trees(NamedTuple):
    """begins: [T, P] bool, the tokens that hang on no other and are not set apart.

    root: [T, P] int64, the flat place of the token that each one's tree begins with. w: [T, P] float32, its weight in
    what the tree is merged into.
    """

    begins: Tensor
    root: Tensor
    w: Tensor

    def merged(self, x: Tensor) -> Tensor:
        """x [T, P, D] -> the same, with each tree merged where it begins and zeros at its other tokens."""
        flat = (x * self.w[..., None]).flatten(0, 1)
        return torch.zeros_like(flat).index_add(0, self.root.flatten(), flat).view_as(x)


def grow(
    x: Tensor, apart: Tensor, found: Sequence[Segment], wanted: Sequence[int], tau: float, counts: Counts
) -> Trees:
    """Link the tokens of x [T, P, D] float32 within segments, but for those that are set `apart` [T, P] bool.

    A token is linked to the one of the frame before that it is most like (the lower index among equals), if their
    cosine is above tau. If that leaves fewer than wanted[i] tokens of segment i unlinked, those set apart included, the
    threshold is the m-th largest of these cosines, m being the tokens of the segment less wanted[i].
    counts: what the sum of a tree is divided by: "all" its tokens, or the first one and those linked to it ("direct").
    """
    t, p = apart.shape
    unit, device = normalize(x, dim=-1), x.device
    best, parent = [unit.new_full((p,), -1.0)], [torch.zeros(p, dtype=torch.int64, device=device)]
    for i in range(1, t):
        like = (unit[i] @ unit[i - 1].T).masked_fill(apart[i - 1], -1.0)
        nearest = like.max(1)
        best.append(nearest.values.masked_fill(apart[i], -1.0))
        parent.append(nearest.indices)
    linked = torch.zeros_like(apart)
    for (a, b), want in zip(found, wanted):
        if a == b:
            continue
        mine = torch.stack([best[0], *best[a + 1 : b + 1]])  # nothing before the first frame
        order, most = mine.flatten().sort(descending=True).values, mine.numel() - want
        if most < 1:
            continue
        bar = torch.where((mine <= tau).sum() < want, order[most - 1], tau)
        linked[a : b + 1] = mine > bar
    places = torch.arange(t * p, device=device).view(t, p)
    root = [places[0]]
    for i in range(1, t):
        root.append(torch.where(linked[i], root[-1].gather(0, parent[i]), places[i]))
    of, ones = torch.stack(root), torch.ones(t * p, device=device)
    if counts == "all":
        size = torch.zeros_like(ones).index_add(0, of.flatten(), ones)
    else:
        before = (torch.arange(t, device=device)[:, None] - 1).clamp(min=0) * p + torch.stack(parent)
        size = ones.index_add(0, before.flatten(), linked.flatten().float())
    return Trees(~linked & ~apart, of, 1 / size[of])
