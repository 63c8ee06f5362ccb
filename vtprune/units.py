"""The old import path of `vtprune.core.units`."""

from .core.units import Alive, Part, arange_of, begin, divide, emptied, groups, kept_by_crop, parts_of

__all__ = [
    "Alive",
    "Part",
    "arange_of",
    "begin",
    "divide",
    "emptied",
    "groups",
    "kept_by_crop",
    "parts_of",
]
