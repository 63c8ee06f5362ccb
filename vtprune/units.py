"""The old import path of `vtprune.core.units`."""

from .core.units import Part, TokenGroup, arange_of, begin, divide, emptied, groups, kept_by_crop, parts_of

__all__ = [
    "Part",
    "TokenGroup",
    "arange_of",
    "begin",
    "divide",
    "emptied",
    "groups",
    "kept_by_crop",
    "parts_of",
]
