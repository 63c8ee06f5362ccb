"""What `merge`, `compact`, `facility_greedy`, `dpp_greedy` and ToMe's merge step cost beside the plain way.

    python -m vtprune.evals.speed.bench_kernels [--device cuda]

Both forms take turns in one process on the same data and must give the same result; a row whose results differ
carries no speed-up. On the CPU everything runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vtprune.compact import Compaction
from vtprune.evals.speed.meter import one_thread
from vtprune.kernels import Compacted, compact, dpp_greedy, facility_greedy, merge, use

SIZES = (576, 2880, 6272)  # tokens of an image of LLaVA-1.5, of LLaVA-NeXT, and of a video of LLaVA-OneVision
TIMED = 32  # picks of the plain loop that are timed; each of the others takes as long


def kernels(device: str = "cpu") -> list[dict[str, Any]]:
    """One row per comparison this device allows; seconds are the best seen. RuntimeError if "cuda" is not there."""
    if device == "cpu":
        greedy = [race(n) for race in (coverage_against_loop, dpp_against_whole_kernel) for n in SIZES]
        return [merge_against_loop(), *tome_against_scatter(), *greedy]
    if not torch.cuda.is_available():
        raise RuntimeError(f"device={device!r}: no CUDA device is visible to torch; use 'cpu'")
    rows = [merge_against_index_add(device)]
    for batch in (1, 8):
        rows += compact_against_gathers(device, batch)
    return rows + [race(n, device=device) for race in (coverage_against_loop, dpp_against_whole_kernel) for n in SIZES]


def merge_against_loop(n: int = 6272, d: int = 896, k: int = 627, repeats: int = 9) -> dict[str, Any]:
    """One CPU core: an image's n features merged into k, against a Python loop over its tokens."""
    with one_thread():
        x, src, dst, w = _clusters(n, d, k)
        pairs = list(zip(src.tolist(), dst.tolist(), w.tolist()))

        def loop() -> Tensor:
            out = torch.zeros(k, d)
            for s, t, weight in pairs:
                out[t] += weight * x[s]
            return out

        same = torch.allclose(merge(x, src, dst, w, k), loop(), rtol=1e-5, atol=1e-5)
        ours, theirs = _race(lambda: merge(x, src, dst, w, k), loop, repeats, _host_seconds)
    return _row("merge", "Python loop over tokens", same, ours, theirs, n=n, d=d, k=k, device="cpu", threads=1)


def merge_against_index_add(device: str, n: int = 6272, d: int = 896, k: int = 627) -> dict[str, Any]:
    """The Triton kernel against weighted rows and `index_add_`, whose atomics give other bits on every run."""
    x, src, dst, w = (t.to(device) for t in _clusters(n, d, k))
    x = x.bfloat16()

    def plain() -> Tensor:
        return x.new_zeros(k, d, dtype=torch.float32).index_add_(0, dst, x[src] * w[:, None]).to(x.dtype)

    with use("triton"):
        same = torch.allclose(merge(x, src, dst, w, k).float(), plain().float(), rtol=2e-2, atol=2e-2)
        ours, theirs = _race(lambda: merge(x, src, dst, w, k), plain, 50, _device_seconds)
    return _row("merge", "index_add_", same, ours, theirs, n=n, d=d, k=k, dtype="bfloat16", device=device)


