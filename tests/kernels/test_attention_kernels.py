"""`attention_rows` and `attention_received` against softmax written out in float64, on every implementation at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import no_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vtprune.evals.speed import bench_attention
from vtprune.kernels import attention_received, attention_rows, recording, use
from vtprune.kernels.attention import reference
from vtprune.kernels.dispatch import has_triton

interpreter = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here"),
]


def oracle(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[B, H, M, N]: every score, exponentiated and divided by its row's sum; rows without a sum are zeros."""
    q, k = q.double().cpu(), k.double().cpu()
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask.cpu(), -torch.inf)
    elif mask is not None:
        scores = scores + mask.double().cpu().masked_fill(mask.cpu() <= torch.finfo(mask.dtype).min, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def problem(
    shape: tuple[int, int, int, int, int, int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """shape: batch, query heads, key heads, queries, keys, width."""
    batch, heads, groups, m, n, d = shape
    return torch.randn(batch, heads, m, d).to(device, dtype), torch.randn(batch, groups, n, d).to(device, dtype)


def masks(kind: str, batch: int, m: int, n: int, device: str = "cpu") -> Tensor | None:
    """none, random, causal, window (block-diagonal, one per sample), padding (1-D columns), blind (some rows see none),
    bias (additive), lowest (additive, blocks with the lowest finite number)."""
    queries, keys = torch.arange(m)[:, None], torch.arange(n)[None]
    width = torch.arange(batch)[:, None, None, None] + 3
    made = {
        "random": torch.rand(batch, 1, m, n) < 0.6,
        "causal": (keys <= queries + n - m)[None, None],
        "window": queries * n // m // width == keys // width,
        "padding": torch.arange(n) < max(1, n * 2 // 3),
        "blind": (queries % 3 != 1).expand(m, n),
        "bias": torch.randn(batch, 1, m, n),
        "lowest": torch.zeros(1, 1, m, n).masked_fill(torch.rand(m, n) < 0.5, torch.finfo(torch.float32).min),
    }
    return None if kind == "none" else made[kind].to(device)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double().cpu(), want, rtol=2e-5, atol=1e-6)


SHAPES = [(1, 1, 1, 1, 1, 1), (2, 4, 4, 2, 2, 5), (1, 2, 1, 63, 63, 8), (1, 4, 1, 1, 576, 64), (1, 2, 1, 3, 1000, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "random", "bias"])
def test_rows_equal_the_oracle(shape: tuple[int, ...], kind: str, backend: str, device: str) -> None:
    batch, heads, _, m, n, d = shape
    q, k = problem(shape, device)  # type: ignore[arg-type]
    mask = masks(kind, batch, m, n, device)
    with recording() as ran:
        got = attention_rows(q, k, mask, d**-0.5)
    assert ran == {"attention_rows": backend}
    assert (got.dtype, got.shape) == (torch.float32, (batch, heads, m, n))
    close(got, oracle(q, k, mask, d**-0.5))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 1), (3, 4, 1, 2, 2, 5), (1, 2, 1, 63, 63, 8), (1, 1, 1, 576, 33, 64), (1, 2, 2, 33, 1000, 5)],
)
@pytest.mark.parametrize("kind", ["none", "random", "bias"])
def test_received_equals_the_oracle(shape: tuple[int, ...], kind: str, backend: str, device: str) -> None:
    batch, _, _, m, n, d = shape
    q, k = problem(shape, device)  # type: ignore[arg-type]
    mask = masks(kind, batch, m, n, device)
    with recording() as ran:
        got = attention_received(q, k, mask, d**-0.5)
    assert ran == {"attention_received": backend}
    assert (got.dtype, got.shape) == (torch.float32, (batch, n))
    close(got, oracle(q, k, mask, d**-0.5).mean(dim=(1, 2)))


@pytest.mark.parametrize("kind", ["causal", "window", "padding", "blind", "lowest"])
def test_masks_of_every_kind(kind: str, backend: str, device: str) -> None:
    q, k = problem((2, 2, 1, 20, 70, 16), device)
    mask = masks(kind, 2, 20, 70, device)
    want = oracle(q, k, mask, 0.3)
    rows = attention_rows(q, k, mask, 0.3)
    close(rows, want)
    assert (rows.cpu()[want == 0] == 0).all()
    close(attention_received(q, k, mask, 0.3), want.mean(dim=(1, 2)))
    assert want.sum(-1).min() == (0 if kind == "blind" else pytest.approx(1))


