"""Clocks and scales of the benchmark: where the time to the first token goes, and what a call allocates."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def now(device: torch.device) -> float:
    """Seconds on the host's clock, once everything queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the work it queued included."""
    start = now(device)
    call()
    return now(device) - start


def spent(call: Callable[[], Any], device: torch.device) -> float:
    """CPU seconds of one call, all threads of this process together; on a GPU those of `seconds`.

    What other processes take of the machine does not count.
    """
    if device.type == "cuda":
        return seconds(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """The block runs on one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def best_in_turns(forms: Sequence[Callable[[], Tensor]], repeats: int) -> tuple[list[float], list[Tensor]]:
    """Best CPU seconds of each, run in turns so that all see the same machine, and the last results.

    CPU time of one thread is wall time on an idle core, and does not count what other processes take.
    """
    best = [float("inf")] * len(forms)
    results: list[Tensor] = [torch.empty(0)] * len(forms)
    for _ in range(repeats):
        for i, form in enumerate(forms):
            start = time.thread_time()
            results[i] = form()
            best[i] = min(best[i], time.thread_time() - start)
    return best, results


class Phases:
    """Splits one prefill where it enters and leaves the text model; a context manager around the call.

    Works by hooks on this one text model: the first to see the call, the last before it runs, the first after it.
    Entered after `vtprune.patch`, so that what pruning does lies between the first two. On a GPU the marks are events
    in the stream, which keep the host running ahead as it would without them.

    encode: from the call of the model to the text model (tower, projector, embeddings, position ids). cut: what the
    patch does at the text model's door (reading masks, selecting, gathering). prefill: the text model alone, stages
    inside it included. All in seconds.
    """

    def __init__(self, text: nn.Module, device: torch.device) -> None:
        self.text, self.cuda = text, device.type == "cuda"

    def __enter__(self) -> Phases:
        self._undo = [
            self.text.register_forward_pre_hook(self._mark, prepend=True),
            self.text.register_forward_pre_hook(self._mark),
            self.text.register_forward_hook(self._mark, prepend=True),
        ]
        self.restart()
        return self

    def restart(self) -> None:
        """Begin anew: the next forward pass of the text model is the one that `seconds` tells of."""
        self.marks: list[Any] = []
        self._mark()

    def __exit__(self, *exc: object) -> None:
        for hook in self._undo:
            hook.remove()

    def _mark(self, *_: Any) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> tuple[float, float, float]:
        """(encode, cut, prefill) of the first forward pass; read it after the GPU was waited for."""
        start, seen, cut, done = self.marks[:4]
        return self._between(start, seen), self._between(seen, cut), self._between(cut, done)

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a


class Allocated(TorchDispatchMode):
    """Peak bytes of tensors made inside the block and alive at once; weights and inputs are not made inside.

    Counts what the operators return, so it is exact and the same in every run; scratch space inside one operator is
    not seen. For CPUs, where torch keeps no such count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    dense = (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided)
    return [x.untyped_storage() for x in dense]
