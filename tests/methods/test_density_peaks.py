"""Density peaks of sets larger than one block of rows: the same picks as the whole matrix, half of its products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vtprune.methods.density_peaks import centres, clusters, density_peaks
from vtprune.methods.shared import density_peaks as module


def sets(g: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows around centres far from the origin, some of them not real; how many centres and neighbours each set has."""
    rng = torch.Generator().manual_seed(seed)
    means = torch.randn(g, m // 6, d, generator=rng)
    of = torch.randint(m // 6, (g, m), generator=rng)[..., None].expand(-1, -1, d)
    x = 3 + means.gather(1, of) + 0.4 * torch.randn(g, m, d, generator=rng)
    real = torch.rand(g, m, generator=rng) < 0.8
    return x, real, torch.randint(1, m // 4, (g,), generator=rng), torch.randint(1, 8, (g,), generator=rng)


def plain(x: Tensor, count: int, nearest: int) -> tuple[Tensor, Tensor]:
    """Centres of one set, ascending, and the centre of every row, from all distances in float64."""
    far = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = -far.sort(1).values[:, :nearest].square().mean(1)
    place = torch.arange(len(x))
    denser = (density > density[:, None]) | ((density == density[:, None]) & (place < place[:, None]))
    reach = far.masked_fill(~denser, torch.inf).amin(1).clamp(max=float(far.max()))
    order = (density + reach.log()).sort(descending=True, stable=True).indices
    chosen = order[:count].sort().values
    return chosen, chosen[far[:, chosen].argmin(1)]


@pytest.mark.parametrize(("m", "cached"), [(module.ROWS + 37, 1), (2 * module.ROWS, 1 << 30), (30, 2000)])
def test_sets_of_several_blocks(m: int, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, real, counts, nearest = sets(5, m, 12)
    monkeypatch.setattr(module, "CACHED", cached)
    centre, member = clusters(x, real, counts, nearest, 7)
    assert torch.equal(centre, centres(x.clone().requires_grad_(), real, counts, nearest, 7))
    for i in range(5):
        rows = real[i].nonzero()[:, 0]
        chosen, to = plain(x[i, rows], int(counts[i]), int(nearest[i]))
        assert centre[i].nonzero()[:, 0].tolist() == rows[chosen].tolist()
        assert member[i, rows].tolist() == rows[to].tolist()


def test_a_pool_of_several_blocks() -> None:
    x = sets(1, module.ROWS + 50, 24, seed=3)[0][0]
    best, member = density_peaks(x, 9)
    chosen, to = plain(x, 9, 9)
    assert best.sort().values.tolist() == chosen.tolist()
    assert best[member].tolist() == to.tolist()


class Made(TorchDispatchMode):
    """Counts the tensors of at least so many elements that are made, how many of them are masks, and all products."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made, self.masks, self.products = size, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "bmm" in func.overloadpacket.__name__:
            self.products += out.numel()
        if isinstance(out, Tensor) and out.numel() >= self.size and not func.is_view and out is not args[0]:
            self.made += 1
            self.masks += out.dtype == torch.bool
        return out


def test_one_matrix_of_distances_and_half_the_products() -> None:
    m, d = 6 * module.ROWS, 16
    x, real, counts, nearest = sets(1, m, d)
    with Made(m * m) as made:
        clusters(x, real, counts, nearest, 7)
    assert (made.made, made.masks) == (1, 0)
    assert made.products < 0.6 * m * m
