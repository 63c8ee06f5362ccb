"""Volume and coverage, in torch and in Triton, against determinants in float64, and on input meant to break them.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import oracles
import pytest
import torch
from greedy import FORMS, Watch, clustered, form_of, never_waits_and_replays, weights_of
from torch import Tensor

from vtprune import kernels
from vtprune.kernels import volume_coverage
from vtprune.kernels.volume_coverage import reference

MEMORY = ("fast", "low")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, torch.device]:
    """An implementation and a device; memory="low" covers 7 rows here."""
    monkeypatch.setattr(reference, "FEW", 7)
    return form_of(*request.param)


def picks_of(
    form: tuple[str, torch.device], features: list[Tensor], budgets: list[int], **options: Any
) -> list[list[int]]:
    backend, device = form
    if options.get("weights") is not None:
        options["weights"] = [w.to(device) for w in options["weights"]]
    with kernels.use(backend), kernels.recording() as ran:
        picks = volume_coverage([x.to(device) for x in features], budgets, **options)
    assert ran == {"volume_coverage": backend}
    assert all(p.dtype == torch.int64 and p.shape == (k,) for p, k in zip(picks, budgets, strict=True))
    return [p.tolist() for p in picks]


def seven_of(n: int) -> list[int] | None:
    return None if n <= 7 else [i * n // 7 for i in range(7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (2, 7, 2), (33, 5, 12), (63, 100, 9)])
def test_equals_the_oracle(
    n: int, d: int, k: int, weighted: bool, memory: str, dtype: torch.dtype, form: tuple[str, torch.device]
) -> None:
    x, weights = clustered(n, d).to(dtype), weights_of(n) if weighted else None
    covered = seven_of(n) if memory == "low" else None
    expected = oracles.volume_coverage(x, k, None if weights is None else weights.tolist(), covered=covered)
    given = None if weights is None else [weights]
    assert picks_of(form, [x], [k], weights=given, memory=memory) == [expected]


@pytest.mark.parametrize("ridge", [1e-4, 0.3, 100.0])
def test_the_ridge(ridge: float, form: tuple[str, torch.device]) -> None:
    x = clustered(40, 24)
    assert picks_of(form, [x], [10], ridge=ridge) == [oracles.volume_coverage(x, 10, ridge=ridge)]


@pytest.mark.parametrize("memory", MEMORY)
def test_above_the_rank_with_repeated_and_zero_rows(memory: str, form: tuple[str, torch.device]) -> None:
    """Every row comes once; of equal rows the first comes first, and rows of zeros come last."""
    x = clustered(11, 4).repeat(3, 1)
    x[[4, 20]] = 0
    picks = picks_of(form, [x], [33], memory=memory)[0]
    assert sorted(picks) == list(range(33))
    assert picks[-2:] == [4, 20]
    at = [picks.index(i) for i in range(33)]
    copies = [i for i in range(22) if i not in (4, 9, 15, 20)]
    assert all(at[i] < at[i + 11] for i in copies)
    assert picks == picks_of(form, [x * 3], [33], memory=memory)[0]


def test_nothing_to_choose_by(form: tuple[str, torch.device]) -> None:
    for x in (torch.zeros(9, 4), torch.ones(9, 4)):
        assert picks_of(form, [x], [9]) == [list(range(9))]
    assert sorted(picks_of(form, [clustered(9, 4)], [9], weights=[torch.zeros(9)])[0]) == list(range(9))


def test_a_weight_decides(form: tuple[str, torch.device]) -> None:
    x, weights = clustered(40, 8), torch.full((40,), 1e-3)
    weights[[7, 30]] = 1e6
    assert set(picks_of(form, [x], [2], weights=[weights])[0]) == {7, 30}
    assert picks_of(form, [x], [9], weights=[weights]) == picks_of(form, [x], [9], weights=[weights * 1e-5])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_lengths_do_not_matter(scale: float, form: tuple[str, torch.device]) -> None:
    x = clustered(30, 6)
    assert picks_of(form, [x * scale], [8]) == picks_of(form, [x], [8])


@pytest.mark.parametrize("memory", MEMORY)
def test_ragged_batch_equals_single_problems(memory: str, form: tuple[str, torch.device]) -> None:
    """The shortest problem has run out long before the longest is done."""
    sizes, budgets = [33, 5, 45, 33, 1], [5, 2, 7, 3, 1]
    units = [clustered(n, 24, seed) for seed, n in enumerate(sizes)]
    weights = [weights_of(n, seed) for seed, n in enumerate(sizes)]
    single = [picks_of(form, [x], [k], weights=[w], memory=memory)[0] for x, k, w in zip(units, budgets, weights)]
    assert picks_of(form, units, budgets, weights=weights, memory=memory) == single
    covered = [seven_of(n) if memory == "low" else None for n in sizes]
    assert single == [
        oracles.volume_coverage(x, k, w.tolist(), covered=at) for x, k, w, at in zip(units, budgets, weights, covered)
    ]


@pytest.mark.parametrize("memory", MEMORY)
def test_strided_rows(memory: str, form: tuple[str, torch.device]) -> None:
    wide = clustered(40, 32)
    for x in (wide[:, ::2], wide.T, wide[::3]):
        assert picks_of(form, [x], [4], memory=memory) == picks_of(form, [x.contiguous()], [4], memory=memory)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("memory", MEMORY)
def test_unwritten_memory_is_never_used(memory: str, form: tuple[str, torch.device]) -> None:
    units, budgets = [clustered(n, 7, n) for n in (1, 37, 50)], [1, 5, 6]
    covered = [seven_of(len(x)) if memory == "low" else None for x in units]
    expected = [oracles.volume_coverage(x, k, covered=at) for x, k, at in zip(units, budgets, covered)]
    assert picks_of(form, units, budgets, memory=memory) == expected


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_non_finite_rows_are_refused_and_harm_no_memory(bad: float, form: tuple[str, torch.device]) -> None:
    """The check may be read long after the picks are in use, so these have to be indices that exist."""
    x, fine = clustered(7, 4), clustered(3, 4)
    x[5, 2] = bad
    with kernels.deferring() as checks:
        picks = picks_of(form, [fine, x], [3, 7])
    assert sorted(picks[0]) == [0, 1, 2]
    assert all(0 <= i < 7 for i in picks[1])
    with pytest.raises(ValueError, match=r"feature rows of unit 1 hold 1 NaN or Inf.*5"):
        kernels.DeferredChecks(checks).raise_if_failed()
    with pytest.raises(ValueError, match=r"weights of unit 0 hold 1 NaN or Inf"):
        picks_of(form, [fine], [2], weights=[torch.tensor([1.0, bad, 1.0])])


def test_a_batch_of_small_problems_reads_nothing_back() -> None:
    """The form that runs on every device but the CPU."""
    with Watch() as watch, kernels.deferring() as checks:
        volume_coverage([clustered(50, 8, seed) for seed in range(3)], [40, 30, 20])
    assert watch.reads == 0
    assert len(checks) == 1


def test_large_problems_on_the_cpu_take_the_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = clustered(300, 12), weights_of(300)
    alone = volume_coverage([x], [60], weights=[weights])[0]
    monkeypatch.setattr(reference, "TOGETHER", 300)
    with Watch() as watch, kernels.deferring():
        together = volume_coverage([x], [60], weights=[weights])[0]
    assert watch.reads == 0
    assert torch.equal(alone, together)


@pytest.mark.parametrize("ridge", [0.01, 0.3])
@pytest.mark.parametrize("memory", MEMORY)
def test_more_picks_than_channels(memory: str, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a problem alone then holds an inverse of channels x channels, and no matrix of picks x rows."""
    monkeypatch.setattr(reference, "FEW", 7)
    monkeypatch.setattr(reference, "TOGETHER", 0)
    covered = seven_of(60) if memory == "low" else None
    for d, k in ((5, 12), (4, 60), (12, 40)):
        x, weights = clustered(60, d), weights_of(60)
        with Watch() as watch:
            picks = volume_coverage([x], [k], weights=[weights], ridge=ridge, memory=memory)[0].tolist()
        assert watch.largest == 60 * (60 if covered is None else max(7, d))
        assert picks == oracles.volume_coverage(x, k, weights.tolist(), ridge=ridge, covered=covered)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 1200, 40
    with Watch() as low:
        volume_coverage([clustered(n, 16)], [k], memory="low")
    with Watch() as fast:
        volume_coverage([clustered(n, 16)], [k], memory="fast")
    assert low.largest == reference.FEW * n < n * n == fast.largest
    monkeypatch.setattr(reference, "COVERED_BYTES", 4 * n * 700)
    with Watch() as auto:
        volume_coverage([clustered(n, 16)], [k])
    assert auto.largest == 700 * n
    monkeypatch.undo()
    assert [reference.covered_rows(n, "auto") for n in (2880, 8192, 16384, 200_000)] == [2880, 8192, 4096, 512]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [0]}, r"budgets\[0\]=0: choose 1..6"),
        ({"budgets": [7]}, r"budgets\[0\]=7: choose 1..6"),
        ({"features": [torch.zeros(0, 4)]}, r"features\[0\] is empty"),
        ({"memory": "none"}, "memory='none': choose 'auto', 'fast' or 'low'"),
        ({"ridge": 0.0}, "ridge=0.0: use a finite number > 0"),
        ({"ridge": float("nan")}, "ridge=nan"),
        ({"weights": []}, "1 feature tensors need as many weights, got 0"),
        ({"weights": [torch.ones(5)]}, r"weights\[0\] is torch.float32 \(5,\): expected a float tensor \[6\]"),
        ({"weights": [torch.ones(6, dtype=torch.int64)]}, r"weights\[0\] is torch.int64"),
        ({"weights": [torch.tensor([1.0, 1, 1, 1, 1, -2])]}, "weights of unit 0 go down to -2: use numbers >= 0"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"features": [clustered(6, 2)], "budgets": [3], **change}
    with pytest.raises(ValueError, match=message):
        volume_coverage(call.pop("features"), call.pop("budgets"), **call)


def test_empty_batch_and_gradients() -> None:
    assert volume_coverage([], []) == []
    assert not volume_coverage([clustered(20, 8).requires_grad_()], [5])[0].requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("sizes", [[576], [576] * 3, [576, 100, 320]])
def test_no_wait_and_a_graph(sizes: list[int], memory: str) -> None:
    never_waits_and_replays(partial(volume_coverage, memory=memory), sizes)
