"""What greedy selection costs: `python -m vtprune.evals.speed.bench_selection [--device cuda] [--json]`.

The rival is the form in which DivPrune was published: at every step the rows of all picked tokens are gathered from
the distance matrix and minimised again, O(k^2 N). Ours keeps the running extreme, O(k N). Both run in turns in one
process on the same features, and must pick the same tokens in the same order. `overhead` compares with the Gram
product that the selection cannot do without; `volume` compares volume and coverage with farthest points; `gpu` compares
Triton with plain torch on a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vtprune.evals.speed.meter import best_in_turns, one_thread
from vtprune.kernels import deferring, dpp_greedy, facility_greedy, farthest_point, use, volume_coverage
from vtprune.kernels.farthest_point import reference

GPU_CASES = (  # problems, N, k, D, milliseconds it may take
    (1, 576, 64, 4096, 0.15),  # LLaVA-1.5
    (1, 2880, 320, 4096, 0.7),  # LLaVA-NeXT, all crops together
    (1, 6272, 627, 3584, None),  # LLaVA-OneVision, a video at once
    (5, 576, 64, 4096, None),  # LLaVA-NeXT, per crop
    (32, 196, 20, 3584, None),  # LLaVA-OneVision, per frame
)


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
    x = _rows(n, d)
    unit = torch.nn.functional.normalize(x, dim=1)
    with one_thread():
        gram = reference.fill_gram(unit, torch.empty(n, n))
        distance, first = 1.0 - gram, reference.most_isolated(unit)
        gram.fill_diagonal_(torch.inf)
        (loop, loop_rival), loops = best_in_turns(
            [
                lambda: reference.greedy(gram[None], first[None], k, "maxmin")[0],
                lambda: rival_loop(distance, first, k),
            ],
            repeats,
        )
        (whole, whole_rival), wholes = best_in_turns(
            [lambda: farthest_point([x], [k])[0], lambda: rival(x, k)], repeats
        )
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
        "same_picks": torch.equal(*loops) and torch.equal(*wholes),
    }


def overhead(n: int = 2880, k: int = 320, d: int = 1024, repeats: int = 7) -> dict[str, Any]:
    """What the whole selection takes beside its Gram product alone, CPU seconds as in `measure`.

    full: `rows @ rows.T`, all N^2 products. half: the same matrix as the selection makes it, upper blocks multiplied
    and lower ones copied, which is the fastest way here that keeps float32. share: the whole over the faster of both.
    """
    x = _rows(n, d)
    unit = torch.nn.functional.normalize(x, dim=1)
    with one_thread():
        (full, half, whole), _ = best_in_turns(
            [
                lambda: unit @ unit.T,
                lambda: reference.fill_gram(unit, torch.empty(n, n)),
                lambda: farthest_point([x], [k])[0],
            ],
            repeats,
        )
    return {
        "n": n,
        "k": k,
        "d": d,
        "dtype": "float32",
        "threads": 1,
        "repeats": repeats,
        "gram_full_seconds": full,
        "gram_half_seconds": half,
        "whole_seconds": whole,
        "share": whole / min(full, half),
    }


def volume(n: int = 2880, k: int = 320, d: int = 1024, repeats: int = 7) -> list[dict[str, Any]]:
    """Volume and coverage against farthest points, CPU seconds as in `measure`.

    On random rows, and on rows around n / 5 centres with a part in common, where a pick comes closer to more of them.
    """
    drawn, found = _rows(n, d), []
    near = _rows(n // 5 + 1, d)[torch.arange(n) % (n // 5)] + 0.5 * drawn + drawn[:1]
    for name, x in (("random", drawn), ("clustered", near)):

        def theirs(x: Tensor = x) -> Tensor:
            return farthest_point([x], [k])[0]

        def ours(x: Tensor = x) -> Tensor:
            return volume_coverage([x], [k])[0]

        with one_thread():
            (farthest, whole), _ = best_in_turns([theirs, ours], repeats)
        row = {"rows": name, "n": n, "k": k, "d": d, "dtype": "float32", "threads": 1, "repeats": repeats}
        found.append(row | {"whole_seconds": whole, "farthest_seconds": farthest, "ratio": whole / farthest})
    return found


def batches(d: int = 256, repeats: int = 5) -> list[dict[str, Any]]:
    """Many small problems in one call against one call each, CPU seconds as in `measure`."""
    rows = []
    for count, n, k in ((32, 196, 20), (5, 576, 64)):
        units = list(_rows(count * n, d).split(n))
        budgets = [k] * count

        def together(units: list[Tensor] = units, budgets: list[int] = budgets) -> Tensor:
            return torch.stack(farthest_point(units, budgets))

        def singly(units: list[Tensor] = units, budgets: list[int] = budgets) -> Tensor:
            return torch.stack([farthest_point([x], [k])[0] for x, k in zip(units, budgets)])

        with one_thread():
            (batch, single), picks = best_in_turns([together, singly], repeats)
        row = {"problems": count, "n": n, "k": k, "d": d, "dtype": "float32", "threads": 1, "repeats": repeats}
        row |= {"batch_seconds": batch, "single_seconds": single, "batch_speedup": single / batch}
        rows.append(row | {"same_picks": torch.equal(*picks)})
    return rows


def gpu(
    repeats: int = 50, cases: Sequence[tuple[int, int, int, int, float | None]] = GPU_CASES
) -> list[dict[str, Any]]:
    """Milliseconds on a CUDA device, medians by CUDA events: Triton, its CUDA graph, plain torch, the product alone.

    bfloat16 features, taken in turns in one process; checks for NaN are made and not waited for, as in a prefill.
    same_picks: share of picks that Triton and torch agree on, place by place (the two round their products
    differently). target_ms: the budget, where one was set. Raises RuntimeError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is visible to torch: measure the CPU instead, with --device cpu")
    rows = []
    for count, n, k, d, target in cases:
        units = [x.to("cuda", torch.bfloat16) for x in _rows(count * n, d).split(n)]

        def select(units: list[Tensor] = units, k: int = k) -> Tensor:
            with deferring():
                return torch.stack(farthest_point(units, [k] * len(units)))

        def plain(select: Callable[[], Tensor] = select) -> Tensor:
            with use("reference"):
                return select()

        def product(units: list[Tensor] = units) -> None:
            for x in units:
                torch.mm(x, x.T, out_dtype=torch.float32)

        agree = (select() == plain()).float().mean().item()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            select()
        forms: dict[str, Callable[[], object]] = {
            "triton_ms": select,
            "triton_graph_ms": graph.replay,
            "torch_ms": plain,
            "gram_ms": product,
        }
        row: dict[str, Any] = {"problems": count, "n": n, "k": k, "d": d, "dtype": "bfloat16", "repeats": repeats}
        rows.append(row | _events(forms, repeats) | {"target_ms": target, "same_picks": agree})
    return rows


