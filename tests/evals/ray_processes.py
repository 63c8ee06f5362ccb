"""The processes of a Ray cluster that a test has started."""

from __future__ import annotations

import psutil


def named(name: str, below: int | None = None) -> list[int]:
    """Ids of the workers whose title is `ray::NAME...`, oldest first, below a process: by default below this one."""
    children = psutil.Process(below).children(recursive=True)
    found = [p for p in children if (p.cmdline() or [""])[0].startswith(f"ray::{name}")]
    return [p.pid for p in sorted(found, key=lambda p: p.create_time())]
