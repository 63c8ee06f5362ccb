"""What the tests of the greedy kernels share: problems, forms of a kernel, and what they watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vtprune import kernels
from vtprune.kernels import dispatch

FORMS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), id="triton"),
    pytest.param(("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]


def form_of(backend: str, device: str) -> tuple[str, torch.device]:
    """An implementation and a device; the test is skipped where they are missing."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if backend == "triton":
        pytest.importorskip("triton")
        if device == "cpu" and not dispatch.interpreted():
            pytest.skip("Triton's interpreter is off: it runs where there is no GPU")
    return backend, torch.device(device)


def clustered(n: int, d: int, seed: int = 0, spread: float = 0.3) -> Tensor:
    """Rows around a few centres with uneven norms, as image features have."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, n // 5), d, generator=g)
    rows = centres[torch.randint(len(centres), (n,), generator=g)] + spread * torch.randn(n, d, generator=g)
    return rows * torch.rand(n, 1, generator=g).add(0.2)


def weights_of(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).add(0.1)


class Watch(TorchDispatchMode):
    """Counts reads of device values by the host, and remembers the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.reads += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "equal")
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.layout == torch.strided:
                self.largest = max(self.largest, made.numel())
        return out


def never_waits_and_replays(
    select: Callable[[list[Tensor], list[int]], list[Tensor]], sizes: list[int], dtype: torch.dtype = torch.float32
) -> None:
    """On a GPU: a selection waits for nothing, and a CUDA graph of it replays on other features of the same shapes."""
    units, others = ([clustered(n, 64, n + more).to("cuda", dtype) for n in sizes] for more in (0, 1))
    budgets = [n // 9 for n in sizes]
    with kernels.use("triton"):
        expected = [[p.tolist() for p in select(batch, budgets)] for batch in (units, others)]
    try:
        torch.cuda.set_sync_debug_mode("error")
        with kernels.deferring():
            select(units, budgets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), kernels.deferring():
        picks = select(units, budgets)
    for batch, wanted in zip((units, others), expected):
        for held, new in zip(units, [x.clone() for x in batch]):
            held.copy_(new)
        graph.replay()
        assert [p.tolist() for p in picks] == wanted
