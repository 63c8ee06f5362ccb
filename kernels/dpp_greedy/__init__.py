"""Greedy MAP of a determinantal point process over token features: plain torch, and Triton on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import backend_for
from . import reference

__all__ = ["dpp_greedy"]


def dpp_greedy(
    features: Sequence[Tensor], budgets: Sequence[int], *, relevance: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Pick budgets[i] rows of features[i] greedily, so that the determinant of the kernel of the picked rows is large.

    The kernel is L_ij = r_i S_ij r_j, S the cosine similarities of the rows. Each pick is the row j with the largest
    d_j = L_jj - L_jP L_PP^-1 L_Pj, P the rows picked so far: the factor by which j enlarges det L_P (greedy MAP of a
    determinantal point process, https://arxiv.org/abs/1709.05135). No N x N matrix is made: rows of L are computed
    as they are needed, in O(k N D + k^2 N) time with a [budget, N] float32 factor.

    features: one [N_i, D_i] tensor per problem, any float dtype, all on one device; rows are compared in float32.
    budgets: picks per problem, 1 <= budgets[i] <= N_i; also above the rank of the rows, see below.
    relevance: r, one tensor [N_i] of finite numbers >= 0 per problem; only their ratios matter. None: all equal.
    Returns one int64 tensor [budgets[i]] per problem: distinct indices in pick order. Values of d that differ by less
    than 1e-6 of the largest tie, and ties go to the lower index. A row whose d_j falls below 1e-5 L_jj counts as
    spanned by the picked rows. Once that holds for all rows left, the numerical rank is exhausted, and the picks
    begin anew among them, as if nothing were picked: each such round is diverse in itself. Rows with L_jj = 0 (zero
    rows, or r_j = 0) come last, by index. The device is waited for once at most, to check for NaN and Inf.
    CUDA tensors take Triton; all others, and use("reference"), plain torch.
    Raises ValueError for NaN or Inf features, and for budgets or relevances out of range.
    """
    reference.check_arguments(features, budgets, relevance)
    run = reference.dpp_greedy
    tensors = [*features, *(relevance or ())]
    if features and backend_for("dpp_greedy", *map(Tensor.detach, tensors)) == "triton":
        from .triton import dpp_greedy as run
    return run(features, budgets, relevance=relevance)
