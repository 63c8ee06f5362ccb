"""`merge` against sums made pair by pair in float64, on every implementation at hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtprune import Assignment
from vtprune.evals.speed import bench_kernels
from vtprune.kernels import merge, recording, use
from vtprune.kernels.dispatch import has_triton

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-5}


def oracle(x: Tensor, src: Tensor, dst: Tensor, w: Tensor, out_rows: int) -> Tensor:
    out = torch.zeros(out_rows, *x.shape[1:], dtype=torch.float64)
    for s, d, weight in zip(src.tolist(), dst.tolist(), w.double().tolist()):
        out[d] += weight * x[s].double().cpu()
    return out


def pairs(n: int, e: int, k: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Unsorted, with repeats and rows that nobody names."""
    src, dst = torch.randint(n, (e,)), torch.randint(k, (e,)) // 2 * 2
    return src.to(device), dst.to(device), torch.rand(e).to(device)


def close(got: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("n", "d", "e", "k"), [(1, 1, 1, 1), (2, 3, 5, 1), (63, 130, 63, 7), (576, 24, 600, 33), (1000, 5, 1000, 99)]
)
def test_sums_equal_the_oracle(n: int, d: int, e: int, k: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x = torch.randn(n, d).to(device, dtype)
    src, dst, w = pairs(n, e, k, device)
    with recording() as ran:
        got = merge(x, src, dst, w, k)
    assert ran == {"merge": backend}
    assert (got.dtype, got.shape) == (dtype, (k, d))
    close(got, oracle(x, src, dst, w, k))


def test_sums_that_float32_holds_are_exact(backend: str, device: str) -> None:
    x, (src, dst, _) = torch.randint(-8, 8, (63, 17)).float().to(device), pairs(63, 200, 9, device)
    w = torch.randint(-4, 4, (200,)).to(device) / 4
    assert torch.equal(merge(x, src, dst, w, 9).double().cpu(), oracle(x, src, dst, w, 9))


def test_one_row_that_takes_everything(backend: str, device: str) -> None:
    x = torch.randn(300, 6, device=device)
    src, dst = torch.arange(300, device=device), torch.full((300,), 2, device=device)
    w = torch.full((300,), 1 / 300, device=device)
    close(merge(x, src, dst, w, 4), oracle(x, src, dst, w, 4))


@pytest.mark.parametrize("shape", [(9,), (9, 2, 5), (9, 0)])
def test_any_number_of_dimensions(shape: tuple[int, ...], backend: str, device: str) -> None:
    x, (src, dst, w) = torch.randn(shape, device=device), pairs(9, 12, 4, device)
    got = merge(x, src, dst, w, 4)
    assert got.shape == (4, *shape[1:])
    if got.numel():
        close(got, oracle(x, src, dst, w, 4))


def test_strided_arguments_and_small_indices(backend: str, device: str) -> None:
    x = torch.randn(12, 40, device=device).T[::2]
    src, dst, w = (t.repeat_interleave(2)[::2] for t in pairs(20, 30, 6, device))
    want = oracle(x, src, dst, w, 6)
    close(merge(x, src, dst, w, 6), want)
    close(merge(x, src.int(), dst.int(), w.double(), 6), want)


def test_no_pairs_and_no_rows(backend: str, device: str) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    w, x = none.float(), torch.randn(3, 2, device=device)
    assert torch.equal(merge(x, none, none, w, 5), x.new_zeros(5, 2))
    assert merge(x[:0], none, none, w, 2).shape == (2, 2)
    assert merge(x, none, none, w, 0).shape == (0, 2)


def test_same_bits_on_every_run_and_for_every_order_of_the_rows(backend: str, device: str) -> None:
    x, (src, dst, w) = torch.randn(400, 33, device=device), pairs(400, 900, 12, device)
    first = merge(x, src, dst, w, 12)
    assert torch.equal(merge(x, src, dst, w, 12), first)
    by_row = torch.sort(dst, stable=True).indices  # pairs of one row stay in their order
    assert torch.equal(merge(x, src[by_row], dst[by_row], w[by_row], 12), first)
    shuffled = torch.randperm(900).to(device)  # the order of a row's own terms may show in the last bit
    close(merge(x, src[shuffled], dst[shuffled], w[shuffled], 12), first.double().cpu())


@pytest.mark.skipif(torch.cuda.is_available(), reason="virtual memory of the host stands in for the GPU's")
def test_rows_beyond_two_to_the_31_elements() -> None:
    if not has_triton():
        pytest.skip("Triton is not installed")
    step = 2**30 + 8
    storage = torch.empty(2 * step + 16, dtype=torch.float16)  # untouched pages cost nothing
    x = storage.as_strided((3, 16), (step, 1))
    x.copy_(torch.randn(3, 16))
    src, dst, w = torch.tensor([2, 1, 2]), torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.5])
    with use("triton"):
        close(merge(x, src.int(), dst, w, 2), oracle(x, src, dst, w, 2))


