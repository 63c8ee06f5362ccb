"""PyramidDrop: stages at several layers, behind which positions are numbered anew."""

from __future__ import annotations

from pathlib import Path

from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.renumbering import renumbering


@case("pyramiddrop_")
def pyramiddrop(arrays: Arrays, folder: Path) -> str:
    """The stages of a stock LLaVA at the stored layers and shares: scores, tokens, ids, then one decode step."""
    return renumbering(arrays, folder, "pyramiddrop", {})