def test_a_mask_for_one_query_or_one_key_serves_all(backend: str, device: str) -> None:
    q, k = problem((2, 2, 2, 5, 7, 8), device)
    for shape in ((2, 1, 1, 7), (1, 2, 5, 1), (5, 1), (1,)):
        mask = torch.randn(shape, device=device) if len(shape) != 1 else torch.zeros(1, dtype=torch.bool, device=device)
        close(attention_rows(q, k, mask, 0.3), oracle(q, k, mask, 0.3))
        close(attention_received(q, k, mask, 0.3), oracle(q, k, mask, 0.3).mean(dim=(1, 2)))


@pytest.mark.parametrize("d", [5, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_scores_are_float32_whatever_comes_in(dtype: torch.dtype, d: int, backend: str, device: str) -> None:
    q, k = problem((1, 2, 1, 20, 70, d), device, dtype)
    mask = torch.zeros(1, 1, 20, 70, dtype=dtype, device=device)
    mask[..., 50:] = torch.finfo(dtype).min
    mask[..., :3] = 0.7
    close(attention_rows(q, k, mask, d**-0.5), oracle(q, k, mask, d**-0.5))
    close(attention_received(q, k, mask, d**-0.5), oracle(q, k, mask, d**-0.5).mean(dim=(1, 2)))
    close(attention_rows(q.float(), k, None, d**-0.5), oracle(q, k, None, d**-0.5))


def test_large_scores_neither_overflow_nor_vanish(backend: str, device: str) -> None:
    q, k = problem((1, 2, 2, 9, 70, 8), device)
    want = oracle(q, k, None, 300.0)
    rows = attention_rows(q, k, None, 300.0)
    torch.testing.assert_close(rows.double().cpu(), want, rtol=0, atol=2e-3)  # scores of 2,000 hold 4 decimals
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), rtol=1e-3, atol=0)


def test_strided_inputs(backend: str, device: str) -> None:
    wide = torch.randn(1, 70, 4, 32, device=device)
    q, k = wide.transpose(1, 2)[..., ::2], wide.flip(1)[:, :, ::2].transpose(1, 2)[..., 1::2]
    mask = (torch.rand(1, 1, 70, 70, device=device) < 0.7).transpose(-1, -2)[:, :, ::2][:, :, :, 1:]
    q, k = q[:, :, ::2], k[:, :, 1:]
    assert not any(t.is_contiguous() for t in (q, k, mask))
    close(attention_rows(q, k, mask, 0.2), oracle(q, k, mask, 0.2))
    close(attention_received(q, k, mask, 0.2), oracle(q, k, mask, 0.2).mean(dim=(1, 2)))


def test_weights_leave_padded_queries_out(backend: str, device: str) -> None:
    q, k = problem((2, 2, 1, 40, 40, 8), device)
    real = torch.arange(40, device=device) < torch.tensor([[40], [23]], device=device)
    got = attention_received(q, k, real[:, None, None], 0.3, weights=real / real.sum(1, keepdim=True))
    close(got[:1], oracle(q[:1], k[:1], None, 0.3).mean(dim=(1, 2)))
    close(got[1:, :23], oracle(q[1:, :, :23], k[1:, :, :23], None, 0.3).mean(dim=(1, 2)))
    assert (got[1, 23:] == 0).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_stays_in_its_row(backend: str, device: str) -> None:
    q, k = problem((2, 2, 1, 5, 70, 8), device)
    q[1, 0, 3, 2] = torch.nan
    bad = attention_rows(q, k, None, 0.3).isnan()
    assert bad[1, 0, 3].all()
    assert bad.sum() == 70
    assert attention_received(q, k, None, 0.3).isnan().all(1).tolist() == [False, True]


