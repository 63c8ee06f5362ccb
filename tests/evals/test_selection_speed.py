"""The promises about cost on one CPU core, measured by the benchmark that prints them."""

from __future__ import annotations

import sys

import pytest
import torch

from vtprune.evals.speed import bench_selection

pytestmark = pytest.mark.no_cover


def test_incremental_loop_against_the_slab_form() -> None:
    """N=2880, k=320, D=256: the loop alone 50 times faster; with the Gram product 8 times on a quiet machine.

    The second is 8.1 to 8.6 when nothing else runs and was 6.2 once, so what is asserted leaves room for neighbours.
    """
    for attempt in range(6):  # a busy neighbour spoils a measurement, never the picks
        seen = bench_selection.measure(repeats=5)
        assert seen["same_picks"]
        if seen["loop_speedup"] >= 50 and seen["whole_speedup"] >= 5:
            return
        print(f"attempt {attempt}: {seen}")
    pytest.fail(f"loop {seen['loop_speedup']:.1f} times, whole {seen['whole_speedup']:.1f} times faster")


def test_the_loop_costs_little_beside_the_gram_product() -> None:
    """N=2880, k=320, D=1024: little more than the product alone, and less than the plain product takes.

    11 % more on an AMD EPYC and 24 % on an Intel Xeon, whose product is faster; what is asserted leaves room for both.
    """
    for attempt in range(6):
        seen = bench_selection.overhead(repeats=3)
        if seen["share"] <= 1.4 and seen["whole_seconds"] < seen["gram_full_seconds"]:
            return
        print(f"attempt {attempt}: {seen}")
    pytest.fail(f"{seen['share'] - 1:.1%} more than the Gram product alone")


def test_volume_and_coverage_beside_farthest_points() -> None:
    """N=2880, k=320, D=1024: at most twice as long in one run, on random rows and on clustered ones."""
    for attempt in range(6):
        seen = bench_selection.volume(repeats=3)
        if all(row["ratio"] <= 2 for row in seen):
            return
        print(f"attempt {attempt}: {seen}")
    pytest.fail(f"{max(row['ratio'] for row in seen):.2f} times as long")


def test_many_small_problems_share_one_loop() -> None:
    """32 frames of 196 tokens and 5 crops of 576: one call is not slower than a call each."""
    for attempt in range(6):
        rows = bench_selection.batches(repeats=3)
        assert all(row["same_picks"] for row in rows)
        if all(row["batch_speedup"] >= 0.9 for row in rows):
            return
        print(f"attempt {attempt}: {rows}")
    pytest.fail(f"slower together: {rows}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_figures_need_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device is visible"):
        bench_selection.gpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_figures() -> None:
    (row,) = bench_selection.gpu(repeats=3, cases=[(2, 100, 10, 64, None)])
    assert row["same_picks"] > 0.5
    assert all(row[name] > 0 for name in ("triton_ms", "triton_graph_ms", "torch_ms", "gram_ms"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_low_memory_selection_of_a_long_video() -> None:
    """N=6272, k=627 within 2 GiB, and below one N x N float32 matrix."""
    low, fast = bench_selection.memory(), bench_selection.memory(mode="fast")
    assert low["peak_growth_bytes"] < 2 * 2**30
    assert low["peak_growth_bytes"] < low["gram_bytes"] <= fast["peak_growth_bytes"]


def test_the_rival_is_the_same_method() -> None:
    x = torch.randn(90, 12)
    from vtprune.kernels import farthest_point

    assert torch.equal(bench_selection.rival(x, 40), farthest_point([x], [40])[0])
