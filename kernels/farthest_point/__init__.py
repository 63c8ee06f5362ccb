"""Greedy diverse subsets of token features; the torch reference serves every device."""

from .reference import farthest_point

__all__ = ["farthest_point"]
