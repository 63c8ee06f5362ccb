"""What several layers would make of the same objects, made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def once(made: dict[Any, Any], of: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` makes of the objects `of`, from `made` where it is there. Tensors count as objects, by identity.

    `made` keeps the objects alive, so that none of them hands its identity on.
    """
    if torch.compiler.is_compiling():
        return make()
    key = tuple(x if x is None or isinstance(x, int | str) else id(x) for x in of)
    if key not in made:
        made[key] = of, make()
    return made[key][1]
