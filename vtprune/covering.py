"""The old import path of `vtprune.core.covering`."""

from .core.covering import cover, standing

__all__ = ["cover", "standing"]