def test_same_bits_on_every_run_and_close_in_any_batch(backend: str, device: str) -> None:
    q, k = problem((2, 2, 2, 8, 70, 8), device)
    mask = masks("random", 2, 8, 70, device)
    rows, received = attention_rows(q, k, mask, 0.3), attention_received(q, k, mask, 0.3)
    assert torch.equal(attention_rows(q, k, mask, 0.3), rows)
    assert torch.equal(attention_received(q, k, mask, 0.3), received)
    for b in range(2):
        one = slice(b, b + 1)
        torch.testing.assert_close(attention_rows(q[one], k[one], mask[one], 0.3), rows[one], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            attention_received(q[one], k[one], mask[one], 0.3), received[one], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("elements", [1, 500, 3_000, 20_000, 1 << 24])
@pytest.mark.parametrize("block", [None, 1, 7, 100])
def test_the_reference_cuts_anywhere(elements: int, block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CACHE_ELEMENTS", elements)
    q, k = problem((3, 6, 3, 13, 29, 4))
    k = k.to(torch.bfloat16)
    for kind in ("none", "random", "bias", "causal"):
        mask = masks(kind, 3, 13, 29)
        close(attention_rows(q, k, mask, 0.5), oracle(q, k, mask, 0.5))
        close(attention_received(q, k, mask, 0.5, block=block), oracle(q, k, mask, 0.5).mean(dim=(1, 2)))


class Watch(TorchDispatchMode):
    """The largest tensor made, and how often the host read a value."""

    largest = reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.reads += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "equal")
        made = out if isinstance(out, tuple | list) else (out,)
        self.largest = max([self.largest, *(t.untyped_storage().nbytes() for t in made if isinstance(t, Tensor))])
        return out


def test_no_square_is_made_and_nothing_read(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CACHE_ELEMENTS", 4_000)
    monkeypatch.setattr(reference, "DEVICE_ELEMENTS", 4_000)
    q, k = problem((1, 2, 2, 300, 300, 4), device)
    mask = torch.ones(300, dtype=torch.bool, device=device)
    with Watch() as watch:
        attention_received(q, k, mask, 0.5)
    assert watch.reads == 0
    assert watch.largest <= 4 * 4_000 < 300 * 300


@pytest.mark.parametrize("where", ["q", "k", "mask"])
@pytest.mark.parametrize("name", [pytest.param("triton", marks=interpreter), "reference"])
def test_rows_beyond_two_to_the_31_elements(name: str, where: str) -> None:
    step = 2**30 + 8  # untouched pages of virtual memory cost nothing
    q, k = problem((1, 2, 1, 3, 3, 16), dtype=torch.float16)
    mask = torch.rand(1, 1, 3, 3) < 0.7
    dtype = torch.bool if where == "mask" else torch.float16
    far = torch.empty(2 * step + 64, dtype=dtype).as_strided((1, 1, 3, 16), (16, 16, step, 1))
    if where == "q":
        q = far.copy_(q[:, :1])
    elif where == "k":
        k = far.copy_(k)
    else:
        mask = far[..., :3].copy_(mask)
    with use(name):  # type: ignore[arg-type]
        close(attention_rows(q, k, mask, 0.3), oracle(q, k, mask, 0.3))
        close(attention_received(q, k, mask, 0.3), oracle(q, k, mask, 0.3).mean(dim=(1, 2)))


def test_gradients_flow_where_they_are_asked_for(device: str) -> None:
    q, k = problem((2, 4, 2, 5, 9, 4), device)
    mask = masks("blind", 2, 5, 9, device)
    upstream = torch.randn(2, 9, device=device)
    plain_q, plain_k = q.double().cpu().requires_grad_(), k.double().cpu().requires_grad_()
    q.requires_grad_(), k.requires_grad_()
    with recording() as ran:
        (attention_received(q, k, mask, 0.3) * upstream).sum().backward()
        attention_rows(q, k, mask, 0.3)[..., 0].sum().backward()
    assert set(ran.values()) == {"reference"}
    weights = oracle(plain_q, plain_k, mask, 0.3)
    (weights.mean(dim=(1, 2)) * upstream.double().cpu()).sum().backward()
    oracle(plain_q, plain_k, mask, 0.3)[..., 0].sum().backward()
    for got, want in ((q.grad, plain_q.grad), (k.grad, plain_k.grad)):
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_triton_says_what_it_cannot_do() -> None:
    q, k = problem((1, 2, 1, 3, 9, 257))
    with (
        use("triton"),
        pytest.raises(RuntimeError, match=r"attention_rows cannot run with Triton: heads of 257 channels"),
    ):
        attention_rows(q, k, None, 0.1)
    with use("triton"), pytest.raises(RuntimeError, match="no backward pass"):
        attention_received(q[..., :8].requires_grad_(), k[..., :8], None, 0.1)
    with recording() as ran:
        attention_received(q, k, None, 0.1)
    assert ran == {"attention_received": "reference"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 7, 4)}, "6 query heads cannot share 4 key heads"),
        ({"k": torch.zeros(2, 3, 7, 5)}, r"q \(2, 6, 5, 4\) and k \(2, 3, 7, 5\) must agree in batch and d"),
        ({"k": torch.zeros(1, 3, 7, 4)}, "must agree in batch"),
        ({"k": torch.zeros(2, 3, 0, 4)}, r"k \(2, 3, 0, 4\) .* at least 1"),
        ({"k": torch.zeros(2, 7, 4)}, r"k \(2, 7, 4\) .* \[batch, heads, tokens, d\]"),
        ({"q": torch.zeros(2, 6, 0, 4)}, r"q \(2, 6, 0, 4\) .* at least 1"),
        ({"q": torch.zeros(2, 6, 5, 4, dtype=torch.int64)}, "int64: pass floating point"),
        ({"k": torch.zeros(2, 3, 7, 4, device="meta")}, r"several devices \(cpu, meta\)"),
        ({"mask": torch.zeros(2, 1, 5, 6)}, r"mask \(2, 1, 5, 6\) does not broadcast to .* \(2, 6, 5, 7\)"),
        ({"mask": torch.zeros(4, 7)}, "does not broadcast"),
        ({"mask": torch.zeros(1, 2, 6, 5, 7)}, "does not broadcast"),
        ({"mask": torch.ones(2, 1, 1, 7, dtype=torch.int64)}, r"mask of torch.int64: pass a boolean one"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, Tensor], message: str, backend: str, device: str) -> None:
    good = {"q": torch.zeros(2, 6, 5, 4), "k": torch.zeros(2, 3, 7, 4), "mask": None, **change}
    moved = {name: t.to(device) if t is not None and t.device.type != "meta" else t for name, t in good.items()}
    if "meta" not in str(change):
        message = message.replace("cpu", device)
    for call in (attention_rows, attention_received):
        with pytest.raises(ValueError, match=message if device == "cpu" else message.replace("cpu", "cuda:0")):
            call(moved["q"], moved["k"], moved["mask"], 1.0)  # type: ignore[arg-type]


