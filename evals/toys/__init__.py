"""Small models that are really trained, each a module with `load`, `questions` and `blind`.

One looks at pictures (`image`), one watches clips (`video`), and one has real parts and real depth (`mid`).
"""

from __future__ import annotations

import importlib
from typing import Any

TOYS = {
    "image": "the embedded toy VLM",
    "video": "the embedded toy video VLM",
    "mid": "the mid model",
}


def toy(name: str) -> Any:
    """The module of a toy; ValueError for an unknown name, ImportError where this installation lacks it."""
    if name not in TOYS:
        raise ValueError(f"unknown toy {name!r}: choose from {', '.join(TOYS)}")
    try:
        return importlib.import_module(f"vtprune.evals.toys.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"{TOYS[name]} is not in this installation ({error})") from error
