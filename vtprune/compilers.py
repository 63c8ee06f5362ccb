"""The old import path of `vtprune.hf.compilers`."""

from .hf.compilers import announce, outside, outside_while_busy

__all__ = ["announce", "outside", "outside_while_busy"]