def coverage_against_loop(n: int, d: int = 1024, keep: float = 0.11, device: str = "cpu") -> dict[str, Any]:
    """Greedy coverage of weighted cosines, against a loop that sums all gains again at every step.

    Both make the cosines from features [n, d] around a few dozen centres. The loop holds all of them; it makes its
    first TIMED picks, which have to be ours, and its seconds are scaled to all picks.
    """
    g = torch.Generator().manual_seed(0)
    centres, of = torch.randn(48, d, generator=g), torch.randint(48, (n,), generator=g)
    x = (0.7 * centres[of] + 0.6 * torch.randn(n, d, generator=g) + torch.randn(d, generator=g)).to(device)
    weights = torch.rand(n, generator=g).add(0.1).to(device)
    k = round(keep * n)
    timed, seconds = min(k, TIMED), _host_seconds if device == "cpu" else _device_seconds
    repeats = max(1, 5 * 576 // n)
    with one_thread():
        same = torch.equal(facility_greedy([x], [k], weights=[weights])[0][:timed], plain_coverage(x, weights, timed))
        laps = [
            (
                seconds(lambda: facility_greedy([x], [k], weights=[weights])),
                seconds(lambda: plain_coverage(x, weights, 1)),
                seconds(lambda: plain_coverage(x, weights, timed)),
            )
            for _ in range(repeats)
        ]
    ours, first, some = (min(lap) for lap in zip(*laps))
    theirs = first + (some - first) / (timed - 1) * (k - 1)
    shape = {"n": n, "d": d, "k": k, "rival_picks_timed": timed, "device": device}
    return _row("facility_greedy", "loop with all gains at each step", same, ours, theirs, **shape)


def plain_coverage(x: Tensor, weights: Tensor, k: int) -> Tensor:
    """[k] picks by the rule as it is written down: all gains [N] anew from all cosines [N, N]."""
    unit = torch.nn.functional.normalize(x, dim=1)
    cosines = unit @ unit.T
    best, taken = x.new_zeros(len(x), 1), torch.zeros_like(weights)
    picks = []
    for _ in range(k):
        gain = (cosines - best).clamp(min=0).sum(0)
        pick = (gain * weights + taken).argmax().view(1)
        taken = taken.index_fill(0, pick, -torch.inf)
        best = torch.maximum(best, cosines.index_select(1, pick))
        picks.append(pick)
    return torch.cat(picks)


def dpp_against_whole_kernel(
    n: int, d: int = 1024, keep: float = 0.11, device: str = "cpu", repeats: int = 5
) -> dict[str, Any]:
    """Greedy MAP of a DPP on features that are alike in clusters, against a plain loop over the whole N x N kernel.

    On the CPU it runs on one core; on a GPU by the Triton kernel. Both keep the same tokens; two that float32 cannot
    tell apart may come in another order.
    """
    k, g = round(keep * n), torch.Generator().manual_seed(0)
    centres = torch.randn(n // 8, d, generator=g) + 1.5 * torch.randn(d, generator=g)
    x = centres[torch.randint(n // 8, (n,), generator=g)] + 0.7 * torch.randn(n, d, generator=g)
    x, r = x.to(device), torch.rand(n, generator=g).add(1e-3).to(device)

    def ours() -> Tensor:
        return dpp_greedy([x], [k], relevance=[r])[0]

    def plain() -> Tensor:
        return dpp_with_whole_kernel(x, r, k)

    if device != "cpu":
        same = torch.equal(ours().sort().values, plain().sort().values)
        seconds = _race(ours, plain, repeats, _device_seconds)
        return _row("dpp_greedy", "loop with the whole kernel", same, *seconds, n=n, d=d, k=k, device=device)
    with one_thread():
        same = torch.equal(ours().sort().values, plain().sort().values)
        seconds = _race(ours, plain, repeats, _host_seconds)
    return _row("dpp_greedy", "loop with the whole kernel", same, *seconds, n=n, d=d, k=k, device="cpu", threads=1)


def dpp_with_whole_kernel(x: Tensor, r: Tensor, k: int) -> Tensor:
    """The plain way: all similarities, all of the kernel, and one row of it a pick."""
    unit = x / x.norm(dim=1, keepdim=True)
    kernel = r[:, None] * (unit @ unit.T) * r
    left, factor = kernel.diagonal().clone(), torch.zeros(k, len(x), device=x.device)
    picks = torch.empty(k, dtype=torch.int64, device=x.device)
    for step in range(k):
        pick = picks[step] = left.argmax()
        taken = kernel.index_select(0, pick.view(1))[0]
        taken = taken - factor[:step].T @ factor[:step].index_select(1, pick.view(1))[:, 0]
        factor[step] = taken / left.index_select(0, pick.view(1)).sqrt()
        left -= factor[step].square()
        left.index_fill_(0, pick, -torch.inf)
    return picks


def tome_against_scatter(
    batch: int = 16, n: int = 197, c: int = 384, d: int = 64, r: int = 13, repeats: int = 8
) -> list[dict[str, Any]]:
    """ToMe's merge step on one CPU core, [batch, n, c] with a CLS token; then the same with matching by [batch, n, d].

    Each form runs ten times in a row, so that memory just freed is used again, as between the blocks of a model.
    """
    from vtprune.methods.in_vit.tome import match

    with one_thread():
        g = torch.Generator().manual_seed(0)
        x, metric = torch.randn(batch, n, c, generator=g), torch.randn(batch, n, d, generator=g)
        size = torch.randint(1, 4, (batch, n), generator=g).float()
        step, found = match(metric, size, 1, r), scatter_matching(metric, r)

        def ours(step: Any) -> tuple[Tensor, Tensor]:
            return step.apply(x), step.resize(size)

        same = all(
            torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours(step), scatter_merging(x, size, found))
        )
        merging = _race(lambda: ours(step), lambda: scatter_merging(x, size, found), repeats, _best_of_ten)
        whole = _race(
            lambda: ours(match(metric, size, 1, r)),
            lambda: scatter_merging(x, size, scatter_matching(metric, r)),
            repeats,
            _best_of_ten,
        )
    shape: dict[str, Any] = {"batch": batch, "n": n, "d": c, "k": r, "device": "cpu", "threads": 1}
    return [
        _row("tome merging", "scatter form", same, *merging, **shape),
        _row("tome matching + merging", "scatter form", same, *whole, **shape),
    ]


def scatter_matching(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The straightforward way with a CLS token: all scores, -inf for CLS, a full sort."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    src, rest = order[:, :r], order[:, r:].sort(1).values
    return src, rest, partner[..., None].gather(1, src)


def scatter_merging(x: Tensor, size: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """All rows times their size, sources scattered onto the odd places, all rows divided by the new sizes."""
    src, rest, dst = found

    def merged(y: Tensor) -> Tensor:
        even, odd, width = y[:, ::2], y[:, 1::2], y.shape[-1]
        kept = even.gather(1, rest.expand(-1, -1, width))
        odd = odd.scatter_reduce(1, dst.expand(-1, -1, width), even.gather(1, src.expand(-1, -1, width)), "sum")
        return torch.cat([kept, odd], 1)

    total = merged(size[..., None])
    return merged(x * size[..., None]) / total, total[..., 0]


def compact_against_gathers(
    device: str, batch: int, length: int = 2940, d: int = 4096, keep: float = 0.11, layers: int = 3
) -> list[dict[str, Any]]:
    """The one launch against a gather per tensor: the plain torch form of `compact`, and the cuts of `Compaction`.

    A prompt as LLaVA-NeXT makes it (60 tokens of text, the rest visual) with M-RoPE ids, mask and deepstack features.
    """
    visual = torch.ones(batch, length, dtype=torch.bool)
    visual[:, :30] = visual[:, -30:] = False
    g = torch.Generator().manual_seed(0)
    kept = round(keep * (length - 60))
    alive = ~visual
    for row in alive:
        row[30 + torch.randperm(length - 60, generator=g)[:kept]] = True
    arguments: dict[str, Any] = {
        "keep": alive.to(device),
        "counts": [kept + 60] * batch,
        "hidden": torch.randn(batch, length, d, device=device, dtype=torch.bfloat16),
        "position_ids": torch.arange(length, device=device).expand(3, batch, length).contiguous(),
        "mask": torch.ones(batch, length, dtype=torch.int64, device=device),
        "visual": visual.to(device),
        "deepstack": [
            torch.randn(batch * (length - 60), d, device=device, dtype=torch.bfloat16) for _ in range(layers)
        ],
        "kept_visual": kept * batch,
    }

    def one_launch() -> Compacted:
        with use("triton"):
            return compact(**arguments)

    def plain_torch() -> Compacted:
        with use("reference"):
            return compact(**arguments)

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "the cuts of Compaction": (one_launch, lambda: _separate_cuts(**arguments)),
        "a gather per tensor": (one_launch, plain_torch),
        "a gather per tensor, both as CUDA graphs": (_captured(one_launch), _captured(plain_torch)),
    }
    want = one_launch()
    same = _equal(want, plain_torch()) and _equal(want, _separate_cuts(**arguments))
    shape: dict[str, Any] = {
        "batch": batch,
        "n": length,
        "k": kept + 60,
        "d": d,
        "dtype": "bfloat16",
        "deepstack": layers,
    }
    return [
        _row("compact", name, same, *_race(ours, theirs, 50, _device_seconds), **shape, device=device)
        for name, (ours, theirs) in pairs.items()
    ]


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` without the host's share of it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _separate_cuts(
    keep: Tensor, counts: list[int], hidden: Tensor, position_ids: Tensor, mask: Tensor, visual: Tensor,
    deepstack: list[Tensor], kept_visual: int,
) -> Compacted:  # fmt: skip
    """What a text call goes through without the kernel; scattering deepstack features waits for the device."""
    c = Compaction.of(keep, counts)
    now, layers = c.cut(visual, 1), []
    for layer in deepstack:
        full = layer.new_zeros(*visual.shape, layer.shape[1])
        full[visual] = layer
        layers.append(c.cut(full, 1)[now])
    sums = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    ids = c.cut(position_ids, -1)
    return Compacted(c.index, None, c.src, c.cut(hidden, 1), ids, c.cut_mask(mask, 0), now, layers, sums)


def _equal(a: Compacted, b: Compacted) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != "deepstack"]
    pairs += list(zip(a.deepstack, b.deepstack))
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


def _clusters(n: int, d: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, src, dst, w: every token flows into one of k rows, each row the mean of its tokens."""
    g = torch.Generator().manual_seed(0)
    x, dst = torch.randn(n, d, generator=g), torch.randint(k, (n,), generator=g)
    return x, torch.arange(n), dst, 1 / dst.bincount(minlength=k)[dst].float()


def _race(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, seconds: Callable[[Callable[[], Any]], float]
) -> tuple[float, float]:
    """Best seconds of both, taken in turns after a first run that nobody counts: neighbours only ever add."""
    ours(), theirs()
    laps = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return min(a for a, _ in laps), min(b for _, b in laps)


def _host_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _best_of_ten(run: Callable[[], Any]) -> float:
    return min(_host_seconds(run) for _ in range(10))


def _device_seconds(run: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _row(kernel: str, rival: str, same: bool, ours: float, theirs: float, **shape: Any) -> dict[str, Any]:
    speedup = theirs / ours if same else None
    return {"kernel": kernel, "rival": rival, **shape, "seconds": ours, "rival_seconds": theirs, "same": same} | {
        "speedup": speedup
    }


def main() -> None:
    """Print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for row in kernels(parser.parse_args().device):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
