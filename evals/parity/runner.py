"""Compare our methods with stored outputs of the official codes: `python -m vtprune.evals.parity DIRECTORY`.

Every `*.npz` file of the directory is one case; the longest prefix of its name that `registry` knows says which method
it belongs to. A method's case is a function in `cases/` marked `@case("prefix")`: it gets the arrays, runs our method
on the stored inputs and compares with the stored outputs. Every setting is read from the file; a file that lacks one
that its case needs has failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vtprune.evals.parity import cases as cases
from vtprune.evals.parity import registry
from vtprune.evals.parity.compare import Mismatch

INPUTS = ("model_",)  # files that cases read, no cases themselves


@dataclass(frozen=True)
class Row:
    """One file: status is "passed", "failed" or "unknown"; detail says what was compared or what differs."""

    case: str
    status: str
    detail: str
    seconds: float


def run(directory: Path, only: Sequence[str] = ()) -> list[Row]:
    """One row per file, by name; a case that raises is a failed case, not the end of the run."""
    rows = []
    for path in sorted(directory.glob("*.npz")):
        if path.name.startswith(INPUTS) or not path.name.startswith(tuple(only or ("",))):
            continue
        prefix = max((p for p in registry._runners if path.name.startswith(p)), key=len, default=None)
        if prefix is None:
            rows.append(Row(path.stem, "unknown", "no case for this prefix", 0.0))
            continue
        start = time.perf_counter()
        try:
            with np.load(path) as arrays:
                status, detail = "passed", registry._runners[prefix](arrays, directory)
        except Exception as error:  # whatever a method does wrong belongs into its row
            kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
            status, detail = "failed", f"{kind}{error}"
        rows.append(Row(path.stem, status, detail, time.perf_counter() - start))
    return rows


def show(rows: Sequence[Row]) -> None:
    """A table, one line per case."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = {"passed": "green", "failed": "red", "unknown": "yellow"}
    table = Table("case", "result", "compared", "seconds", title="Parity with stored outputs")
    for row in rows:
        mark = Text(row.status, style=colour[row.status])
        table.add_row(Text(row.case), mark, Text(row.detail), f"{row.seconds:.2f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if at least one case ran and none failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m vtprune.evals.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder of *.npz files")
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="only files that start so")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    rows = run(options.directory, options.only)
    count = {status: sum(row.status == status for row in rows) for status in ("passed", "failed", "unknown")}
    if options.json:
        print(json.dumps({**count, "cases": [asdict(row) for row in rows]}, indent=1))
    else:
        show(rows)
        print(", ".join(f"{n} {status}" for status, n in count.items()))
    ran = count["passed"] + count["failed"]
    if not ran:
        known = ", ".join(sorted(registry._runners))
        print(f"no case ran in {options.directory}; known prefixes: {known}", file=sys.stderr)
    return 1 if count["failed"] or not ran else 0
