"""Greedy subsets of columns that cover the rows of a matrix best: plain torch, and Triton on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import backend_for
from . import reference
from .reference import Combine, Memory

__all__ = ["facility_greedy"]


def facility_greedy(
    features: Sequence[Tensor | None],
    budgets: Sequence[int],
    *,
    rows: Sequence[Tensor | None] | None = None,
    weights: Sequence[Tensor] | None = None,
    combine: Combine = "multiply",
    temperature: float | None = None,
    scale: float = 1.0,
    excluded: Sequence[Tensor] | None = None,
    memory: Memory = "auto",
) -> list[Tensor]:
    """Pick budgets[i] columns of a matrix M greedily: each time the column j of the largest score.

    best_i = max(0, max over the columns p picked so far of M_ip): how well row i is covered.
    gain_j = sum over i of max(M_ij - best_i, 0): how much better column j covers the rows (facility location).
    score_j = gain_j * w_j (combine="multiply") or gain_j + w_j (combine="add"); gain_j without weights.
    M has N columns. Its first N rows are made of the features, with S_ij the cosine of the features i and j:
        M_ij = scale * S_ij, or with a temperature M_ij = scale / N * softmax over j of (S_ij / temperature).
    Further rows are given as they are. After a pick, only rows whose best_i has changed are looked at.

    features: one [N_i, D_i] tensor per problem, any float dtype, all on one device; compared in float32. A zero row has
        cosine 0 with everything. None for a problem whose matrix is rows[i] alone.
    budgets: picks per problem, 1 <= budgets[i] <= N_i.
    rows: further rows of M, one float tensor [M_i, N_i] per problem or None; entries below 0 count as 0.
    weights: w, one float tensor [N_i] of finite numbers >= 0 per problem; where they multiply, only ratios matter.
    temperature, scale: finite and > 0.
    excluded: one bool tensor [N_i] per problem: columns that are picked last, when all others have been picked.
    memory: "fast" holds M, (M_i + N_i) x N_i in float32; "low" makes rows of features again whenever their best
        changes, and holds a few hundred of them at a time; "auto" holds as many rows as take 1 GiB (all up to N =
        16384) and makes the others, but on a GPU it is "fast" up to 64 MiB (N = 4096) and "low" beyond. The picks are
        the same, but for scores that differ by the rounding of float32 cosines.
    Returns one int64 tensor [budgets[i]] per problem: distinct indices in pick order. Scores that differ by less than
    3e-7 of the largest tie, or without weights and temperature by less than 3e-7 * scale (two tokens that cover nothing
    but each other gain the same), and ties go to the lower index. A gain that rounding leaves counts as none. The
    device is waited for once at most, to check for NaN and Inf; on the CPU there is nothing to wait for.
    CUDA tensors take Triton; all others, and use("reference"), plain torch.
    Raises ValueError for NaN or Inf, and for budgets, shapes or options out of range.
    """
    reference.check_arguments(features, budgets, rows, weights, combine, temperature, scale, excluded, memory)
    run = reference.facility_greedy
    tensors = [x.detach() for x in (*features, *(rows or ()), *(weights or ()), *(excluded or ())) if x is not None]
    if tensors and backend_for("facility_greedy", *tensors) == "triton":
        from .triton import facility_greedy as run
    return run(
        features,
        budgets,
        rows=rows,
        weights=weights,
        combine=combine,
        temperature=temperature,
        scale=scale,
        excluded=excluded,
        memory=memory,
    )
