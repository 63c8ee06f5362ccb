"""Trees of tokens through the frames of a segment: each token may hang on the one it is most like, a frame before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...core.visual import Assignment
from ...kernels import to_device
from .density_peaks import cluster_weights, clusters
from .frames import places
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

    def clustered(
        self,
        x: Tensor,
        picked: Tensor,
        number: int,
        sets: Tensor,
        counts: Sequence[int],
        neighbours: int,
        scores: Tensor,
    ) -> Assignment:
        """The tokens that are picked [T, P] bool, `number` of them, as they are, and means of clusters of trees.

        sets: [T, P] bool, the trees that are clustered frame by frame, by where they begin; counts: clusters of each
        frame, around density peaks of so many neighbours at most. A mean stands at its centre. A centre that is picked
        already moves to a free place of its frame, the first one first.
        """
        t, p = picked.shape
        wanted = to_device(torch.tensor(counts), x.device)
        centre, member = clusters(self.merged(x), sets, wanted, wanted.clamp(1, neighbours), neighbours)
        share = cluster_weights(centre, member, sets, None).masked_fill(~sets | (wanted == 0)[:, None], 0)
        seat = _seats(centre, picked)
        kept = picked | (torch.zeros_like(member).scatter_add(1, seat, centre.long()) > 0)
        idx, own = places(kept, number + sum(counts)), places(picked, number)
        row, root = kept.flatten().cumsum(0) - 1, self.root.flatten()
        to = torch.arange(t, device=x.device)[:, None] * p + seat.gather(1, member)
        # What belongs to no cluster weighs 0 where it goes, so that nobody has to count it.
        dst = torch.cat([row[own], row[to.flatten()[root]].clamp(min=0)])
        w = torch.cat([torch.ones_like(own, dtype=torch.float32), self.w.flatten() * share.flatten()[root]])
        src = torch.cat([own, torch.arange(t * p, device=x.device)])
        return Assignment(idx, None, src, dst, w, scores.flatten())


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
    flat = torch.arange(t * p, device=device).view(t, p)
    root = [flat[0]]
    for i in range(1, t):
        root.append(torch.where(linked[i], root[-1].gather(0, parent[i]), flat[i]))
    of, ones = torch.stack(root), torch.ones(t * p, device=device)
    if counts == "all":
        size = torch.zeros_like(ones).index_add(0, of.flatten(), ones)
    else:
        before = (torch.arange(t, device=device)[:, None] - 1).clamp(min=0) * p + torch.stack(parent)
        size = ones.index_add(0, before.flatten(), linked.flatten().float())
    return Trees(~linked & ~apart, of, 1 / size[of])


def _seats(centre: Tensor, picked: Tensor) -> Tensor:
    """[T, P] int64: where in its frame a token stands; centres that are picked already move to places that are free."""
    clash, taken = centre & picked, centre | picked
    free = taken.to(torch.int8).argsort(dim=1, stable=True)  # the free places first
    moved = free.gather(1, (clash.cumsum(1) - 1).clamp(min=0))
    return torch.where(clash, moved, torch.arange(centre.shape[1], device=centre.device))
