"""`signal`, which makes a function one row of the registry of signals, and `kind_of`, which finds the row."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from typing import Any

from ..core.signal import Asks, Place, Signal, SignalKind, Source
from ..registry import SIGNALS


def signal(
    name: str,
    *,
    shape: str,
    where: tuple[Place, ...],
    source: Source = "attention",
    of_cls: bool = False,
    over_queries: bool = False,
    so_far: bool = False,
    rope: bool = False,
    vit: str | None = None,
    asks: Asks = "all",
) -> Callable[[Callable[..., Any]], SignalKind]:
    """Decorator: make a function known as the signal `name`, which any method may then list in `needs`.

    The arguments are the fields of `SignalKind`; the docstring of the function says what the signal is. The answer is
    the row, which can be called like the function. Raises ValueError if the name is taken or the fields do not fit.

    >>> @vtprune.signals.signal("key_norm", shape="[N]", where=("tower",))
    ... def key_norm(a):
    ...     '''The L2 norm of the keys' mean over heads.'''
    ...     return a.keys.float().mean(1).norm(dim=-1)
    """

    def add(read: Callable[..., Any]) -> SignalKind:
        doc = inspect.cleandoc(read.__doc__ or "")
        row = SignalKind(name, shape, where, source, read, doc, of_cls, over_queries, so_far, rope, vit, asks)
        SIGNALS.add(name, row, f"@signal({name!r})")
        return row

    return add


def kind_of(wanted: Signal | str) -> SignalKind:
    """The row of a signal, or of its name; ValueError on a name that nobody registered, with those that are known."""
    return SIGNALS.get(wanted.kind if isinstance(wanted, Signal) else wanted)


def _by_name(kind: SignalKind) -> tuple[Callable[[str], SignalKind], tuple[str]]:
    return kind_of, (kind.name,)


# The name of a function under `@signal` is that of its row, so neither could be pickled by its own name.
copyreg.pickle(SignalKind, _by_name)


def kinds() -> list[SignalKind]:
    """The rows of all signals, sorted by name."""
    return SIGNALS.all()
