"""Farthest point selection in Triton against the reference and the float64 oracle, and on input meant to break it.

On a machine without a GPU the kernels run in Triton's interpreter, on the same code paths but for cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import oracles
import pytest
import torch
from greedy import clustered, never_waits_and_replays
from torch import Tensor

from vtprune import kernels
from vtprune.kernels import dispatch, farthest_point
from vtprune.kernels.farthest_point import reference

triton_form = pytest.importorskip("vtprune.kernels.farthest_point.triton", exc_type=ImportError)
OBJECTIVES = ("maxmin", "maxsum")
MEMORY = ("fast", "low")
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu":
        if not dispatch.interpreted():
            pytest.skip("Triton's interpreter is off: it runs where there is no GPU")
        # The interpreter pays per program, not per row.
        monkeypatch.setattr(triton_form, "TILE_ROWS", 64)
    return torch.device(request.param)


def by_triton(features: list[Tensor], budgets: list[int], **options: object) -> list[list[int]]:
    with kernels.use("triton"), kernels.recording() as ran:
        picks = farthest_point(features, budgets, **options)
    assert ran == {"farthest_point": "triton"}
    assert all(p.dtype == torch.int64 and p.shape == (k,) for p, k in zip(picks, budgets, strict=True))
    return [p.tolist() for p in picks]


def by_reference(features: list[Tensor], budgets: list[int], **options: object) -> list[list[int]]:
    with kernels.use("reference"):
        return [p.tolist() for p in farthest_point(features, budgets, **options)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (2, 7, 2), (63, 7, 63), (63, 100, 9)])
def test_equals_reference_and_oracle(
    n: int, d: int, k: int, objective: str, memory: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = clustered(n, d).to(device, dtype)
    k = min(k, 9) if memory == "low" else k  # a launch per pick, each some 10 ms in the interpreter
    picks = by_triton([x], [k], objective=objective, memory=memory)
    assert picks == by_reference([x], [k], objective=objective, memory=memory)
    assert picks == [oracles.diverse(x.cpu(), k, objective)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "k", "objective", "memory"), [
    (576, 64, 12, "maxmin", "fast"),
    (576, 48, 3, "maxsum", "low"),
    (1000, 33, 6, "maxsum", "fast"),
    (1000, 20, 3, "maxmin", "low"),
])  # fmt: skip
def test_sizes_of_real_images(
    n: int, d: int, k: int, objective: str, memory: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = clustered(n, d).to(device, dtype)
    expected = by_reference([x], [k], objective=objective, memory=memory)
    assert by_triton([x], [k], objective=objective, memory=memory) == expected
    c = torch.nn.functional.normalize(x.cpu().double(), dim=1)
    c = c @ c.T
    nearest = c.clone().fill_diagonal_(-torch.inf).amax(1)
    oracle = [int(nearest.argmin())]
    while len(oracle) < k:
        seen = c[oracle].amax(0) if objective == "maxmin" else c[oracle].sum(0)
        seen[oracle] = torch.inf
        oracle.append(int(seen.argmin()))
    assert expected == [oracle]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ragged_batch_equals_single_problems(
    objective: str, memory: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Sizes that repeat share a product; the shortest problem has run out long before the longest is done."""
    sizes, budgets = [33, 5, 70, 33, 1], [5, 2, 7, 3, 1]
    units = [clustered(n, 24, seed).to(device, dtype) for seed, n in enumerate(sizes)]
    first = [n // 2 for n in sizes]
    single = [by_triton([x], [k], objective=objective, memory=memory)[0] for x, k in zip(units, budgets)]
    assert by_triton(units, budgets, objective=objective, memory=memory) == single
    assert single == by_reference(units, budgets, objective=objective, memory=memory)
    assert by_triton(units, budgets, objective=objective, memory=memory, first=first) == by_reference(
        units, budgets, objective=objective, memory=memory, first=first
    )


def test_widths_and_dtypes_may_differ_within_a_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [(20, 7, torch.float32), (20, 100, torch.float16), (20, 7, torch.bfloat16), (9, 1, torch.float64)]
    units = [clustered(n, d, seed).to(device, dtype) for seed, (n, d, dtype) in enumerate(kinds)]
    expected = by_reference(units, [5, 20, 1, 1])
    assert by_triton(units, [5, 20, 1, 1]) == expected
    monkeypatch.setattr(reference, "GRAM_BYTES", 4 * 9**2)  # memory="auto": a matrix for the last one only
    assert by_triton(units, [5, 20, 1, 1]) == expected


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", ["int", "tensor", "host tensor"])
def test_given_first_picks(kind: str, memory: str, device: torch.device) -> None:
    units = [clustered(40, 8, seed).to(device) for seed in range(2)]
    make: dict[str, Callable[[int], int | Tensor]] = {
        "int": int,
        "tensor": lambda i: torch.tensor(i, device=device),
        "host tensor": lambda i: torch.tensor(i, dtype=torch.int32),
    }
    given = [make[kind](i) for i in (39, 0)]
    picks = by_triton(units, [5, 9], first=given, memory=memory)
    assert picks == [oracles.diverse(x.cpu(), k, "maxmin", i) for x, k, i in zip(units, (5, 9), (39, 0))]


def weighed_by_hand(x: Tensor, weight: Tensor, k: int, first: int | None = None) -> list[int]:
    """Each pick has the largest weighed distance to the nearest pick, the first to its nearest neighbour; float64."""
    n, unit, w = len(x), torch.nn.functional.normalize(x.double(), dim=1).tolist(), weight.double().tolist()
    far = [[(1 - sum(a * b for a, b in zip(unit[i], unit[j]))) * w[j] for j in range(n)] for i in range(n)]
    alone = [min((far[i][j] for i in range(n) if i != j), default=2 * w[j]) for j in range(n)]
    picks = [max(range(n), key=lambda j: (alone[j], -j)) if first is None else first]
    while len(picks) < k:
        picks.append(max(set(range(n)) - set(picks), key=lambda j: (min(far[i][j] for i in picks), -j)))
    return picks


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 7, 2), (31, 9, 31), (63, 20, 9)])
def test_weighed_distances(n: int, d: int, k: int, memory: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = clustered(n, d).to(device, dtype), torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.1
    k = min(k, 9) if memory == "low" else k
    given = {"weights": [weight.to(device)], "memory": memory}
    picks = by_triton([x], [k], **given)
    assert picks == by_reference([x], [k], **given)
    assert picks == [weighed_by_hand(x.cpu(), weight, k)]
    assert by_triton([x], [k], first=[n - 1], **given) == [weighed_by_hand(x.cpu(), weight, k, n - 1)]


@pytest.mark.parametrize("memory", MEMORY)
def test_weights_of_a_ragged_batch(memory: str, device: torch.device) -> None:
    """Zero weights are all equally near, negative ones are picked last, and nothing is picked twice."""
    sizes, budgets = [33, 5, 33, 1], [6, 5, 3, 1]
    units = [clustered(n, 24, seed).to(device) for seed, n in enumerate(sizes)]
    weights = [torch.rand(n, device=device) + 0.1 for n in sizes]
    weights[1][:2] = torch.tensor([-1.0, 0.0])
    picks = by_triton(units, budgets, weights=weights, memory=memory)
    assert picks == by_reference(units, budgets, weights=weights, memory=memory)
    assert picks == [weighed_by_hand(x.cpu(), w.cpu(), k) for x, w, k in zip(units, weights, budgets)]
    assert picks[1][-2:] == [1, 0]
    nothing = [torch.zeros_like(w) for w in weights]
    expected = [list(range(k)) for k in budgets]
    assert by_triton(units, budgets, weights=nothing, memory=memory) == expected
    assert by_reference(units, budgets, weights=nothing, memory=memory) == expected


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_weights_that_fit_nothing(backend: str, device: torch.device) -> None:
    x = clustered(5, 4).to(device)
    with kernels.use(backend):
        with pytest.raises(ValueError, match=r"weights of shapes \[\(4,\)\]"):
            farthest_point([x], [2], weights=[torch.ones(4, device=device)])
        with pytest.raises(ValueError, match="objective='maxsum' sums similarities"):
            farthest_point([x], [2], weights=[torch.ones(5, device=device)], objective="maxsum")
        with pytest.raises(ValueError, match="weights of unit 0 hold 1 NaN or Inf"):
            farthest_point([x], [2], weights=[torch.tensor([1.0, torch.nan, 1, 1, 1], device=device)])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ties_go_to_the_lower_index(objective: str, memory: str, dtype: torch.dtype, device: torch.device) -> None:
    """Axis vectors have cosines of exactly 0, 1 and -1, zero rows 0: every step has several equally good tokens."""
    axes = torch.eye(4)
    x = torch.cat([axes, -axes, 3 * axes, torch.zeros(2, 4), axes])[torch.randperm(18)].to(device, dtype)
    picks = by_triton([x], [18], objective=objective, memory=memory)
    assert picks == [oracles.diverse(x.cpu(), 18, objective)]
    assert sorted(picks[0]) == list(range(18))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [0.0, 1e-7])
