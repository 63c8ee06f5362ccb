"""The way of the data stays short: few moves between files in one prefill."""

from __future__ import annotations

import pytest
from borders import borders, calls


@pytest.mark.parametrize(("method", "most"), [("divprune", 40), ("fastv", 60)])
def test_a_prefill_crosses_few_borders_between_files(method: str, most: int) -> None:
    seen = calls(method)
    assert {"hf/hooks.py", "core/prompt.py", f"methods/{'pre' if method == 'divprune' else 'in'}_llm/{method}.py"} <= {
        file for file, _ in seen
    }
    assert len(borders(seen)) <= most, borders(seen)
