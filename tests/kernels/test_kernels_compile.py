"""Kernels compile for an H100, all of them, and to the instructions that their speed rests on."""

from __future__ import annotations

import re

import pytest
from compiled import compiled, folders

pytest.importorskip("triton")


@pytest.mark.parametrize("folder", folders())
def test_every_kernel_compiles(folder: str) -> None:
    """A kernel that no call of `compiled` launches is named: add a call that does."""
    made = compiled(folder)
    assert made.missed == []
    assert all(made.launches.values())
    assert all(".target sm_90" in ptx for variants in made.ptx.values() for ptx in variants)


def loads(ptx: str) -> tuple[int, int]:
    """How many loads from global memory fetch four words or two doubles, and how many fetch one."""
    found = re.findall(r"ld\.global[\w.:]*", ptx)
    wide = [load for load in found if ".v4." in load or ".v2.b64" in load]
    return len(wide), len(found) - len(wide)


# The best variant, of rows that are a multiple of 16, and what is left that reads single values: a pick's own, one
# number per row, one of a column.
@pytest.mark.parametrize(
    ("folder", "kernel", "wide", "single"),
    [
        ("farthest_point", "greedy", 4, 0),
        ("farthest_point", "cosines", 10, 4),
        ("farthest_point", "measure", 8, 0),
        ("dpp_greedy", "_pick", 10, 10),
        ("volume_coverage", "residual", 7, 6),
        ("volume_coverage", "gains", 6, 13),
        ("facility_greedy", "leave", 4, 14),
    ],
)
def test_rows_are_read_four_words_at_a_time(folder: str, kernel: str, wide: int, single: int) -> None:
    best = max((loads(ptx) for ptx in compiled(folder).ptx[kernel]), key=lambda found: found[0] - found[1])
    assert best[0] >= wide
    assert best[1] <= single


def test_page_rank_of_an_image_is_one_launch() -> None:
    launches = compiled("page_rank").launches
    assert launches["torch.float32"] == launches["torch.bfloat16"] == ["_page_rank_kernel"]
    assert launches["many tokens"] == ["_log_sum_exp_kernel", *["_columns_kernel"] * 5]


def test_sums_over_whole_rows_run_on_tensor_cores() -> None:
    """Of float32 too, where scores that single weights are made of are multiplied in full."""
    made = compiled("attention").ptx
    assert all("wgmma" in ptx for ptx in made["_log_sum_exp_kernel"])
    assert any("wgmma" not in ptx for ptx in made["_columns_kernel"])
