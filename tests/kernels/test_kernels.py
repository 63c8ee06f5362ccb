"""Kernels against the float64 oracles: shapes, dtypes, ties, masks, memory, host transfers, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracles
import pytest
import torch
from greedy import Watch, clustered
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vtprune.kernels import (
    attention_received,
    attention_rows,
    best_few,
    best_first,
    check_finite,
    deferring,
    farthest_point,
)
from vtprune.kernels.farthest_point import reference

OBJECTIVES = ("maxmin", "maxsum")
MEMORY = ("fast", "low")


@contextmanager
def gram_limit(size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(reference, "GRAM_BYTES", size)
        yield


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 5, 2), (7, 4, 7), (33, 8, 1), (63, 16, 20), (97, 31, 97)])
def test_picks_equal_the_oracle(n: int, d: int, k: int, objective: str, memory: str) -> None:
    x = clustered(n, d)
    picks = farthest_point([x], [k], objective=objective, memory=memory)[0]
    assert picks.dtype == torch.int64
    assert picks.tolist() == oracles.diverse(x, k, objective)
    start = n // 2
    given = farthest_point([x], [k], objective=objective, memory=memory, first=[start])[0]
    assert given.tolist() == oracles.diverse(x, k, objective, first=start)
    as_tensor = farthest_point([x], [k], objective=objective, memory=memory, first=[torch.tensor(start)])[0]
    assert torch.equal(given, as_tensor)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ties_go_to_the_lower_index(objective: str, memory: str) -> None:
    """Axis vectors have cosines of exactly 0, 1 and -1: every step has several equally good tokens."""
    axes = torch.eye(4)
    x = torch.cat([axes, -axes, 3 * axes, torch.zeros(2, 4), axes])[torch.randperm(18)]
    picks = farthest_point([x], [18], objective=objective, memory=memory)[0].tolist()
    assert picks == oracles.diverse(x, 18, objective)
    assert sorted(picks) == list(range(18))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("x", [torch.zeros(9, 4), torch.ones(9, 4), torch.full((9, 4), 1e-30)], ids=["0", "1", "tiny"])
def test_equal_rows_are_never_picked_twice(x: Tensor, objective: str, memory: str) -> None:
    assert farthest_point([x], [9], objective=objective, memory=memory)[0].tolist() == list(range(9))


@pytest.mark.parametrize("memory", MEMORY)
def test_zero_rows_have_similarity_zero(memory: str) -> None:
    """Opposite of everything picked beats a zero row, which beats a copy."""
    x = torch.tensor([[1.0, 0], [1, 0], [0, 0], [-1, 0]])
    assert farthest_point([x], [4], first=[0], memory=memory)[0].tolist() == [0, 3, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    x = clustered(80, 24).to(dtype)
    expected = farthest_point([x.float()], [40])[0]
    assert torch.equal(farthest_point([x], [40])[0], expected)
    assert expected.tolist() == oracles.divprune(x.float(), 40)


@pytest.mark.parametrize("memory", MEMORY)
def test_row_norms_do_not_matter(memory: str) -> None:
    """Scaling rows by powers of two is exact in float32, up to the ends of its range."""
    x = clustered(50, 12)
    scale = 2.0 ** torch.randint(-100, 100, (50, 1)).float()
    assert torch.equal(farthest_point([x * scale], [25], memory=memory)[0], farthest_point([x], [25], memory=memory)[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_permuted_rows_give_permuted_picks(objective: str) -> None:
    x, perm = clustered(60, 16), torch.randperm(60)
    plain = farthest_point([x], [30], objective=objective)[0]
    assert torch.equal(perm[farthest_point([x[perm]], [30], objective=objective)[0]], plain)


def test_strided_rows() -> None:
    wide = clustered(40, 32)
    for x in (wide[:, ::2], wide.T, wide[::3]):
        assert torch.equal(farthest_point([x], [10])[0], farthest_point([x.contiguous()], [10])[0])


@pytest.mark.parametrize("memory", ["auto", *MEMORY])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ragged_batch_equals_single_problems(objective: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, budgets = [33, 5, 400, 33, 1, 63, 400], [33, 2, 50, 7, 1, 63, 3]
    units = [clustered(n, 24, seed) for seed, n in enumerate(sizes)]
    single = [farthest_point([x], [k], objective=objective, memory=memory)[0] for x, k in zip(units, budgets)]
    # The second limit splits the batch into several loops, the third sends every problem to the path without matrix.
    for limit in (reference.GRAM_BYTES, 4 * 400**2, 0):
        with gram_limit(limit, monkeypatch):
            batch = farthest_point(units, budgets, objective=objective, memory=memory)
        for one, other in zip(batch, single):
            assert torch.equal(one, other)


def test_blocks_of_the_gram_matrix() -> None:
    """More rows than one block, not a multiple of it: mirrored blocks equal the plain product."""
    x = torch.nn.functional.normalize(clustered(2 * reference.GRAM_BLOCK + 37, 16), dim=1)
    filled = reference.fill_gram(x, torch.full((len(x), len(x)), torch.nan))
    assert torch.allclose(filled, x @ x.T, atol=1e-6)
    assert torch.equal(filled, filled.T)


@pytest.mark.parametrize("memory", MEMORY)
def test_the_loop_reads_nothing_back(memory: str) -> None:
    units = [clustered(50, 8, seed) for seed in range(3)]
    with Watch() as watch, deferring() as checks:
        farthest_point(units, [40, 30, 20], memory=memory, first=[torch.tensor(3)] * 3)
    assert watch.reads == 0
    assert len(checks) == 1, "the only thing to read is the check for NaN and Inf, and it can wait"


def test_low_memory_makes_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 600
    monkeypatch.setattr(reference, "MOST", 64)
    with Watch() as low:
        farthest_point([clustered(n, 16)], [50], memory="low")
    with Watch() as fast:
        farthest_point([clustered(n, 16)], [50], memory="fast")
    assert low.largest <= n * 64 < n * n <= fast.largest


def test_no_gradient_is_recorded() -> None:
    x = clustered(20, 8).requires_grad_()
    assert not farthest_point([x], [5])[0].requires_grad


def test_empty_batch() -> None:
    assert farthest_point([], []) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("memory", MEMORY)
def test_non_finite_features_are_refused(bad: float, memory: str) -> None:
    x = clustered(12, 4)
    x[7, 2] = bad
    with pytest.raises(ValueError, match=r"unit 1 hold 1 NaN or Inf.*7"):
        farthest_point([clustered(5, 4), x], [2, 3], memory=memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [0]}, r"budgets\[0\]=0: choose 1..6"),
        ({"budgets": [7]}, r"budgets\[0\]=7: choose 1..6"),
        ({"budgets": [1, 2]}, "1 feature tensors need as many budgets"),
        ({"first": [6]}, r"first\[0\]=6: choose 0..5"),
        ({"first": [-1]}, r"first\[0\]=-1"),
        ({"first": []}, "first picks"),
        ({"objective": "minmax"}, "objective='minmax': choose 'maxmin' or 'maxsum'"),
        ({"memory": "none"}, "memory='none': choose 'auto', 'fast' or 'low'"),
        ({"features": [torch.zeros(6)]}, r"\(6,\)"),
        ({"features": [torch.zeros(6, 2, dtype=torch.int64)]}, "int64"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"features": [clustered(6, 2)], "budgets": [3], **change}
    with pytest.raises(ValueError, match=message):
        farthest_point(call.pop("features"), call.pop("budgets"), **call)


def queries(batch: int, heads: int, groups: int, rows: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, rows, d), torch.randn(batch, groups, n, d)


@pytest.mark.parametrize(
    ("heads", "groups", "rows", "n", "d"), [(1, 1, 1, 1, 1), (4, 4, 3, 7, 5), (6, 2, 2, 33, 8), (8, 1, 1, 63, 4)]
)
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "lowest"])
def test_attention_rows_equal_the_oracle(heads: int, groups: int, rows: int, n: int, d: int, kind: str) -> None:
    q, k = queries(2, heads, groups, rows, n, d)
    allowed = torch.rand(2, 1, rows, n) < 0.7
    bias = torch.zeros(2, 1, rows, n).masked_fill(~allowed, -torch.inf)
    masks = {
        "none": (None, None),
        "bool": (allowed, bias),
        "additive": (bias + 0.5, bias + 0.5),
        "lowest": (torch.zeros(2, 1, rows, n).masked_fill(~allowed, torch.finfo(torch.float32).min), bias),
    }
    mask, plain = masks[kind]
    weights = attention_rows(q, k, mask, d**-0.5)
    assert weights.shape == (2, heads, rows, n)
    assert torch.allclose(weights.double(), oracles.attention(q, k, plain, d**-0.5), atol=1e-6)


def test_additive_mask_may_be_a_bias_per_head() -> None:
    q, k = queries(1, 4, 2, 3, 9, 4)
    bias = torch.randn(1, 4, 3, 9)
    assert torch.allclose(attention_rows(q, k, bias, 0.3).double(), oracles.attention(q, k, bias, 0.3), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_rows_are_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in queries(2, 4, 2, 3, 17, 8))
    mask = torch.zeros(2, 1, 3, 17, dtype=dtype)
    mask[..., 11:] = torch.finfo(dtype).min
    weights = attention_rows(q, k, mask, 0.25)
    assert weights.dtype == torch.float32
    expected = oracles.attention(
        q.float(), k.float(), torch.zeros(1, 1, 3, 17).masked_fill(mask[:1] < 0, -torch.inf), 0.25
    )
    assert torch.allclose(weights.double(), expected, atol=1e-6)
    assert (weights[..., 11:] == 0).all()


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k = queries(1, 2, 2, 2, 5, 4)
    mask = torch.tensor([[True] * 5, [False] * 5]).view(1, 1, 2, 5)
    weights = attention_rows(q, k, mask, 1.0)
    assert (weights[:, :, 1] == 0).all()
    assert torch.allclose(weights[:, :, 0].sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("block", [None, 1, 4, 13, 100])
def test_attention_received_in_blocks(block: int | None) -> None:
    q, k = queries(2, 6, 3, 13, 13, 4)
    causal = torch.ones(13, 13, dtype=torch.bool).tril()[None, None]
    padded = (torch.arange(13) < 9).view(1, 1, 1, 13)
    for mask in (None, causal, padded):
        bias = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        received = attention_received(q, k, mask, 0.5, block=block)
        assert received.shape == (2, 13)
        assert torch.allclose(received.double(), oracles.attention(q, k, bias, 0.5).mean(dim=(1, 2)), atol=1e-6)
        assert torch.allclose(received.sum(1), torch.ones(2))


def test_attention_received_keeps_no_square() -> None:
    q, k = queries(1, 2, 2, 300, 300, 4)
    with Watch() as watch:
        attention_received(q, k, None, 0.5, block=16)
    assert watch.largest <= 2 * 16 * 300


def test_head_counts_must_match() -> None:
    q, k = queries(1, 6, 4, 1, 5, 4)
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key heads"):
        attention_rows(q, k, None, 1.0)


def _fails_later(x: Tensor) -> None:
    with deferring():
        check_finite([x])
        raise IndexError("something went wrong later")


def test_a_deferred_check_explains_what_it_led_to() -> None:
    with pytest.raises(ValueError, match="NaN or Inf") as caught:
        _fails_later(torch.tensor([1.0, torch.nan]))
    assert isinstance(caught.value.__context__, IndexError)
    with pytest.raises(IndexError):
        _fails_later(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_check_makes_nothing_as_large_as_what_it_reads(dtype: torch.dtype) -> None:
    """It takes one number from either end, which neither adds up to Inf nor loses a NaN among the others."""
    x = torch.full((33, 5), torch.finfo(dtype).max, dtype=dtype)
    tensors = [x, -x, x[:0], torch.ones(7, requires_grad=True)]
    with Watch() as watch, deferring() as checks:
        check_finite(tensors)
    assert watch.largest == 6
    assert checks[0].holds
    for at in range(x.numel()):
        for bad in (torch.nan, torch.inf, -torch.inf):
            with deferring() as checks:
                check_finite([x[:1], x.flatten().index_fill(0, torch.tensor(at), bad).view_as(x).mT])
            assert not checks[0].holds
    with deferring() as checks:
        check_finite([x[:0]])
    assert not checks


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["clustered", "equal", "axes"])
def test_picks_guessed_in_blocks_are_those_of_the_loop(
    kind: str, objective: str, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more rows tie than are looked at, and where all rows are picked."""
    n = 300
    made = {"clustered": clustered(n, 24), "equal": torch.ones(n, 4), "axes": torch.eye(6).repeat(50, 1)[: n - 3]}
    x = made[kind]
    weights = [torch.linspace(0.5, 1, len(x))] if weighed and objective == "maxmin" else None
    monkeypatch.setattr(reference, "MOST", 32)
    for k in (1, 40, len(x)):
        for first in (None, [7]):
            given = {"objective": objective, "first": first, "weights": weights}
            expected = farthest_point([x], [k], memory="fast", **given)[0]
            assert torch.equal(farthest_point([x], [k], memory="low", **given)[0], expected)