def test_gradients_flow_where_they_are_asked_for(device: str) -> None:
    x = torch.randn(7, 3, device=device, requires_grad=True)
    src, dst, w = pairs(7, 11, 4, device)
    w.requires_grad_()
    upstream = torch.randn(4, 3, device=device)
    (merge(x, src, dst, w, 4) * upstream).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    want = torch.zeros(7, 3, dtype=torch.float64)
    for i, (s, d) in enumerate(zip(src.tolist(), dst.tolist())):
        want[s] += w[i].item() * upstream[d].double().cpu()
        assert w.grad[i].item() == pytest.approx((x[s] * upstream[d]).sum().item(), rel=1e-4, abs=1e-5)
    close(x.grad, want)


def test_triton_says_that_it_has_no_backward() -> None:
    if not has_triton():
        pytest.skip("Triton is not installed")
    src, dst, w = pairs(7, 11, 4)
    with use("triton"), pytest.raises(RuntimeError, match="no backward pass"):
        merge(torch.randn(7, 3, requires_grad=True), src, dst, w, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": torch.tensor([0, 4])}, r"src in 0\.\.4 \(valid: 0\.\.3\)"),
        ({"src": torch.tensor([-1, 0])}, r"src in -1\.\.0"),
        ({"dst": torch.tensor([2, 0])}, r"dst in 0\.\.2 \(valid: 0\.\.1\)"),
        ({"src": torch.tensor([0])}, r"one shape \[E\]"),
        ({"w": torch.ones(2, 1)}, r"one shape \[E\]"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "floating"),
        ({"src": torch.tensor([0.0, 1.0])}, "int32 or int64"),
        ({"x": torch.ones(4, 3, dtype=torch.int64)}, "floating"),
        ({"x": torch.ones(())}, "floating"),
        ({"x": torch.ones(0, 3)}, "x has 0 rows"),
        ({"out_rows": 0}, "the answer 0"),
        ({"out_rows": -1}, "out_rows=-1"),
        ({"w": torch.ones(2, device="meta")}, "several devices"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    good = {"x": torch.ones(4, 3), "src": torch.tensor([0, 3]), "dst": torch.tensor([0, 1]), "w": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        merge(**{**good, "out_rows": 2, **change})  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend_name", ["reference", "triton"])
def test_on_a_gpu_wild_indices_poison_their_row_and_nobody_waits(backend_name: str) -> None:
    x, w = torch.randn(4, 3, device="cuda"), torch.ones(3, device="cuda")
    src, dst = torch.tensor([0, 99, 1], device="cuda"), torch.tensor([0, 1, 2], device="cuda")
    with use(backend_name):  # type: ignore[arg-type]
        merge(x, src, dst, w, 3)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = merge(x, src, dst, w, 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert got.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_assignment_merges_with_it(dtype: torch.dtype) -> None:
    x, (src, dst, w) = torch.randn(20, 4).to(dtype), pairs(20, 25, 6)
    answer = Assignment(torch.arange(6), src=src, dst=dst, w=w)
    with recording() as ran:
        close(answer.apply(x), oracle(x, src, dst, w, 6))
    assert ran == {"merge": "reference"}
    with recording() as ran:
        assert torch.equal(Assignment(torch.tensor([1, 3])).apply(x), x[[1, 3]])
    assert not ran


@pytest.mark.no_cover
def test_merging_an_image_is_much_faster_than_a_loop_over_its_tokens() -> None:
    """15 to 24 times on an AMD EPYC, 11 to 13 on an Intel Xeon; what is asserted leaves room for both."""
    for _ in range(5):  # neighbours on the same cores disturb single runs
        row = bench_kernels.merge_against_loop()
        if row["speedup"] >= 8:
            break
    assert row["same"]
    assert row["speedup"] >= 8, row
