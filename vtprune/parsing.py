"""How a method and a budget are written in one word, as in `--method todre:pivot=center --keep 25%`."""

from __future__ import annotations

import re
from typing import Any


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """'todre:objective=kcenter,pivot=center' -> ('todre', {...}); values are read as int, float, bool or text.

    A semicolon separates options too, for places where a comma already has a meaning.
    Raises ValueError where a part is no option.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, re.split("[,;]", rest)):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"method {text!r}: {item!r} is not an option; write name:option=value,option=value")
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_keep(text: str, name: str = "--keep ") -> float | int:
    """'0.25' and '25%' -> 0.25, '64' -> 64; ValueError with the valid range for anything else.

    name: what the value is called in the message.
    """
    from .core.method import check_keep  # here, so that the command line is there without torch

    try:
        if text.endswith("%"):
            value: float | int = float(text[:-1]) / 100
        else:
            value = int(text) if text.lstrip("+-").isdigit() else float(text)
        check_keep(value)
    except ValueError as error:
        ways = "use a share in (0, 1] such as 0.25 or 25%, or a number of tokens such as 64"
        raise ValueError(f"{name}{text}: {ways}") from error
    return value
