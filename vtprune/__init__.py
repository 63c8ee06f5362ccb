"""Prune the visual tokens of an unmodified Hugging Face vision-language model in one line.

>>> handle = vtprune.patch(model, "divprune", keep=0.25)
"""

from .core.result import Last, UnitResult
from .core.select import Selected
from .handle import Handle, patch, unpatch
from .hf.vit_last import VitLast
from .recipe import Recipe
from .registry import create, methods, register
from .selection import count, select
from .stream import Stream
from .types import (
    Assignment,
    Method,
    Signal,
    Span,
    Stage,
    UnsupportedCall,
    UnsupportedModel,
    Visual,
    VtpruneError,
)

__version__ = "0.2.0"

__all__ = [
    "Assignment",
    "Handle",
    "Last",
    "Method",
    "Recipe",
    "Selected",
    "Signal",
    "Span",
    "Stage",
    "Stream",
    "UnitResult",
    "UnsupportedCall",
    "UnsupportedModel",
    "Visual",
    "VitLast",
    "VtpruneError",
    "count",
    "create",
    "methods",
    "patch",
    "register",
    "select",
    "unpatch",
]
