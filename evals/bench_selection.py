"""What farthest point selection costs on one CPU core: `python -m vtprune.evals.bench_selection [--json]`.

The rival is the form in which DivPrune was published: at every step the rows of all picked tokens are gathered from
the distance matrix and minimised again, O(k^2 N). Ours keeps the running extreme, O(k N). Both run in turns in one
process on the same features, and must pick the same tokens in the same order.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.farthest_point import farthest_point, reference


def rival_first(distance: Tensor) -> Tensor:
    """The token whose second smallest distance, the smallest being to itself, is largest."""
    return distance.topk(2, dim=0, largest=False).values[1].argmax()


def rival_loop(distance: Tensor, first: Tensor, budget: int) -> Tensor:
    """[budget] picks; step t gathers a [t, N] slab of distances and reduces all of it."""
    picks = torch.empty(budget, dtype=torch.int64)
    picks[0] = first
    for t in range(1, budget):
        picks[t] = distance[picks[:t]].min(dim=0).values.argmax()
    return picks


def rival(x: Tensor, budget: int) -> Tensor:
    """Normalise, all cosine distances, first pick, loop."""
    unit = x / x.norm(dim=1, keepdim=True)
    distance = 1.0 - unit @ unit.T
    return rival_loop(distance, rival_first(distance), budget)


def measure(n: int = 2880, k: int = 320, d: int = 256, repeats: int = 7) -> dict[str, Any]:
    """CPU seconds of both forms (best of `repeats`, taken in turns, one thread) and their ratios.

    loop: the greedy loop alone, matrix and first pick given. whole: from features to picks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        unit = torch.nn.functional.normalize(x, dim=1)
        gram = reference.fill_gram(unit, torch.empty(n, n))
        distance, first = 1.0 - gram, reference.most_isolated(unit)
        gram.fill_diagonal_(torch.inf)
        loop, loop_rival, same_loop = _race(
            lambda: reference.greedy(gram[None], first[None], k, "maxmin")[0],
            lambda: rival_loop(distance, first, k),
            repeats,
        )
        whole, whole_rival, same_whole = _race(lambda: farthest_point([x], [k])[0], lambda: rival(x, k), repeats)
    finally:
        torch.set_num_threads(threads)
    return {
        "n": n,
        "k": k,
        "d": d,
        "dtype": "float32",
        "threads": 1,
        "repeats": repeats,
        "loop_seconds": loop,
        "loop_rival_seconds": loop_rival,
        "loop_speedup": loop_rival / loop,
        "whole_seconds": whole,
        "whole_rival_seconds": whole_rival,
        "whole_speedup": whole_rival / whole,
        "same_picks": same_loop and same_whole,
    }


def _race(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeats: int) -> tuple[float, float, bool]:
    """Best CPU seconds of each, run in turns so that both see the same machine, and whether the results agree.

    CPU time of one thread is wall time on an idle core, and does not count what other processes take.
    """
    best = [float("inf")] * 2
    results: list[Tensor] = [torch.empty(0)] * 2
    for _ in range(repeats):
        for i, form in enumerate((ours, theirs)):
            start = time.thread_time()
            results[i] = form()
            best[i] = min(best[i], time.thread_time() - start)
    return best[0], best[1], torch.equal(*results)


def memory(n: int = 6272, k: int = 627, d: int = 256, mode: str = "low") -> dict[str, Any]:
    """Growth of the peak resident set during one selection, in a process of its own (Linux)."""
    code = f"from vtprune.evals.bench_selection import _probe; _probe({n}, {k}, {d}, {mode!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, grown = json.loads(done.stdout)
    return {
        "n": n,
        "k": k,
        "d": d,
        "memory": mode,
        "seconds": seconds,
        "peak_growth_bytes": grown,
        "gram_bytes": 4 * n * n,
    }


def _probe(n: int, k: int, d: int, mode: Any) -> None:
    torch.set_num_threads(1)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    farthest_point([x[:8]], [2], memory=mode)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before, start = _peak(), time.perf_counter()
    farthest_point([x], [k], memory=mode)
    print(json.dumps([time.perf_counter() - start, _peak() - before]))


def _peak() -> int:
    """Highest resident set since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Print both measurements."""
    from .report import environment, one_line

    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.bench_selection", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of sentences")
    options = parser.parse_args()
    speed, low, fast = measure(), memory(), memory(mode="fast")
    where = environment("cpu", "float32", 1, cpu_threads=1)
    if options.json:
        print(json.dumps({"environment": where, "speed": speed, "memory": [low, fast]}, indent=1))
        return
    print(one_line(where))
    print("N={n}, k={k}, D={d}, {dtype}, one thread, best of {repeats}".format(**speed))
    for part, text in (("loop", "greedy loop alone"), ("whole", "whole selection, Gram product included")):
        ours, theirs, ratio = (speed[f"{part}_{name}"] for name in ("seconds", "rival_seconds", "speedup"))
        print(f"  {text}: {1e3 * ours:.1f} ms against {1e3 * theirs:.1f} ms, {ratio:.1f} times faster")
    print(f"  same picks in the same order: {'yes' if speed['same_picks'] else 'NO'}")
    for row in (low, fast):
        grown, gram = row["peak_growth_bytes"] / 2**20, row["gram_bytes"] / 2**20
        print(
            f"N={row['n']}, k={row['k']}, memory={row['memory']!r}: {row['seconds']:.2f} s, peak memory grew by "
            f"{grown:.0f} MiB (one N x N float32 matrix: {gram:.0f} MiB)"
        )


if __name__ == "__main__":
    main()
