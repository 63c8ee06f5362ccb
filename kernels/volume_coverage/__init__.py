"""Greedy subsets of token features that span a large volume and cover all tokens: plain torch, and Triton on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import backend_for
from . import reference
from .reference import Memory

__all__ = ["volume_coverage"]


def volume_coverage(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    weights: Sequence[Tensor] | None = None,
    ridge: float = 0.01,
    memory: Memory = "auto",
) -> list[Tensor]:
    """Pick budgets[i] rows of features[i] greedily, each time the row j of the largest d_j * c_j * w_j.

    S are the cosine similarities of the rows, P the rows picked so far.
    d_j = S_jj + ridge - S_jP (S_PP + ridge I)^-1 S_Pj: what the picked rows leave unexplained of row j. It is the
        factor by which j enlarges the determinant of S + ridge I (greedy MAP of a determinantal point process).
    c_j = mean over i of max(S_ij - max(0, max over p in P of S_ip), 0): how much closer the rows come, on average, to
        the nearest picked row (facility location). A gain below 1e-6, which is rounding, counts as 1e-6.

    features: one [N_i, D_i] tensor per problem, any float dtype, all on one device; rows are compared in float32. A
        zero row has similarity 0 to everything, itself included, and is picked last.
    budgets: picks per problem, 1 <= budgets[i] <= N_i; also above the rank of the rows, where d_j is ridge.
    weights: w, one tensor [N_i] of finite numbers >= 0 per problem; only their ratios matter. None: all equal.
    ridge: > 0. Where it is large, likeness to picked rows counts less.
    memory: how many rows i the mean of c_j is over. "fast" takes all N, with an N x N float32 matrix of similarities;
        "auto" all while that takes 256 MiB at most (N = 8192), and beyond it as many as fit in there, evenly spaced;
        "low" 512, evenly spaced. A [budget, N] float32 matrix comes on top.
    Returns one int64 tensor [budgets[i]] per problem: distinct indices in pick order. Scores that differ by less than
    1e-5 of the largest tie, and ties go to the lower index, so that rounding decides nothing between equal rows. The
    device is waited for once at most, to check for NaN and Inf; on the CPU there is nothing to wait for.
    CUDA tensors take Triton; all others, and use("reference"), plain torch.
    Raises ValueError for NaN or Inf features, and for budgets, weights or options out of range.
    """
    reference.check_arguments(features, budgets, weights, ridge, memory)
    run = reference.volume_coverage
    tensors = [*features, *(weights or ())]
    if features and backend_for("volume_coverage", *map(Tensor.detach, tensors)) == "triton":
        from .triton import volume_coverage as run
    return run(features, budgets, weights=weights, ridge=ridge, memory=memory)
