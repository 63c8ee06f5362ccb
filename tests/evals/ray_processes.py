"""The processes of a Ray cluster that a test has started here."""

from __future__ import annotations

import psutil


def named(name: str) -> list[int]:
    """Ids of the workers below this process whose title is `ray::NAME...`, oldest first."""
    children = psutil.Process().children(recursive=True)
    found = [p for p in children if (p.cmdline() or [""])[0].startswith(f"ray::{name}")]
    return [p.pid for p in sorted(found, key=lambda p: p.create_time())]
