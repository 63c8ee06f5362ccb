"""For `make docs`: docstrings as Markdown. An argument a line becomes a list, and examples become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): (?=\S)")


def readable(text: str) -> str:
    """The same text with blank lines, bullets and fences where Markdown wants them."""
    lines: list[str] = []
    inside = ""  # what the line before belongs to: "", "list" or "code"
    for line in text.splitlines():
        kind = "code" if line.startswith((">>>", "...")) or (inside == "code" and line) else ""
        kind = kind or ("list" if ARGUMENT.match(line) or (inside == "list" and line.startswith("    ")) else "")
        if kind != inside:
            lines += ["```", ""] if inside == "code" else [""]
            lines += ["```pycon"] if kind == "code" else []
        elif line.startswith(("Returns ", "Raises ")):
            lines.append("")
        lines.append(ARGUMENT.sub(r"- **\1**: ", line) if kind == "list" else line)
        inside = kind
    return "\n".join([*lines, "```"] if inside == "code" else lines)


class Readable(griffe.Extension):
    """Rewrites each docstring once it has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object."""
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
