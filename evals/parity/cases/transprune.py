"""TransPrune: stages as those of PyramidDrop, scored by how much a token changes from layer to layer."""

from __future__ import annotations

from pathlib import Path

from vtprune.evals.parity.compare import agree
from vtprune.evals.parity.registry import Arrays, case
from vtprune.evals.parity.renumbering import renumbering


@case("transprune_")
def transprune(arrays: Arrays, folder: Path) -> str:
    """The stages of a stock LLaVA, with transitions of the stored layers."""
    layers = tuple(arrays["accumulating_layer_list"].tolist())
    for i, stage in enumerate(arrays["layer_list"].tolist()):
        agree(f"layers summed at stage {i}", sum(a <= stage for a in layers), len(arrays[f"stage{i}_ttv_list"]))
    return renumbering(arrays, folder, "transprune", {"accumulating": layers})
