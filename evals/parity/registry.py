"""Which stored files belong to which case: by the longest prefix of their name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Arrays = Mapping[str, Any]
Runner = Callable[[Arrays, Path], str]
_runners: dict[str, Runner] = {}


def case(prefix: str) -> Callable[[Runner], Runner]:
    """Run the decorated function on files that start with `prefix`; it returns a summary or raises `Mismatch`."""

    def add(runner: Runner) -> Runner:
        if prefix in _runners:
            raise ValueError(f"@case({prefix!r}): the prefix is taken by {_runners[prefix].__name__}")
        _runners[prefix] = runner
        return runner

    return add
