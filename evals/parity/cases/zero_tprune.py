"""Zero-TPrune: importance by PageRank, and the pairs of its similarity stage."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from torch import Tensor

from vtprune.evals.parity.compare import agree, close, real, same, tensor
from vtprune.evals.parity.registry import Arrays, case
from vtprune.kernels import page_rank
from vtprune.methods.in_vit import zero_tprune
from vtprune.reduction import Tokens
from vtprune.registry import create


@case("zerotprune_spec_")
def zerotprune(arrays: Arrays, folder: Path) -> str:
    """PageRank by steps, head filter, importance, the S-stage's pairs and what I'-S-I keeps (from the formulas)."""
    q, k, prefix = tensor(arrays, "q"), tensor(arrays, "k"), int(arrays["prefix"])
    n, scaling, worst = q.shape[2], q.shape[-1] ** -0.5, []
    agree("heads", q.shape[1], arrays["num_heads"])
    for name in arrays:
        if name.startswith("s_iter") and name[6:].isdigit():
            worst.append(close(name, page_rank(q, k, None, scaling, int(name[6:])), arrays[name]))
    limits = real(arrays["v_min"]), real(arrays["v_max"])
    for tag, steps in (("", int(arrays["iters"])), ("_first", int(arrays["iters_first"]))):
        scores = page_rank(q, k, None, scaling, steps)
        passed = zero_tprune.heads(scores[..., prefix:] * n, *limits)
        same(f"heads{tag}", passed, arrays[f"head_mask{tag}"].astype(bool))
        worst.append(
            close(f"importance{tag}", zero_tprune.root_mean_square(scores, passed), arrays[f"importance{tag}"])
        )
    first = tensor(arrays, "importance_first")[:, prefix:]
    gone, partner = zero_tprune.similar_pairs(k.mean(1)[:, prefix:], first, int(arrays["r_s"]))
    same("S-stage: dropped", gone + prefix, arrays["s_pruned"])
    same("S-stage: partners", partner + prefix, arrays["s_partner"])
    share, patches = real(arrays["keep_ratio"]), n - prefix
    left = _kept(arrays, q, k, gone.shape[1], ceil(share * (patches - gone.shape[1])))
    same("I'-S-I: kept", left, arrays["keep_final"])
    only = _kept(arrays, q, k, 0, ceil(share * patches))
    same("I alone: kept", only[:, prefix:], arrays["keep_I_only"])
    return f"scores, heads, pairs and tokens kept; within {max(worst):.1g}"


def _kept(arrays: Arrays, q: Tensor, k: Tensor, similar: int, left: int) -> Tensor:
    n, prefix = q.shape[2], int(arrays["prefix"])
    total = n - prefix - left
    steps: Sequence[int] = [int(arrays["iters"])] * 3
    method = create(
        "zero_tprune", similar=(similar + 0.5 * (similar > 0)) / total, steps=tuple(steps), cls_start="uniform",
        first_steps=int(arrays["iters_first"]), v_min=real(arrays["v_min"]), v_max=real(arrays["v_max"]),
    )  # fmt: skip
    x = q.new_zeros(len(q), n, 1)
    tokens = Tokens(x, prefix, None, {"queries": q, "keys": k}, scaling=q.shape[-1] ** -0.5)
    return method.reduce(tokens, left).index  # type: ignore[attr-defined]
