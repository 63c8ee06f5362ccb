"""Which implementation of a kernel runs, chosen by device unless `use` says otherwise, and a record of what ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "triton"]
_forced: ContextVar[Backend | None] = ContextVar("vtprune_backend", default=None)
_record: ContextVar[dict[str, Backend] | None] = ContextVar("vtprune_ran", default=None)


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run every kernel called in the block, in this thread, with one implementation.

    backend: "reference" (plain torch, any device) or "triton" (CUDA tensors; CPU tensors where Triton's interpreter
    is on, TRITON_INTERPRET=1 before the first import). Raises ValueError for another name, RuntimeError without Triton.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r}: choose 'reference' or 'triton'")
    if backend == "triton" and not has_triton():
        raise RuntimeError("Triton is not installed: pip install triton (Linux), or use('reference')")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def recording(into: dict[str, Backend] | None = None) -> Iterator[dict[str, Backend]]:
    """Collect which implementation each operation ran with: {"farthest_point": "triton", ...}; into a dict if given."""
    ran: dict[str, Backend] = {} if into is None else into
    token = _record.set(ran)
    try:
        yield ran
    finally:
        _record.reset(token)


def backend_for(op: str, *tensors: Tensor, limit: str = "") -> Backend:
    """The implementation `op` has to use for these tensors; noted for `recording`.

    limit: why the Triton kernel cannot take this problem (empty: it can). Then, for tensors that record gradients, and
    for devices without Triton the reference runs; under use("triton") that raises instead.
    Raises ValueError if the tensors are on several devices.
    """
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{op} got tensors on several devices ({names}): move them to one")
    forced = _forced.get()
    if not limit and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        limit = "the Triton kernel has no backward pass: call it under torch.no_grad()"
    if not limit and any(not t.is_cuda for t in tensors) and not (forced and interpreted()):
        limit = "the tensors are not on a CUDA device and Triton's interpreter is off"
    if forced == "triton" and limit:
        raise RuntimeError(f"{op} cannot run with Triton: {limit}; leave the use('triton') block to run the reference")
    chosen: Backend = "triton" if forced != "reference" and not limit and has_triton() else "reference"
    ran = _record.get()
    if ran is not None:
        ran[op] = chosen
    return chosen


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes that are there, also under `torch.autocast`: rounded scores tie, and pick other tokens."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def recorded() -> bool:
    """True while an exporter (torch.export, torch.onnx, torch.jit.trace) records the operations for another runtime."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def best_first(scores: Tensor) -> Tensor:
    """Places along the last dimension from the highest score to the lowest; equal ones in positional order."""
    if not recorded():
        return scores.sort(dim=-1, descending=True, stable=True).indices
    # Other runtimes know no stable sort: count who stands before each.
    a, b, n = scores[..., :, None], scores[..., None, :], scores.shape[-1]
    places = torch.arange(n, device=scores.device)
    rank = ((b > a) | ((b == a) & (places < places[:, None]))).sum(-1)
    return torch.zeros_like(rank).scatter(-1, rank, places.expand_as(rank))


def best_few(scores: Tensor, count: int) -> Tensor:
    """The first `count` places of `best_first(scores)`, scores in float32, without sorting the others."""
    if recorded():
        return best_first(scores)[..., :count]
    # topk says nothing of equal scores. A number that holds the score and, below it, the place has no equal.
    bits = (scores.detach() + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers they have the order of the scores
    n = scores.shape[-1]
    number = bits.long().bitwise_left_shift_(32).add_(torch.arange(n - 1, -1, -1, device=scores.device))
    return number.topk(count, dim=-1).indices


@cache
def has_triton() -> bool:
    """True if Triton can be imported."""
    return find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """True if Triton runs its kernels in Python, on CPU tensors too."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
