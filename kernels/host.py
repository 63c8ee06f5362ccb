"""Between host and device without waiting: copies that are asked for early and read late, and checks made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; on CUDA through pinned memory, so that the host does not wait for the copy."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def each(values: Sequence[float], counts: Sequence[int], device: torch.device) -> Tensor:
    """values[i] counts[i] times, one after the other: what the host knows of units, for every token of theirs."""
    repeats = torch.tensor(counts)
    spread = torch.tensor(values[: len(counts)]).repeat_interleave(repeats, output_size=sum(counts))
    return to_device(spread, device)


class HostCopy:
    """A small tensor on its way to the host: the copy starts now, `read` waits for that copy and for nothing later."""

    def __init__(self, x: Tensor) -> None:
        self._event = None
        self._host = x
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.cpu()


@dataclass(frozen=True)
class Check:
    """A condition on the device (0-d bool) and the error to raise where it does not hold."""

    holds: Tensor
    error: Callable[[], Exception]


_deferred: ContextVar[list[Check] | None] = ContextVar("vtprune_checks", default=None)


@contextmanager
def deferring() -> Iterator[list[Check]]:
    """Collect the checks made in this block instead of reading them; hand the list to `DeferredChecks`.

    An exception inside the block gives way to the error of a check that does not hold: it explains the other.
    """
    checks: list[Check] = []
    token = _deferred.set(checks)
    try:
        yield checks
    except Exception:
        DeferredChecks(checks).raise_if_failed()
        raise
    finally:
        _deferred.reset(token)


class DeferredChecks:
    """Checks whose results are on their way to the host."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = checks
        self._flags = HostCopy(torch.stack([check.holds for check in checks])) if checks else None

    def raise_if_failed(self) -> None:
        """Raise the error of the first check that does not hold."""
        if self._flags is None:
            return
        for check, holds in zip(self._checks, self._flags.read().tolist()):
            if not holds:
                raise check.error()


def check(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise error() unless holds [] bool is True: now, or where an enclosing `deferring` block reads its checks."""
    deferred = _deferred.get()
    if deferred is None:
        DeferredChecks([Check(holds, error)]).raise_if_failed()
    else:
        deferred.append(Check(holds, error))


def check_finite(tensors: Sequence[Tensor], what: str = "features") -> None:
    """Raise ValueError if any element is NaN or Inf; one transfer to the host for the whole sequence.

    Each tensor is read once, for its least and greatest element: both are finite if and only if all between them are,
    since a NaN is answered with NaN. A sum would be as quick, but finite numbers can add up to Inf.
    """
    ends = [end for t in tensors if t.numel() for end in t.aminmax()]
    if ends:
        check(torch.stack(ends).isfinite().all(), lambda: not_finite(tensors, what))


def check_rows_finite(rows: Tensor, what: str = "features") -> None:
    """As `check_finite` of rows[0], rows[1] and so on, without an operation for each of them."""
    check(rows.isfinite().all(), lambda: not_finite(list(rows), what))


def not_finite(tensors: Sequence[Tensor], what: str) -> ValueError:
    """The error that names the first of the tensors that holds NaN or Inf."""
    unit, bad = next((i, ~t.isfinite()) for i, t in enumerate(tensors) if not t.isfinite().all())
    where = bad.nonzero()[0].tolist()
    return ValueError(
        f"{what} of unit {unit} hold {int(bad.sum())} NaN or Inf (the first at {where}): scores "
        "would be meaningless; check the pixels, or use bfloat16 if the tower overflows in float16"
    )