def _events(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each form between two events, taken in turns after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats + 2):
        for name, form in forms.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            form()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return {name: median(seen[2:]) for name, seen in times.items()}


def _rows(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def memory(
    n: int = 6272, k: int = 627, d: int = 256, mode: str = "low", kernel: str = "farthest_point"
) -> dict[str, Any]:
    """Growth of the peak resident set during one selection, in a process of its own (Linux)."""
    code = f"from vtprune.evals.speed.bench_selection import _probe; _probe({n}, {k}, {d}, {mode!r}, {kernel!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, grown = json.loads(done.stdout)
    return {
        "kernel": kernel,
        "n": n,
        "k": k,
        "d": d,
        "memory": mode,
        "seconds": seconds,
        "peak_growth_bytes": grown,
        "gram_bytes": 4 * n * n,
    }


def _probe(n: int, k: int, d: int, mode: Any, kernel: str) -> None:
    kernels: dict[str, Callable[..., Any]] = {
        "farthest_point": farthest_point,
        "volume_coverage": volume_coverage,
        "facility_greedy": facility_greedy,
        "dpp_greedy": lambda x, k, memory: dpp_greedy(x, k),
    }
    run = kernels[kernel]
    torch.set_num_threads(1)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    run([x[:8]], [2], memory=mode)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before, start = _peak(), time.perf_counter()
    run([x], [k], memory=mode)
    print(json.dumps([time.perf_counter() - start, _peak() - before]))


def _peak() -> int:
    """Highest resident set since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Print all measurements of one device."""
    from vtprune.evals.report import environment, one_line

    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.speed.bench_selection", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="one CPU core, or the GPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of sentences")
    options = parser.parse_args()
    if options.device == "cuda":
        found: dict[str, Any] = {"gpu": gpu()}
        where = environment("cuda", "bfloat16", 1)
    else:
        found = {"speed": measure(), "overhead": overhead(), "batches": batches()}
        found["volume"] = volume()
        found["memory"] = [memory(), memory(mode="fast"), memory(16384, 1802, 1024, "auto", "volume_coverage")]
        where = environment("cpu", "float32", 1, cpu_threads=1)
    if options.json:
        print(json.dumps({"environment": where, **found}, indent=1))
        return
    print(one_line(where))
    for line in _gpu_sentences(found["gpu"]) if options.device == "cuda" else _sentences(found):
        print(line)


def _gpu_sentences(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield (
            "{problems} x (N={n}, k={k}, D={d}), {dtype}: Triton {triton_ms:.3f} ms, as a CUDA graph "
            "{triton_graph_ms:.3f} ms, torch {torch_ms:.3f} ms, product alone {gram_ms:.3f} ms; budget {target_ms}; "
            "{same_picks:.1%} of picks the same"
        ).format(**row)


def _sentences(found: dict[str, Any]) -> Iterator[str]:
    speed, beside = found["speed"], found["overhead"]
    yield "N={n}, k={k}, D={d}, {dtype}, one thread, best of {repeats}".format(**speed)
    for part, text in (("loop", "greedy loop alone"), ("whole", "whole selection, Gram product included")):
        ours, theirs, ratio = (speed[f"{part}_{name}"] for name in ("seconds", "rival_seconds", "speedup"))
        yield f"  {text}: {1e3 * ours:.1f} ms against {1e3 * theirs:.1f} ms, {ratio:.1f} times faster"
    yield f"  same picks in the same order: {'yes' if speed['same_picks'] else 'NO'}"
    full, half, whole = (1e3 * beside[name] for name in ("gram_full_seconds", "gram_half_seconds", "whole_seconds"))
    yield (
        f"N={beside['n']}, k={beside['k']}, D={beside['d']}: whole selection {whole:.1f} ms, "
        f"{beside['share'] - 1:.1%} more than its Gram product of {half:.1f} ms (rows @ rows.T: {full:.1f} ms)"
    )
    for row in found["batches"]:
        yield (
            f"{row['problems']} x (N={row['n']}, k={row['k']}, D={row['d']}): {1e3 * row['batch_seconds']:.1f} ms in "
            f"one call, {1e3 * row['single_seconds']:.1f} ms one by one"
        )
    for row in found["volume"]:
        yield (
            "volume and coverage, N={n}, k={k}, D={d}, {rows} rows: {ratio:.2f} times as long as farthest points"
        ).format(**row)
    for row in found["memory"]:
        grown, gram = row["peak_growth_bytes"] / 2**20, row["gram_bytes"] / 2**20
        yield (
            f"{row['kernel']}, N={row['n']}, k={row['k']}, memory={row['memory']!r}: {row['seconds']:.2f} s, peak "
            f"memory grew by {grown:.0f} MiB (one N x N float32 matrix: {gram:.0f} MiB)"
        )


if __name__ == "__main__":
    main()
