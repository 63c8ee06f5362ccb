"""Let something of ours stand before an attribute of one module instance, and give back exactly what was there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def standing(module: nn.Module, name: str) -> Callable[..., Any]:
    """What a call of `module.name` reaches now: a function that the user set on the instance, else the class's own.

    The class's own is bound to the module by a partial object, so that a copied module's copy is bound to the copy.
    """
    if name in module.__dict__:
        found: Callable[..., Any] = module.__dict__[name]
        return found
    return partial(getattr(type(module), name), module)


def cover(module: nn.Module, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Let a function stand before `module.name` on the instance; returns the undo.

    The undo puts back what the instance held, whatever stands there by then.
    """
    found = (module.__dict__[name],) if name in module.__dict__ else ()
    module.__dict__[name] = function
    return partial(_uncover, module, name, found)


def _uncover(module: nn.Module, name: str, found: tuple[Any, ...]) -> None:
    if found:
        module.__dict__[name] = found[0]
    else:
        module.__dict__.pop(name, None)
