"""The old import path of `vtprune.core.result`."""

from .core.result import Last, UnitResult

__all__ = ["Last", "UnitResult"]
