"""Principal directions of a unit's tokens: how much of every token is in each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import to_device


def principal_parts(x: Tensor, count: int, seed: int | None = None) -> Tensor:
    """|V| [N, count] float64: how much of each row of x [N, C] is in each principal direction, largest first.

    The matrix is sigmoid(x)^T [C, N] in float64 with every column centred. There are no more directions than min(N, C);
    those in which nothing varies are zero. seed: None for the exact ones, else a randomised decomposition.
    """
    rows = x.detach().double().sigmoid()  # directions have no gradient
    rows -= rows.mean(1, keepdim=True)
    n, c = rows.shape
    count = min(count, n, c)
    if seed is not None:
        return _random_parts(rows, count, seed)
    values, found = torch.linalg.eigh(rows @ rows.T if n <= c else rows.T @ rows)
    values, found = values.flip(0)[:count], found.flip(1)[:, :count]
    if n > c:
        found = rows @ found
        found /= values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    parts: Tensor = found.abs_().masked_fill_(values <= 1e-12 * values[:1], 0.0)
    return parts


def _random_parts(rows: Tensor, count: int, seed: int) -> Tensor:
    """The randomised form (https://arxiv.org/abs/0909.4061) of rank `count` with two power iterations."""
    n, c = rows.shape
    tall = rows if n > c else rows.T
    draw = torch.randn(tall.shape[1], count, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(tall @ to_device(draw, rows.device).double()).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis).Q).Q
    left, _, right = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    found: Tensor = basis @ left if n > c else right.T
    return found.abs()
