"""What a method inside a vision transformer is made of. Plug-ins import from here: this path stays."""

from .core.reduction import Reads, Reducer, Reduction, Tokens, keep_best, keep_rows, stacked

__all__ = [
    "Reads",
    "Reducer",
    "Reduction",
    "Tokens",
    "keep_best",
    "keep_rows",
    "stacked",
]
