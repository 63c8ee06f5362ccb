"""Greedy coverage, in torch and in Triton, against sums in float64 that are made again at every step.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from greedy import FORMS, Watch, clustered, form_of, never_waits_and_replays, weights_of
from torch import Tensor

from vtprune import kernels
from vtprune.evals.speed import bench_kernels
from vtprune.kernels import facility_greedy
from vtprune.kernels.facility_greedy import reference
from vtprune.kernels.volume_coverage import reference as volume

MEMORY = ("fast", "low")
Form = tuple[str, torch.device]
KINDS: list[dict[str, Any]] = [
    {},
    {"weights": True, "scale": 2.0},
    {"weights": True, "combine": "add"},
    {"temperature": 0.2, "scale": 0.5, "rows": 3},
    {"temperature": 0.2, "rows": 1, "weights": True, "excluded": True},
]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    """An implementation and a device."""
    return form_of(*request.param)


def rows_of(m: int, n: int, seed: int = 0) -> Tensor:
    """[m, n] with entries below 0 too."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / n


def excluded_of(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.6


def arguments(x: Tensor, kind: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The options of one problem that `kind` asks for, with tensors in the places of its flags."""
    n = len(x)
    made: dict[str, Callable[[], Tensor]] = {
        "weights": lambda: weights_of(n, seed),
        "excluded": lambda: excluded_of(n, seed),
        "rows": lambda: rows_of(kind["rows"], n, seed),
    }
    return {name: made[name]() if name in made else value for name, value in kind.items()}


def expected(x: Tensor | None, k: int, given: dict[str, Any]) -> list[int]:
    m = oracles.facility_matrix(x, given.get("rows"), given.get("temperature"), given.get("scale", 1.0))
    weights, out = given.get("weights"), given.get("excluded")
    sums = x is not None and weights is None and "temperature" not in given
    return oracles.facility(
        m,
        k,
        None if weights is None else weights.tolist(),
        given.get("combine", "multiply"),
        () if out is None else out.nonzero()[:, 0].tolist(),
        3e-7 * given.get("scale", 1.0) if sums else 0.0,
    )


def picks_of(form: Form, features: list[Any], budgets: list[int], **options: Any) -> list[list[int]]:
    """The picks; an option that is a list holds one tensor per problem."""
    backend, device = form

    def there(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    options = {name: [*map(there, x)] if isinstance(x, list) else x for name, x in options.items()}
    with kernels.use(backend), kernels.recording() as ran:
        picks = facility_greedy([*map(there, features)], budgets, **options)
    assert ran == {"facility_greedy": backend}
    assert all(p.dtype == torch.int64 and p.shape == (k,) for p, k in zip(picks, budgets, strict=True))
    return [p.tolist() for p in picks]


def one(given: dict[str, Any]) -> dict[str, Any]:
    return {name: [value] if isinstance(value, Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "plain")
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (2, 7, 2), (33, 5, 12), (63, 70, 9)])
def test_equals_the_oracle(n: int, d: int, k: int, kind: Any, memory: str, dtype: torch.dtype, form: Form) -> None:
    x = clustered(n, d).to(dtype)
    given = arguments(x, kind)
    assert picks_of(form, [x], [k], memory=memory, **one(given)) == [expected(x, k, given)]


def test_a_matrix_alone(form: Form) -> None:
    rows = torch.cat([rows_of(20, 40), -rows_of(3, 40).abs()])
    assert picks_of(form, [None], [12], rows=[rows]) == [expected(None, 12, {"rows": rows})]
    assert picks_of(form, [None], [5], rows=[torch.zeros(2, 5)]) == [list(range(5))]


@pytest.mark.parametrize("memory", MEMORY)
def test_equal_and_zero_columns(memory: str, form: Form) -> None:
    """Every column comes once; of equal ones the first comes first."""
    x = clustered(11, 6).repeat(3, 1)
    x[[4, 20]] = 0
    for options in ({}, {"temperature": 0.2}):
        picks = picks_of(form, [x], [33], memory=memory, **options)[0]
        assert sorted(picks) == list(range(33))
        at = [picks.index(i) for i in range(33)]
        assert all(at[i] < at[i + 11] for i in range(22) if i not in (4, 9, 15, 20))


@pytest.mark.parametrize("memory", MEMORY)
def test_nothing_to_choose_by(memory: str, form: Form) -> None:
    for x in (torch.zeros(9, 4), torch.ones(9, 4)):
        assert picks_of(form, [x], [9], memory=memory) == [list(range(9))]
        assert picks_of(form, [x], [9], memory=memory, temperature=0.1) == [list(range(9))]
    assert sorted(picks_of(form, [clustered(9, 4)], [9], weights=[torch.zeros(9)], memory=memory)[0]) == [*range(9)]


@pytest.mark.parametrize("memory", MEMORY)
def test_excluded_columns_come_last(memory: str, form: Form) -> None:
    x, out = clustered(30, 8), torch.ones(30, dtype=torch.bool)
    everything = picks_of(form, [x], [30], excluded=[out], memory=memory, temperature=0.2)[0]
    assert everything == picks_of(form, [x], [30], memory=memory, temperature=0.2)[0]
    out[[3, 7, 20]] = False
    picks = picks_of(form, [x], [30], excluded=[out], memory=memory)[0]
    assert set(picks[:3]) == {3, 7, 20}
    assert sorted(picks) == list(range(30))
    assert picks[:9] == expected(x, 9, {"excluded": out})


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[4]], ids=["cosines", "softmax"])
def test_ragged_batch_equals_single_problems(kind: dict[str, Any], memory: str, form: Form) -> None:
    """The shortest problem has run out long before the longest is done."""
    sizes, budgets = [33, 5, 45, 33, 1], [5, 2, 7, 3, 1]
    units = [clustered(n, 24, seed) for seed, n in enumerate(sizes)]
    given = [arguments(x, kind, seed) for seed, x in enumerate(units)]
    if "rows" in kind:
        given[1]["rows"] = None
        given[2]["rows"] = rows_of(6, 45)
    together = {
        name: [g[name] for g in given] if name in ("weights", "rows", "excluded") else kind[name] for name in kind
    }
    single = [expected(x, k, g) for x, k, g in zip(units, budgets, given)]
    assert picks_of(form, units, budgets, memory=memory, **together) == single


@pytest.mark.parametrize("memory", MEMORY)
def test_strided_and_scaled_features(memory: str, form: Form) -> None:
    wide = clustered(40, 32)
    for x in (wide[:, ::2], wide.T, wide[::3]):
        plain = picks_of(form, [x.contiguous()], [4], memory=memory)
        assert picks_of(form, [x], [4], memory=memory) == plain
        assert picks_of(form, [x * 1e25], [4], memory=memory) == plain


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("memory", MEMORY)
def test_unwritten_memory_is_never_used(memory: str, form: Form) -> None:
    units, budgets = [clustered(n, 7, n) for n in (1, 37, 50)], [1, 5, 6]
    given = {"rows": [rows_of(2, len(x)) for x in units], "temperature": 0.2}
    single = [expected(x, k, {"rows": r, "temperature": 0.2}) for x, k, r in zip(units, budgets, given["rows"])]
    assert picks_of(form, units, budgets, memory=memory, **given) == single


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_non_finite_input_is_refused_and_harms_no_memory(bad: float, memory: str, form: Form) -> None:
    """The check may be read long after the picks are in use, so these have to be indices that exist."""
    x, fine = clustered(7, 4), clustered(3, 4)
    x[5, 2] = bad
    with kernels.deferring() as checks:
        picks = picks_of(form, [fine, x], [3, 7], memory=memory)
    assert sorted(picks[0]) == [0, 1, 2]
    assert all(0 <= i < 7 for i in picks[1])
    with pytest.raises(ValueError, match=r"feature rows of unit 1 hold 1 NaN or Inf.*5"):
        kernels.DeferredChecks(checks).raise_if_failed()
    for name in ("weights", "rows"):
        tensor = torch.tensor([1.0, bad, 1.0])
        with pytest.raises(ValueError, match=rf"{name} of unit 0 hold 1 NaN or Inf"):
            picks_of(form, [fine], [2], memory=memory, **{name: [tensor if name == "weights" else tensor[None]]})


def test_a_batch_of_small_problems_reads_nothing_back() -> None:
    """The form that runs on every device but the CPU."""
    with Watch() as watch, kernels.deferring() as checks:
        facility_greedy([clustered(50, 8, seed) for seed in range(3)], [40, 30, 20], temperature=0.2)
    assert watch.reads == 0
    assert len(checks) == 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.2, "scale": 0.5, "rows": [rows_of(9, 300)]}])
def test_large_problems_on_the_cpu_take_the_other_form(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = clustered(300, 12), weights_of(300)
    alone, low = (facility_greedy([x], [60], weights=[weights], memory=m, **options)[0] for m in MEMORY)
    monkeypatch.setattr(reference, "TOGETHER", 300)
    with Watch() as watch, kernels.deferring():
        together = facility_greedy([x], [60], weights=[weights], **options)[0]
    assert watch.reads == 0
    assert torch.equal(alone, together)
    assert torch.equal(alone, low)


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_memory_is_bounded(temperature: float | None) -> None:
    n, k = 1200, 20
    largest = {}
    for memory in MEMORY:
        with Watch() as watch:
            facility_greedy([clustered(n, 16)], [k], memory=memory, temperature=temperature)  # type: ignore[arg-type]
        largest[memory] = watch.largest
    assert largest == {"fast": n * n, "low": volume.BLOCK * n}
    made = [
        reference.prepare([torch.ones(n, 1)], None, None, "multiply", None, 1.0, None, "auto")[0].held
        for n in (16384, 16385, 65536)
    ]
    assert made == [16384, 16383, 4096]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.2, "scale": 0.5, "rows": [rows_of(9, 300)]}])
def test_a_part_of_the_rows_is_held(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the memory that there is, the other rows are made when they are needed: the same picks."""
    x, weights = clustered(300, 12), weights_of(300)
    whole = facility_greedy([x], [60], weights=[weights], **options)[0]
    for held in (299, 150, 20):
        monkeypatch.setattr(reference, "HELD_BYTES", 4 * 300 * (held + 9 * bool(options)))
        monkeypatch.setattr(reference, "BLOCK", 16)
        with Watch() as watch:
            assert torch.equal(facility_greedy([x], [60], weights=[weights], **options)[0], whole)
        assert watch.largest == 300 * (held + 9 * bool(options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [0]}, r"budgets\[0\]=0: choose 1..6"),
        ({"budgets": [7]}, r"budgets\[0\]=7: choose 1..6"),
        ({"budgets": []}, "1 features need as many budgets, got 0"),
        ({"features": [torch.zeros(0, 4)]}, r"features\[0\] is empty"),
        ({"features": [None]}, "problem 0 has neither features nor rows"),
        ({"features": [torch.zeros(6)]}, r"features\[0\] is torch.float32 \(6,\): expected a float tensor \[N, D\]"),
        ({"rows": [torch.zeros(2, 5)]}, r"rows\[0\] is \(2, 5\): it needs 6 columns"),
        ({"memory": "none"}, "memory='none': choose 'auto' or 'fast' or 'low'"),
        ({"combine": "max"}, "combine='max': choose 'multiply' or 'add'"),
        ({"temperature": 0.0}, "temperature=0.0: use a finite number > 0"),
        ({"scale": float("nan")}, "scale=nan: use a finite number > 0"),
        ({"weights": []}, "1 features need as many weights, got 0"),
        ({"weights": [torch.ones(5)]}, r"weights\[0\] is torch.float32 \(5,\): expected a float tensor \[6\]"),
        ({"weights": [torch.ones(6, dtype=torch.int64)]}, r"weights\[0\] is torch.int64"),
        ({"excluded": [torch.ones(6)]}, r"excluded\[0\] is torch.float32 \(6,\): expected a bool tensor \[6\]"),
        ({"weights": [torch.tensor([1.0, 1, 1, 1, 1, -2])]}, "weights of unit 0 go down to -2: use numbers >= 0"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"features": [clustered(6, 2)], "budgets": [3], **change}
    with pytest.raises(ValueError, match=message):
        facility_greedy(call.pop("features"), call.pop("budgets"), **call)


def test_the_benchmark_compares_equal_picks() -> None:
    row = bench_kernels.coverage_against_loop(300, 16)
    assert row["same"]
    assert (row["k"], row["rival_picks_timed"]) == (33, 32)
    assert row["speedup"] > 0


def test_empty_batch_and_gradients() -> None:
    assert facility_greedy([], []) == []
    assert not facility_greedy([clustered(20, 8).requires_grad_()], [5])[0].requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("sizes", [[576], [576] * 3, [576, 100, 320]])
def test_no_wait_and_a_graph(sizes: list[int], memory: str) -> None:
    never_waits_and_replays(partial(facility_greedy, memory=memory, temperature=0.2), sizes)
