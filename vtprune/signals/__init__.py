"""Signals: quantities that a method reads while the model runs, one row of the registry each.

A function under `@signal(name, shape=..., where=...)` is all there is to a signal: its docstring says what it is, its
arguments what it is made of. A new one is a function in a module of this folder, or in a package that names it by the
entry-point group "vtprune.signals".
"""

from ..core.signal import SignalKind
from . import attention, prompt, text
from .product import MASKED, ROWS, LayerAttention, LayerPass, Prompt, bias_of
from .row import kind_of, kinds, signal

__all__ = [
    "MASKED",
    "ROWS",
    "LayerAttention",
    "LayerPass",
    "Prompt",
    "SignalKind",
    "attention",
    "bias_of",
    "kind_of",
    "kinds",
    "prompt",
    "signal",
    "text",
]