def test_equal_rows_are_never_picked_twice(
    value: float, objective: str, memory: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.full((6, 4), value, device=device, dtype=dtype)
    assert by_triton([x], [6], objective=objective, memory=memory) == [list(range(6))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
def test_row_norms_do_not_matter(memory: str, dtype: torch.dtype, device: torch.device) -> None:
    """Scaling rows by powers of two is exact, up to the ends of the range: squares of 1e30 do not fit float32."""
    x = clustered(50, 12).to(device, dtype)
    scale = 2.0 ** torch.randint(-100, 100, (50, 1), device=device).float()
    scaled = x * scale.to(dtype)
    assert by_triton([scaled], [8], memory=memory) == by_triton([x], [8], memory=memory)
    extreme = x * (1e30 if dtype == torch.float32 else 2.0**120)
    assert extreme.isfinite().all()
    assert by_triton([extreme], [8], memory=memory) == by_reference([extreme], [8], memory=memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory", MEMORY)
def test_strided_rows(memory: str, dtype: torch.dtype, device: torch.device) -> None:
    wide = clustered(40, 32).to(device, dtype)
    for x in (wide[:, ::2], wide.T, wide[::3], wide[:, :1].expand(40, 5)):
        assert by_triton([x], [4], memory=memory) == by_triton([x.contiguous()], [4], memory=memory)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
def test_unwritten_memory_is_never_used(memory: str, dtype: torch.dtype, device: torch.device) -> None:
    units = [clustered(n, 7, n).to(device, dtype) for n in (1, 37, 70)]
    budgets = [1, 37 if memory == "fast" else 4, 6]
    picks = by_triton(units, budgets, objective="maxsum", memory=memory)
    assert picks == [oracles.diverse(x.cpu(), k, "maxsum") for x, k in zip(units, budgets)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_non_finite_rows_are_refused_and_harm_no_memory(
    bad: float, memory: str, dtype: torch.dtype, device: torch.device
) -> None:
    """The check may be read long after the picks are in use, so these have to be indices that exist."""
    x, fine = clustered(7, 4).to(device, dtype), clustered(3, 4).to(device, dtype)
    x[5, 2] = bad
    with kernels.deferring() as checks:
        picks = by_triton([fine, x, x * bad], [3, 7, 7], objective="maxsum", memory=memory)
    assert [sorted(p) for p in picks] == [list(range(n)) for n in (3, 7, 7)]
    with pytest.raises(ValueError, match=r"feature rows of unit 1 hold 1 NaN or Inf.*5"):
        kernels.DeferredChecks(checks).raise_if_failed()
    with pytest.raises(ValueError, match=r"unit 0 hold 1 NaN or Inf"):
        by_triton([x], [1], memory=memory)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_half_precision_that_overflowed_says_so(device: torch.device) -> None:
    x = (clustered(6, 4) * 1e6).to(device, torch.float16)
    with pytest.raises(ValueError, match=r"NaN or Inf.*bfloat16"):
        by_triton([x], [2])


@pytest.mark.parametrize("memory", MEMORY)
def test_a_first_pick_out_of_range_reads_no_foreign_memory(memory: str, device: torch.device) -> None:
    units = [clustered(n, 4, n).to(device) for n in (6, 20)]
    far = [torch.tensor(2**40, device=device), torch.tensor(-3, device=device)]
    assert by_triton(units, [6, 1], first=far, memory=memory)[0][0] == 5


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """Five rows, 2^30 elements apart: only the pages that are touched exist."""
    stride = 2**30
    try:
        apart = torch.empty(4 * stride + 64, dtype=torch.bfloat16, device=device).as_strided((5, 7), (stride, 1))
        table = torch.empty(4 * stride + 64, device=device).as_strided((1, 5, 5), (0, stride, 1))
    except RuntimeError:
        pytest.skip("the machine does not hand out 24 GiB of address space")
    x = clustered(5, 7).to(device, torch.bfloat16)
    apart.copy_(x)  # an offset that wraps around would read or write elsewhere
    assert by_triton([apart], [5]) == by_triton([x], [5])
    gram = torch.nn.functional.normalize(x.float(), dim=1)
    gram = (gram @ gram.T).fill_diagonal_(torch.inf)
    table.copy_(gram)
    picks = torch.empty(1, 5, dtype=torch.int64, device=device)
    first = torch.tensor([4], device=device)
    sizes = 5, 5, *table.stride()[:2]
    triton_form._greedy[(1,)](
        table, table, first, table, picks, *sizes, GIVEN=True, WEIGHED=False, MAXMIN=True, BLOCK=16
    )
    assert picks.tolist() == [oracles.diverse(x.cpu(), 5, "maxmin", 4)]


def test_more_rows_than_a_program_holds(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("vtprune.kernels.farthest_point"), "TRITON_ROWS", 30)
    x = clustered(31, 4).to(device)
    with pytest.raises(RuntimeError, match="31 rows with memory='fast', and one program holds 30: choose memory='low'"):
        by_triton([x], [3], memory="fast")
    assert by_triton([x], [3], memory="low") == by_reference([x], [3])
    with kernels.recording() as ran:
        farthest_point([x], [3], memory="fast")
    assert ran == {"farthest_point": "reference"}


@pytest.mark.parametrize(
    ("features", "budgets", "message"),
    [
        ([torch.zeros(0, 4)], [1], r"features\[0\] is empty, \(0, 4\)"),
        ([torch.zeros(4, 0)], [1], r"features\[0\] is empty, \(4, 0\)"),
        ([torch.zeros(4, 2)], [5], r"budgets\[0\]=5: choose 1..4"),
        ([torch.zeros(4, 2)], [0], r"budgets\[0\]=0: choose 1..4"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_impossible_problems(features: list[Tensor], budgets: list[int], message: str, backend: str) -> None:
    with kernels.use(backend), pytest.raises(ValueError, match=message):
        farthest_point(features, budgets)


def test_tensors_on_several_devices() -> None:
    with pytest.raises(ValueError, match=r"several devices \(cpu, meta\): move them to one"):
        farthest_point([torch.ones(3, 2), torch.ones(3, 2, device="meta")], [1, 1])


def test_features_that_record_gradients(device: torch.device) -> None:
    x = clustered(20, 8).to(device).requires_grad_()
    assert by_triton([x], [5]) == by_reference([x.detach()], [5])


@pytest.mark.parametrize("setting", ["medium", "high", "highest"])
@pytest.mark.parametrize("memory", MEMORY)
def test_lower_matmul_precision_is_not_for_decisions(setting: str, memory: str, device: torch.device) -> None:
    """TF32 on a GPU, bfloat16 on some CPUs: neither decides, and the setting is as it was afterwards."""
    x = clustered(300, 256).to(device)
    expected = by_reference([x], [40], memory=memory)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert by_reference([x], [40], memory=memory) == expected
        if device.type == "cuda":
            assert by_triton([x], [40], memory=memory) == expected
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[576], [576] * 3, [576, 100, 320]])
def test_no_wait_and_a_graph(sizes: list[int], dtype: torch.dtype, memory: str) -> None:
    never_waits_and_replays(partial(farthest_point, memory=memory), sizes, dtype)
