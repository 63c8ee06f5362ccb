"""A stranger's path: the blocks of the README and of each guide, pasted in order into an empty folder, all run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "examples" / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.M | re.S)
# What a reader is promised to see, as a pattern in what the blocks print.
SAYS = {
    "README.md": r"(?s)tensor\(\[.*Recommended for a drop",
    "examples/guides/choose.md": r"(?s)0\.5 128 .*0\.25 64 .*0\.11 28 .*16 16 ",
    "examples/guides/evaluate.md": r"(?s)auto.*divprune",
    "examples/guides/extend.md": r"(?s)^64\n.*\[(\d+, ){7}\d+\]",
    "examples/guides/results.md": r"(?s)sparsevlm \d+ \d+ of 256.*vtprune\.methods/1 \d",
    "examples/guides/serve.md": r"# HELP",
    "examples/guides/video.md": r"(?s)auto: \d+ of \d+ tokens.*evs: \d+ of.*in parts: 2352 of 9408 tokens of 48 frames",
    "examples/guides/vision_transformers.md": r"(?s)rows behind every block: \[.*one row a patch again: \(2, 197",
}


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_blocks_of_a_page_run_in_order(page: str, tmp_path: Path) -> None:
    if page.endswith("transformers.md"):
        pytest.importorskip("timm")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    said = ""
    for kind, code in blocks(page):
        command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    assert re.search(SAYS[page], said), said


def test_every_guide_has_blocks_that_run() -> None:
    """What is refused has nothing to run; each of the others does."""
    assert {page for page in PAGES if not blocks(page)} == {"examples/guides/limits.md"}
