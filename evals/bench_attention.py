"""What the attention statistics cost on a GPU: Triton, blockwise torch, and the whole map as eager attention makes it.

Rows for `vtprune bench`: random bfloat16 inputs, CUDA events, all rivals in turns in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention_received, attention_rows, use

# name, operation, batch, query heads, key heads, queries, keys, d
PROBLEMS = [
    ("LLaVA-NeXT, 5 crops of CLIP-L/14-336", "attention_received", 5, 16, 16, 576, 576, 64),
    ("one sequence of 2,880", "attention_received", 1, 16, 16, 2880, 2880, 64),
    ("last row of a LLaVA-NeXT-7B prompt", "attention_rows", 1, 32, 32, 1, 2940, 128),
]


def attention(device: str | torch.device, repeats: int = 20) -> list[dict[str, Any]]:
    """One row a problem: median milliseconds (as called, and as a CUDA graph) and peak extra MiB of each way.

    Raises RuntimeError without a CUDA device, or if the ways disagree: a wrong kernel has no speed.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"device {device}: there is no CUDA device to time; CUDA events are what this measures with")
    return [_row(*problem, device=device, repeats=repeats) for problem in PROBLEMS]


def eager(op: str, q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """The map as eager attention makes it: scores in the model's dtype, all in memory, softmax in float32."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    weights = (q @ keys.transpose(-1, -2) * scaling).softmax(-1, dtype=torch.float32)
    return weights.mean(dim=(1, 2)) if op == "attention_received" else weights


def _row(
    name: str, op: str, batch: int, heads: int, groups: int, m: int, n: int, d: int, *, device: Any, repeats: int
) -> dict[str, Any]:
    make = torch.Generator(device).manual_seed(0)
    q = torch.randn(batch, heads, m, d, device=device, dtype=torch.bfloat16, generator=make)
    k = torch.randn(batch, groups, n, d, device=device, dtype=torch.bfloat16, generator=make)
    call: Any = {"attention_received": attention_received, "attention_rows": attention_rows}[op]

    def ours(backend: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with use(backend):
                return call(q, k, None, d**-0.5)

        return run

    ways = {"triton": ours("triton"), "reference": ours("reference"), "eager": lambda: eager(op, q, k, d**-0.5)}
    with torch.no_grad():
        results = {way: run() for way, run in ways.items()}
        error = (results["triton"] - results["reference"]).abs().max().item()
        if not error <= 1e-5:
            raise RuntimeError(
                f"{op} on {name}: Triton and the reference differ by {error:.1e}, at most 1e-5 is rounding"
            )
        memory = {way: _peak(run, device) for way, run in ways.items()}
        replays = {f"{way}_graph": _captured(run, device) for way, run in ways.items()}
        times = _milliseconds({**ways, **replays}, device, repeats)
    row: dict[str, Any] = {"op": op, "problem": name, "shape": [batch, heads, groups, m, n, d], "dtype": "bfloat16"}
    row |= {f"{way}_ms": value for way, value in times.items()}
    row |= {f"{way}_peak_mib": value for way, value in memory.items()}
    # Two products of the map (log-sum-exp, then columns), or the keys read once.
    row["flops"] = (4 if op == "attention_received" else 2) * batch * heads * m * n * d
    row["bytes"] = q.element_size() * (q.numel() + k.numel())
    return row | {"triton_vs_reference": error}


def _peak(run: Callable[[], Tensor], device: Any) -> float:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _captured(run: Callable[[], Tensor], device: Any) -> Callable[[], None]:
    """The same work as a CUDA graph: the kernels without what Python and the launches cost."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def _milliseconds(ways: dict[str, Callable[[], Any]], device: Any, repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    with torch.cuda.device(device):
        for _ in range(repeats):
            for way, run in ways.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                torch.cuda.synchronize(device)
                taken[way].append(begin.elapsed_time(end))
    return {way: median(values) for way, values in taken.items()}
