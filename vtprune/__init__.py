"""Prune the visual tokens of an unmodified Hugging Face vision-language model in one line.

>>> handle = vtprune.patch(model, "divprune", keep=0.25)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where these names stand; all others stand in `types`. They are imported when first asked for: torch takes seconds,
# and neither `vtprune --help` nor a shell that completes a word needs it.
_HOMES = {
    "Handle": "handle",
    "Last": "core.result",
    "Recipe": "recipe",
    "Selected": "core.select",
    "Stream": "stream",
    "UnitResult": "core.result",
    "VitLast": "hf.vit_last",
    "count": "selection",
    "create": "registry",
    "methods": "registry",
    "patch": "handle",
    "register": "registry",
    "select": "selection",
    "unpatch": "handle",
}


if not TYPE_CHECKING:  # a type checker is to know the names, and to miss what is none

    def __getattr__(name: str) -> Any:
        if name in __all__:
            value = getattr(import_module(f".{_HOMES.get(name, 'types')}", __name__), name)
        elif name.startswith("__") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        else:
            value = import_module(f".{name}", __name__)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
