"""`page_rank` against powers of the whole map in float64, and against stored scores of Zero-TPrune and AIM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import no_gpu
from test_attention_kernels import Products, close, masks, oracle, problem
from torch import Tensor

from vtprune.kernels import page_rank, recording, use
from vtprune.kernels.attention import reference as attention
from vtprune.kernels.page_rank import reference


def powers(
    q: Tensor, k: Tensor, mask: Tensor | None, scaling: float, steps: int, start: Tensor | None, damping: float
) -> Tensor:
    weights = oracle(q, k, mask, scaling)
    n = weights.shape[-1]
    first = torch.full((n,), 1 / n, dtype=torch.float64) if start is None else start.double().cpu()
    score = first = first.expand(weights.shape[:3])
    for _ in range(steps):
        score = (1 - damping) * torch.einsum("bhi,bhij->bhj", score, weights) + damping * first
    return score


@pytest.mark.parametrize(
    ("shape", "steps"), [((1, 1, 1, 1, 5), 3), ((2, 4, 2, 2, 8), 2), ((1, 4, 1, 63, 5), 5), ((1, 2, 2, 130, 64), 1)]
)
@pytest.mark.parametrize("kind", ["none", "causal", "random", "bias"])
def test_scores_equal_the_oracle(shape: tuple[int, ...], steps: int, kind: str, backend: str, device: str) -> None:
    batch, heads, groups, n, d = shape
    q, k = problem((batch, heads, groups, n, n, d), device)
    mask = masks(kind, batch, n, n, device)
    with recording() as ran:
        got = page_rank(q, k, mask, d**-0.5, steps)
    assert ran == {"page_rank": backend}
    assert (got.dtype, got.shape) == (torch.float32, (batch, heads, n))
    close(got, powers(q, k, mask, d**-0.5, steps, None, 0.0))


@pytest.mark.parametrize("n", [576, 1000])
def test_many_tokens(n: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton" and device == "cpu":
        from vtprune.kernels.attention import triton

        monkeypatch.setattr(triton, "TILE", 256)  # the interpreter pays by the tile
    q, k = problem((1, 1, 1, n, n, 5), device)
    close(page_rank(q, k, None, 1.5, 1), powers(q, k, None, 1.5, 1, None, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_comes_in(dtype: torch.dtype, backend: str, device: str) -> None:
    q, k = problem((1, 2, 1, 20, 20, 16), device, dtype)
    close(page_rank(q, k, None, 2.5, 4), powers(q, k, None, 2.5, 4, None, 0.0))


def test_start_and_damping(backend: str, device: str) -> None:
    """The CLS token may begin with more, heads may begin apart; what damping takes goes back to the start."""
    q, k = problem((2, 2, 1, 20, 20, 8), device)
    heavy = torch.ones(20, device=device)
    heavy[0] = 20**0.5
    for start in (heavy / heavy.sum(), torch.rand(2, 1, 20).to(device), torch.rand(2, 20).to(device).double()):
        for damping in (0.0, 0.15):
            got = page_rank(q, k, None, 1.0, 2, start, damping)
            close(got, powers(q, k, None, 1.0, 2, start, damping))
    close(page_rank(q, k, None, 1.0, 2, heavy, 1.0), heavy.double().cpu().expand(2, 2, 20))
    kept = heavy.clone()
    page_rank(q, k, None, 1.0, 0, heavy).zero_()
    assert torch.equal(heavy, kept)


def test_sums_are_kept_and_blind_tokens_lose_theirs(backend: str, device: str) -> None:
    q, k = problem((1, 2, 2, 30, 30, 8), device)
    assert page_rank(q, k, None, 1.0, 6).sum(-1).tolist()[0] == pytest.approx([1, 1], abs=1e-5)
    blind = masks("blind", 1, 30, 30, device)
    got = page_rank(q, k, blind, 1.0, 2)
    close(got, powers(q, k, blind, 1.0, 2, None, 0.0))
    assert not got.isnan().any()
    assert page_rank(q, k, blind, 1.0, 1).sum(-1).tolist()[0] == pytest.approx([2 / 3, 2 / 3], abs=1e-5)


def test_padding_that_starts_with_zero_changes_nothing(backend: str, device: str) -> None:
    q, k = problem((1, 2, 1, 33, 33, 8), device)
    real = torch.arange(33, device=device) < 20
    padded = page_rank(q, k, real, 1.0, 3, real / 20, 0.1)
    short = page_rank(q[:, :, :20], k[:, :, :20], None, 1.0, 3, None, 0.1)
    torch.testing.assert_close(padded[..., :20], short, rtol=1e-5, atol=1e-7)
    assert (padded[..., 20:] == 0).all()


def test_strided_inputs_and_same_bits(backend: str, device: str) -> None:
    wide = torch.randn(2, 20, 4, 16, device=device)
    q, k = wide.transpose(1, 2)[..., ::2], wide.flip(1).transpose(1, 2)[:, ::2, :, 1::2]
    start = torch.rand(20, 2, device=device).T[:, None]
    got = page_rank(q, k, None, 0.5, 2, start)
    close(got, powers(q, k, None, 0.5, 2, start, 0.0))
    assert torch.equal(page_rank(q, k, None, 0.5, 2, start), got)


@pytest.mark.parametrize(("kept", "together"), [(1, 1), (13 * 13, 1), (1 << 24, 5 * 13 * 13), (1 << 24, 1 << 20)])
def test_the_reference_cuts_anywhere(kept: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps made again at every step, head by head, group by group, all at once."""
    monkeypatch.setattr(reference, "MAP_ELEMENTS", kept)
    monkeypatch.setattr(reference, "TOGETHER", together)
    q, k = problem((3, 6, 3, 13, 13, 4))
    for kind in ("none", "random", "causal"):
        mask = masks(kind, 3, 13, 13)
        close(page_rank(q, k, mask, 0.5, 3, None, 0.1), powers(q, k, mask, 0.5, 3, None, 0.1))


