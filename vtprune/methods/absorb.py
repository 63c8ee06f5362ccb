"""The old import path of `vtprune.methods.shared.anchors`."""

from .shared.anchors import merge_into_anchors as absorb

__all__ = ["absorb"]
