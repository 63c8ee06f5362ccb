"""Between host and device without waiting: copies that are asked for early and read late."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`; on CUDA through pinned memory, so that the host does not wait for the copy."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


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
