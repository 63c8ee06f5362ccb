"""The parts on their own: every kernel against the plain way (`vtprune bench --kernels`), and farthest point selection
against the published loop (`--selection`). What is measured lies in the module of each."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vtprune.evals.report import Report, Row, environment
from vtprune.evals.speed import BenchReport

# Each function takes "cpu" or "cuda" and returns one flat row per comparison.
PARTS = {
    "kernels": ("bench_kernels:kernels", "bench_attention:kernels"),
    "selection": ("bench_selection:rows",),
}


def parts(which: str, device: str) -> PartsReport:
    """Run every comparison of `which`, "kernels" or "selection", on "cpu" or "cuda"."""
    found: list[Callable[[str], list[Row]]] = []
    for place in PARTS[which]:
        module, name = place.split(":")
        found.append(getattr(import_module(f"vtprune.evals.{module}"), name))
    rows = [row for measure in found for row in measure(device)]
    env = environment(device, "float32" if device == "cpu" else "bfloat16", 1, geometry=which)
    return PartsReport(f"{which.capitalize()}, {device}", rows, env)


class PartsReport(BenchReport):
    """One row a comparison; columns are whatever the rows hold."""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        names: dict[str, Any] = {name: None for row in self.rows for name in row}
        return Report(self.title, [names | row for row in self.rows]).cells()