def test_blocks_with_negative_weights() -> None:
    x, weights = clustered(300, 24), -torch.linspace(0.5, 1, 300)
    for w in (weights, weights.abs().index_fill(0, torch.arange(9), -1.0)):
        fast, low = (farthest_point([x], [30], weights=[w], memory=memory)[0] for memory in MEMORY)
        assert torch.equal(fast, low)


class Products(TorchDispatchMode):
    """Counts the multiplications of `mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "mm":
            self.count += args[0].numel() * args[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_cliff_and_no_matrix_in_a_long_clip(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row above the largest matrix there is neither a matrix nor much more work than it took."""
    n, d = 1500, 128
    monkeypatch.setattr(reference, "MATRIX_ROWS", n)
    monkeypatch.setattr(reference, "GRAM_BYTES", 4 * n * n)
    first = None if objective == "maxmin" else [0]
    seen = []
    for size in (n, n + 1):
        with Products() as products, Watch() as watch:
            farthest_point([clustered(size, d)], [n // 9], objective=objective, first=first)
        seen.append((products.count, watch.largest))
    (matrix, _), (blocks, largest) = seen
    assert matrix > n * n * d / 2 > 0
    assert blocks < 1.5 * matrix
    assert largest <= 4 * reference.MOST * n
    with Products() as products:
        reference.first_in_blocks(reference.unit_rows(clustered(n, d))[0])
    assert products.count < n * n * d / 2, "each pair is compared once at most, and most are not needed"


def test_the_first_few_are_those_of_a_stable_sort() -> None:
    """Equal scores, zeros of either sign and infinities among them."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.tensor([-torch.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 2.5, torch.inf])
    for scores in (kinds[torch.randint(8, (5, 50), generator=g)], torch.randn(3, 50, generator=g), torch.zeros(2, 50)):
        for count in (0, 1, 9, 50):
            assert torch.equal(best_few(scores, count), best_first(scores)[:, :count])
