"""Every script under examples/ runs, as a user would run it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
SAYS = {
    "01_one_line": "kept 64 of 256 visual tokens",
    "02_two_images_second_turn": "tokens written:",
    "03_composed_stages": "tokens each decoder layer ran on:",
    "04_own_method": "router kept 64",
    "05_vision_transformer": "rows behind every block: [249, 241, 233, 225, 217, 209]",
    "06_lora": "fastv is refused: gradient checkpointing re-runs decoder layers",
    "07_pipeline": "refused: this model is already patched",
    "08_offload": "fastv, weights on meta: equal logits: True",
    "09_trainer": "13    5.1%",
}


@pytest.mark.no_cover
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs_and_prints_what_it_promises(path: Path) -> None:
    command = [sys.executable, "-W", "error::FutureWarning", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout
    if path.stem.startswith("02"):
        written, stored = map(int, re.search(r"written: (\d+)  tokens stored: (\d+)", done.stdout).groups())
        assert written - stored == 2 * (256 - 64)
    if path.stem[:2] in ("06", "09"):
        losses = [float(text) for text in re.search(r"loss: ([\d. ]+)", done.stdout).group(1).split()]
        assert losses[-1] < 0.5 * losses[0]
    if path.stem.startswith("06"):
        assert "divprune with checkpointing: loss" in done.stdout
    if path.stem.startswith("07"):
        assert done.stdout.count("64   25.0%") == 4


def test_examples_are_short() -> None:
    assert EXAMPLES
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Every cell, in a kernel of its own; pictures and the summary are among what it shows."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(EXAMPLES[0].parent / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert "keys and values" in "".join(output.get("text", "") for output in outputs)
