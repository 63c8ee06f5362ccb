"""The greedy selections against plain loops that compute every score again at every step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vtprune.evals.speed.bench_selection import _rows, memory, rival
from vtprune.evals.speed.meter import best_in_turns, one_thread
from vtprune.kernels import dpp_greedy, facility_greedy, farthest_point

PLAIN_CASES = ((576, 64), (2880, 320), (6272, 627))  # N, k: LLaVA-1.5, LLaVA-NeXT, a video of LLaVA-OneVision


def facility_rival(x: Tensor, budget: int) -> Tensor:
    """Facility location with all gains summed again at every step, O(k N^2)."""
    unit = x / x.norm(dim=1, keepdim=True)
    matrix = (unit @ unit.T).clamp(min=0)
    best = matrix.new_zeros(len(x), 1)
    picks: list[int] = []
    for _ in range(budget):
        gain = (matrix - best).clamp_(min=0).sum(0)
        gain[picks] = -1
        picks.append(int(gain.argmax()))
        best = torch.maximum(best, matrix[:, picks[-1]][:, None])
    return torch.tensor(picks)


def dpp_rival(x: Tensor, budget: int) -> Tensor:
    """Greedy determinants, the factor of the picked rows made anew at every step, O(k^3 N)."""
    unit = x / x.norm(dim=1, keepdim=True)
    matrix = unit @ unit.T
    left, picks = matrix.diagonal().clone(), [0]
    for _ in range(1, budget):
        factor = torch.linalg.cholesky(matrix[picks][:, picks])
        spanned = torch.linalg.solve_triangular(factor, matrix[picks], upper=False).square().sum(0)
        score = left - spanned
        score[picks] = -1
        picks.append(int(score.argmax()))
    return torch.tensor(picks)


KERNELS: dict[str, tuple[Callable[..., list[Tensor]], Callable[[Tensor, int], Tensor]]] = {
    "farthest_point": (farthest_point, rival),
    "facility_greedy": (facility_greedy, facility_rival),
    "dpp_greedy": (dpp_greedy, dpp_rival),
}


def plain_loops(
    cases: Sequence[tuple[int, int]] = PLAIN_CASES, widths: Sequence[int] = (1024, 896), progress: bool = False
) -> list[dict[str, Any]]:
    """Each greedy selection against its plain loop, CPU seconds as in `measure`; farthest points at all widths.

    same_picks: both keep the same tokens. same_order: and in the same order, which the rounding of a plain loop changes
    where two scores nearly tie. peak_growth_bytes: of the selection, as in `memory`. gram_bytes: the matrix that the
    plain loop holds. The plain loops of the larger sizes take up to a minute, and run once.
    """
    todo = [
        (name, n, k, d)
        for name in KERNELS
        for d in (widths if name == "farthest_point" else widths[:1])
        for n, k in cases
    ]
    found = []
    for name, n, k, d in tqdm(todo, desc="plain loops", disable=not progress):
        kernel, plain = KERNELS[name]
        x, repeats = _rows(n, d), 3 if n < 1000 else 1

        def ours(x: Tensor = x, k: int = k, kernel: Any = kernel) -> Tensor:
            return kernel([x], [k])[0]

        def theirs(x: Tensor = x, k: int = k, plain: Any = plain) -> Tensor:
            return plain(x, k)

        with one_thread():
            (seconds, rival_seconds), picks = best_in_turns([ours, theirs], repeats)
        row = {"kernel": name, "n": n, "k": k, "d": d, "dtype": "float32", "threads": 1, "repeats": repeats}
        row |= {"seconds": seconds, "rival_seconds": rival_seconds, "speedup": rival_seconds / seconds}
        kept = [set(one.tolist()) for one in picks]
        row |= {"same_picks": kept[0] == kept[1], "same_order": torch.equal(*picks)}
        if sys.platform == "linux":
            own = memory(n, k, d, "auto", name)
            row |= {name: own[name] for name in ("peak_growth_bytes", "gram_bytes")}
        found.append(row)
    return found
