"""The vocabulary of a pruning rule under one import path. Plug-ins import from here: this path stays.

The definitions stand in `vtprune.core`, which needs torch and no model.
"""

from .core.ask import ask, check_answers
from .core.errors import UnsupportedCall, UnsupportedModel, VtpruneError
from .core.method import (
    Method,
    Newlines,
    Of,
    Per,
    Phase,
    Positions,
    Rounding,
    Stage,
    Where,
    budget,
    check_clips,
    check_keep,
    spread,
)
from .core.signal import KEPT, Signal
from .core.visual import Assignment, Span, Visual

__all__ = [
    "KEPT",
    "Assignment",
    "Method",
    "Newlines",
    "Of",
    "Per",
    "Phase",
    "Positions",
    "Rounding",
    "Signal",
    "Span",
    "Stage",
    "UnsupportedCall",
    "UnsupportedModel",
    "Visual",
    "VtpruneError",
    "Where",
    "ask",
    "budget",
    "check_answers",
    "check_clips",
    "check_keep",
    "spread",
]