def test_gradients_flow_where_they_are_asked_for(device: str) -> None:
    q, k = problem((1, 2, 1, 7, 7, 4), device)
    plain = q.double().cpu().requires_grad_()
    with recording() as ran:
        page_rank(q.requires_grad_(), k, None, 1.0, 3)[..., 0].sum().backward()
    powers(plain, k, None, 1.0, 3, None, 0.0)[..., 0].sum().backward()
    assert ran == {"page_rank": "reference"}
    assert q.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(q.grad.double().cpu(), plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps=-1: choose 0 or more"),
        ({"damping": 1.5}, "damping=1.5: choose a share from 0 to 1"),
        ({"damping": float("nan")}, "damping=nan"),
        ({"start": torch.ones(2, 5)}, r"start \(2, 5\) does not broadcast to \[B, H, N\] = \(2, 6, 7\)"),
        ({"start": torch.ones(1, 2, 6, 7)}, "does not broadcast"),
        ({"start": torch.ones(7, device="meta")}, "several devices"),
        ({"k": torch.zeros(2, 3, 8, 4)}, "7 queries and 8 keys: PageRank needs the same tokens"),
        ({"k": torch.zeros(2, 4, 7, 4)}, "6 query heads cannot share 4 key heads"),
        ({"mask": torch.zeros(2, 1, 5, 6)}, "does not broadcast"),
        ({"q": torch.zeros(2, 6, 0, 4), "k": torch.zeros(2, 3, 0, 4)}, "at least 1"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(2, 6, 7, 4), "k": torch.zeros(2, 3, 7, 4), "mask": None, "scaling": 1.0}
    with pytest.raises(ValueError, match=message):
        page_rank(**{**good, "steps": 2, **change})


@pytest.mark.parametrize("name", ["h3_n50", "h4_n65_reg", "h6_n197"])
def test_stored_scores_of_zero_tprune(shared: Path, name: str, backend: str, device: str) -> None:
    stored = np.load(shared / "golden" / f"zerotprune_spec_{name}.npz")
    q, k = (torch.from_numpy(stored[key]).to(device) for key in "qk")
    if backend == "triton" and device == "cpu":
        q, k = q[:1, 1:2], k[:1, 1:2]  # the interpreter pays by the tile
    for steps in (1, 2, 5) if backend == "triton" else (1, 2, 5, 10, 30, 50):
        want = torch.from_numpy(stored[f"s_iter{steps}"]).double()
        close(page_rank(q, k, None, q.shape[-1] ** -0.5, steps), want[:1, 1:2] if q.shape[0] == 1 else want)


def test_stored_importance_of_aim(shared: Path, backend: str, device: str) -> None:
    """Stored are logits, not queries and keys: logits times the unit vectors give them back."""
    prefill, layers = (np.load(shared / "golden" / f"{f}.npz") for f in ("aim_inllm", "video_aim_prune_N64"))
    cases = [(prefill["logits_layer14"], prefill["importance_layer14"])]
    cases += [(layers["logits"][0], layers["importance"][0])]
    for logits, want in cases[1:] if backend == "triton" and device == "cpu" else cases:
        z = torch.from_numpy(logits)[None].to(device)
        seen = z > torch.finfo(torch.float32).min / 2
        n = z.shape[-1]
        unit = torch.eye(n, device=device).expand(1, z.shape[1], n, n)
        got = page_rank(z.masked_fill(~seen, 0), unit, seen, 1 / float(prefill["tau"]), int(prefill["iters"]))
        importance = got.square().mean(1).sqrt()[0]
        torch.testing.assert_close(importance.cpu(), torch.from_numpy(want), rtol=2e-4, atol=1e-6)


@pytest.mark.gpu
@no_gpu
def test_on_a_gpu_nobody_waits_and_a_graph_replays_it() -> None:
    q, k = problem((2, 6, 6, 197, 197, 64), "cuda", torch.bfloat16)
    with recording() as ran:
        want = page_rank(q, k, None, 0.125, 5)  # compiles
    assert ran == {"page_rank": "triton"}
    torch.cuda.set_sync_debug_mode("error")
    try:
        page_rank(q, k, None, 0.125, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = page_rank(q, k, None, 0.125, 5)
    graph.replay()
    assert torch.equal(got, want)
    close(got, powers(q, k, None, 0.125, 5, None, 0.0))


@pytest.mark.parametrize("steps", [1, 5])
def test_the_reference_makes_a_causal_map_once_and_half_of_it(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROWS", 16)
    monkeypatch.setattr(reference, "ROWS", 16)
    q, k = problem((1, 4, 2, 256, 256, 8))
    mask = masks("causal", 1, 256, 256)
    with use("reference"), Products() as made:
        got = page_rank(q, k, mask, 0.3, steps)
    close(got, powers(q, k, mask, 0.3, steps, None, 0.0))
    assert made.entries <= 4 * 256 * 256 * 0.55
    assert made.fresh == 0
