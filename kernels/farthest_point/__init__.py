"""Greedy diverse subsets of token features: plain torch on every device, one Triton program per problem on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import backend_for
from . import reference
from .reference import Memory, Objective

__all__ = ["farthest_point"]

TRITON_ROWS = 16384  # a program keeps one score per row in registers: 32 in each thread at this size


def farthest_point(
    features: Sequence[Tensor],
    budgets: Sequence[int],
    *,
    objective: Objective = "maxmin",
    first: Sequence[int | Tensor] | None = None,
    weights: Sequence[Tensor] | None = None,
    memory: Memory = "auto",
) -> list[Tensor]:
    """Pick budgets[i] rows of features[i] greedily, each as unlike the rows picked before as possible.

    features: one [N_i, D_i] tensor per problem, any float dtype, all on one device. Rows are compared by
        cosine similarity in float32; a zero row has similarity 0 to everything.
    budgets: picks per problem, 1 <= budgets[i] <= N_i.
    objective: "maxmin" takes the row whose nearest picked row is farthest (k-center; DivPrune,
        https://arxiv.org/abs/2503.02175); "maxsum" the row with the smallest summed similarity to the picked
        ones (ToDRE, https://arxiv.org/abs/2505.18757).
    first: first pick per problem, an int or a 0-d tensor (never read on the host, so not checked either).
        None: the row whose nearest neighbour is farthest.
    weights: one [N_i] tensor per problem on the device of the features, for "maxmin" only: the distance 1 - cosine to
        row j counts weights[i][j] times, also for the first pick (FlashVID, https://arxiv.org/abs/2602.08024). Rows of
        negative weight are picked last. None: all count alike.
    memory: "fast" holds an N x N float32 Gram matrix per problem; "low" never does and computes one row per pick, on
        the CPU many of them at a time; "auto" does what is sooner: without the matrix above 1 GiB per problem, and on
        the CPU above 6,144 rows for "maxmin" unless more than half of them are picked.
    Returns one int64 tensor [budgets[i]] per problem: distinct indices in pick order. Ties go to the lower
    index. A batch gives what its problems give one by one (half precision on CUDA: where cuBLAS rounds a batch of
    equal problems as it rounds one). The device is waited for once at most, to check for NaN and Inf.
    CUDA tensors take Triton, up to 16384 rows with a Gram matrix; all others, and use("reference"), plain torch.
    Raises ValueError for NaN or Inf features or weights, and for budgets, first picks or options out of range.
    """
    reference.check_arguments(features, budgets, objective, first, memory, weights)
    limit, rows = "", reference.most_rows_with_gram(features, memory)
    if rows > TRITON_ROWS:
        limit = f"{rows} rows with memory={memory!r}, and one program holds {TRITON_ROWS}: choose memory='low'"
    run = reference.farthest_point
    if features and backend_for("farthest_point", *map(Tensor.detach, features), limit=limit) == "triton":
        from .triton import farthest_point as run
    return run(features, budgets, objective=objective, first=first, weights=weights, memory=memory)
