"""The old import path of `vtprune.core.clock`."""

from .core.clock import Clock, capturing, timed, timing

__all__ = [
    "Clock",
    "capturing",
    "timed",
    "timing",
]
