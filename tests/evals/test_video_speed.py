"""What the video methods promise about cost on one CPU core, measured by the benchmark that prints it."""

from __future__ import annotations

import pytest
import torch

from vtprune.evals.speed import bench_video

pytestmark = pytest.mark.no_cover


def test_segments_against_the_cell_by_cell_form() -> None:
    """T=256: 15 times faster at least (66 times on a quiet machine), and the same segments."""
    for attempt in range(4):  # a busy neighbour spoils a measurement, never the segments
        seen = bench_video.segmentation(repeats=3)
        assert seen["same_segments"]
        assert seen["segments"] > 10
        if seen["speedup"] >= 15:
            return
        print(f"attempt {attempt}: {seen}")
    pytest.fail(f"{seen['speedup']:.1f} times faster")


@pytest.mark.slow
def test_the_reduction_is_a_hundredth_of_the_prefill() -> None:
    """64 x 196 x 896: below 1 % of the dense prefill of a 0.5B LLM (0.1 % seen)."""
    seen = bench_video.reduction()
    assert seen["share"] < 0.01, seen


def test_the_rival_is_the_same_programme() -> None:
    g = torch.Generator().manual_seed(0)
    from vtprune.methods.segments import cut, run_lengths, still_places

    for t in (2, 3, 9, 20):
        same = torch.rand(t - 1, 5, generator=g) < 0.8
        assert bench_video.rival(same) == cut(still_places(run_lengths(same)))
