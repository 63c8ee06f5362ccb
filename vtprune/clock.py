"""The old import path of `vtprune.kernels.clock`."""

from .kernels.clock import Clock, capturing, timed, timing

__all__ = [
    "Clock",
    "capturing",
    "timed",
    "timing",
]
