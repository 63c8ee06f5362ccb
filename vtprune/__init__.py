"""Prune the visual tokens of an unmodified Hugging Face vision-language model in one line.

>>> handle = vtprune.patch(model, "divprune", keep=0.25)
"""

from .handle import Handle, patch, unpatch
from .registry import create, methods, register
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

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "Handle",
    "Method",
    "Signal",
    "Span",
    "Stage",
    "UnsupportedCall",
    "UnsupportedModel",
    "Visual",
    "VtpruneError",
    "create",
    "methods",
    "patch",
    "register",
    "unpatch",
]