def test_received_checks_its_own_arguments() -> None:
    q, k = problem((2, 2, 1, 5, 7, 4))
    with pytest.raises(ValueError, match=r"weights \(2, 7\): .* \(2, 5\)"):
        attention_received(q, k, None, 1.0, weights=torch.ones(2, 7))
    with pytest.raises(ValueError, match="block=0: choose at least 1"):
        attention_received(q, k, None, 1.0, block=0)


@pytest.mark.gpu
@no_gpu
def test_on_a_gpu_nobody_waits_and_a_graph_replays_it() -> None:
    q, k = problem((2, 8, 2, 576, 576, 64), "cuda", torch.bfloat16)
    mask = masks("window", 2, 576, 576, "cuda")

    def both() -> tuple[Tensor, Tensor]:
        return attention_rows(q[:, :, :1], k, None, 0.125), attention_received(q, k, mask, 0.125)

    with recording() as ran:
        want = both()  # compiles
    assert set(ran.values()) == {"triton"}
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    graph.replay()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    close(got[1], oracle(q, k, mask, 0.125).mean(dim=(1, 2)))


def test_the_benchmark_compares_like_with_like(device: str) -> None:
    q, k = problem((2, 4, 2, 5, 9, 8), device)
    close(bench_attention.eager("attention_rows", q, k, 0.3), oracle(q, k, None, 0.3))
    close(bench_attention.eager("attention_received", q, k, 0.3), oracle(q, k, None, 0.3).mean(dim=(1, 2)))


@pytest.mark.gpu
@no_gpu
def test_the_benchmark_gives_a_row_a_problem() -> None:
    rows = bench_attention.attention("cuda", repeats=2)
    assert len(rows) == len(bench_attention.PROBLEMS)
    assert all(row["triton_graph_ms"] > 0 and row["triton_peak_mib"] >= 0 for row in rows)


def test_the_benchmark_refuses_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(RuntimeError, match="no CUDA device"):
        bench_attention.attention("cuda")


class Products(TorchDispatchMode):
    """How many entries of maps were made, and the bytes of fresh memory that these and their softmax took."""

    entries = fresh = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("bmm", "_softmax") and out.shape[-2] > 1:  # one row: a sum of columns
            self.entries += out.numel() if name == "bmm" else 0
            self.fresh += 0 if "out" in (kwargs or {}) else out.nbytes
        return out


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_the_reference_leaves_out_what_a_mask_hides(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal map costs half a map, images that are apart cost their own maps, and blocks share their memory."""
    monkeypatch.setattr(reference, "ROWS", 16)
    q, k = problem((1, 4, 2, 256, 256, 8))
    same_image = (torch.arange(256)[:, None] // 64 == torch.arange(256) // 64)[None, None]
    mask = same_image if kind == "window" else masks("causal", 1, 256, 256)
    with use("reference"), Products() as made:
        got = attention_received(q, k, mask, 0.3)
    close(got, oracle(q, k, mask, 0.3).mean(dim=(1, 2)))
    assert made.entries <= 4 * 256 * 256 * (0.55 if kind == "causal" else 0.25)
    assert made.fresh == 0


def test_the_reference_skips_queries_that_see_nothing() -> None:
    q, k = problem((1, 2, 2, 300, 300, 8))
    mask = torch.zeros(1, 1, 300, 300, dtype=torch.bool)
    with use("reference"), Products() as made:
        assert (attention_received(q, k, mask, 0.3) == 0).all()
        assert (attention_rows(q, k, mask, 0.3) == 0).all()
    assert made.entries == 0
