"""The parts on their own: kernels against the plain way (`vtprune bench --kernels`), greedy selection against the
published loop, plain loops and its Gram product (`--selection`). How it is measured says the module of each."""

from __future__ import annotations

from vtprune.evals.report import Row, environment, show
from vtprune.evals.speed.tables import BenchReport


def parts(which: str, device: str) -> PartsReport:
    """Every comparison of `which`, "kernels" or "selection", on "cpu" (one thread) or "cuda"."""
    rows = {"kernels": _kernels, "selection": _selection}[which](device)
    env = environment(device, "float32" if device == "cpu" else "bfloat16", 1, geometry=which, cpu_threads=1)
    return PartsReport(f"{which.capitalize()}, {device}", rows, env)


def _kernels(device: str) -> list[Row]:
    from vtprune.evals.speed import bench_attention, bench_kernels

    rows = bench_kernels.kernels(device)
    return rows + bench_attention.attention(device) if device == "cuda" else rows


def _selection(device: str) -> list[Row]:
    from vtprune.evals.speed import bench_selection as selection
    from vtprune.evals.speed.plain_loops import plain_loops

    if device == "cuda":
        return selection.gpu()
    named = {
        "against the published loop": [selection.measure()],
        "against plain loops": plain_loops(progress=True),
        "against its Gram product": [selection.overhead()],
        "many problems in one call": selection.batches(),
        "memory": [selection.memory(mode="low"), selection.memory(mode="fast")],
    }
    return [{"what": what, **row} for what, rows in named.items() for row in rows]


class PartsReport(BenchReport):
    """A line a comparison; what rows hold differs, so the line names it."""

    kind = "bench-parts"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        def told(row: Row) -> str:
            return ", ".join(f"{name}={show(value)}" for name, value in row.items() if value is not None)

        return ["comparison"], [[told(row)] for row in self.rows]
