"""How far the reader of one prefill is sent around: `python tests/borders.py [method ...]`, in the root of a checkout.

Counted are the calls of functions in vtprune/ whose file is not that of the call before, in one prefill of one image on
the tiny LLaVA, keep=0.5, the second call of the patched model. Calls of other folders are left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import vtprune

ROOT = Path(vtprune.__file__).resolve().parent


def calls(method: str) -> list[tuple[str, str]]:
    """(file, function) of every call of a function in vtprune/, in order."""
    import families

    model, batch = families.fresh("llava"), families.inputs("llava")
    seen: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(ROOT):
            seen.append((str(file.relative_to(ROOT)), frame.f_code.co_name))

    with torch.no_grad(), vtprune.patch(model, method, keep=0.5):
        model(**batch)
        sys.setprofile(note)
        try:
            model(**batch)
        finally:
            sys.setprofile(None)
    return seen


def borders(seen: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(file, file) of every move from one file to another."""
    return [(a, b) for (a, _), (b, _) in pairwise(seen) if a != b]


if __name__ == "__main__":
    for name in sys.argv[1:] or ["divprune", "fastv"]:
        found = calls(name)
        moves = borders(found)
        print(f"{name}: {len(found)} calls, {len({f for f, _ in found})} files, {len(moves)} moves between files")
        for (a, b), n in Counter(moves).most_common(10):
            print(f"  {n:3} {a} -> {b}")
