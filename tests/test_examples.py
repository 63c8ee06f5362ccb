"""Every script under examples/ runs, as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
SAYS = {
    "01_one_line": "kept 64 of 256 visual tokens",
    "02_two_images_second_turn": "tokens written: 522  tokens stored: 138",
    "03_composed_stages": "tokens each decoder layer ran on:",
    "04_own_method": "router kept 64",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs_and_prints_what_it_promises(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout


def test_examples_are_short() -> None:
    assert EXAMPLES
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 40, path.name
