"""The README's figures, made from the files it names: `python -m vtprune.evals.readme README.md`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.evals import speed
from vtprune.evals.accuracy import CONTROLS, share
from vtprune.evals.report import Row

BLOCK = re.compile(r"(<!-- vtprune eval (?:--video )?--all: (\S+) -->\n\n).*?(\n\n<!-- end of table -->)", re.DOTALL)


def refreshed(text: str, root: Path) -> str:
    """`text` with every accuracy and speed table made anew from the files that stand in its comments."""
    text = BLOCK.sub(lambda m: m[1] + summary(json.loads((root / m[2]).read_text())) + m[3], text)
    return speed.refreshed(text, root)


def summary(saved: dict[str, Any]) -> str:
    """Means over all kinds of question: a row a method, the best at the smallest share first, controls last."""
    mean = [row for row in saved["rows"] if row["capability"] == "mean"]
    cells = {(row["method"], row["keep"]): row for row in mean}
    pruned = [row for row in mean if row["keep"] != 1.0]
    keeps = sorted({row["keep"] for row in pruned}, reverse=True)
    names = sorted({row["method"] for row in pruned}, key=lambda name: _rank(name, cells[name, keeps[-1]]))
    kinds = len({row["capability"] for row in saved["rows"]}) - 1
    head = [f"mean of {kinds} kinds of question, answer right, %", f"{share(keeps[0])} kept", *map(share, keeps[1:])]
    lines = [head, ["---"] * len(head), *([_label(n, cells[n, keeps[0]]), *_row(cells, n, keeps)] for n in names)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    dense, zeroed, shuffled = (cells[name, 1.0] for name in ("dense", "blind-zero", "blind-shuffle"))
    env = saved["environment"]
    seen = "clip" if env.get("video") else "image"
    return (
        f"{table}\n\n"
        f"Dense: {_cell(dense)}. Blind: {100 * zeroed['right']:.1f} with the {seen} zeroed, "
        f"{100 * shuffled['right']:.1f} with {seen}s shuffled. ± is half of the 95 % bootstrap interval; "
        f"{dense['n'] // kinds} held-out questions of each kind, {env['cpu']}, {env['dtype']}, batch {env['batch']}, "
        f"torch {env['versions']['torch']}, transformers {env['versions']['transformers']}."
    )


def _rank(name: str, row: Row) -> tuple[bool, float]:
    return name in CONTROLS, -row["right"]


def _label(name: str, row: Row) -> str:
    seeds = f", {len(row['right_by_seed'])} seeds" if "right_by_seed" in row else ""
    return f"`{name}` (control{seeds})" if name in CONTROLS else f"`{name}`"


def _row(cells: dict[tuple[str, Any], Row], name: str, keeps: Sequence[float]) -> list[str]:
    return [_cell(cells[name, keep]) for keep in keeps]


def _cell(row: Row) -> str:
    return f"{100 * row['right']:.1f} ± {50 * (row['high'] - row['low']):.1f}"


def main() -> None:
    """Rewrite the tables of a README in place, and the speed picture from the same files."""
    readme = Path(sys.argv[1])
    text = refreshed(readme.read_text(), readme.parent)
    readme.write_text(text)
    saved = [speed.load(readme.parent / name) for block in speed.BLOCK.finditer(text) for name in block[2].split()]
    speed.plot(saved, readme.parent / "examples" / "pictures" / "ttft.png")


if __name__ == "__main__":
    main()
