"""Greedy MAP of a DPP, in torch and in Triton, against linear solves in float64, and on input meant to break it.

On a machine without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import greedy
import pytest
import torch
from greedy import Watch, form_of, never_waits_and_replays
from torch import Tensor

from vtprune import kernels
from vtprune.kernels import dpp_greedy
from vtprune.kernels.dpp_greedy import reference

FORMS = [
    pytest.param(("reference", "cpu", "together"), id="reference"),
    pytest.param(("reference", "cpu", "blocks"), id="blocks"),
    pytest.param(("triton", "cpu", ""), id="triton"),
    pytest.param(("reference", "cuda", ""), id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda", ""), id="triton-cuda", marks=pytest.mark.gpu),
]
Form = tuple[str, torch.device]
clustered = partial(greedy.clustered, spread=0.5)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Form:
    """An implementation and a device; "blocks" foresees with 6 rows at most, so that small problems take many."""
    backend, device, how = request.param
    if how == "blocks":
        monkeypatch.setattr(reference, "TOGETHER", 0)
        monkeypatch.setattr(reference, "FEW", 4)
        monkeypatch.setattr(reference, "MANY", 6)
    return form_of(backend, device)


def oracle(x: Tensor, k: int, r: list[float] | None = None) -> list[int]:
    """https://arxiv.org/abs/1709.05135 by its definition: L_jj - L_jP L_PP^-1 L_Pj of every row at every pick."""
    rows = x.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    weight = torch.ones(len(x)).double() if r is None else torch.tensor(r).double()
    whole = weight[:, None] * (rows @ rows.T) * weight
    picks: list[int] = []
    now: list[int] = []  # picked in this round
    while len(picks) < k:
        left = whole.diagonal().clone()
        if now:
            across = whole[now]
            left -= (across * torch.linalg.solve(across[:, now], across)).sum(0)
        left[left < 1e-5 * whole.diagonal()] = 0
        left[picks] = -1
        if now and left.max() <= 0:
            now = []
            continue
        picks.append(next(j for j, d in enumerate(left.tolist()) if d >= float(left.max()) * (1 - 1e-6)))
        if left.max() > 0:
            now.append(picks[-1])
    return picks


def relevance_of(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)).add(0.01)


def picks_of(form: Form, features: list[Tensor], budgets: list[int], relevance: Any = None) -> list[list[int]]:
    backend, device = form
    given = None if relevance is None else [r.to(device) for r in relevance]
    with kernels.use(backend), kernels.recording() as ran:
        picks = dpp_greedy([x.to(device) for x in features], budgets, relevance=given)
    assert ran == {"dpp_greedy": backend}
    assert all(p.dtype == torch.int64 and p.shape == (k,) for p, k in zip(picks, budgets, strict=True))
    return [p.tolist() for p in picks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (2, 7, 2), (33, 12, 12), (63, 100, 20)])
def test_equals_the_oracle(n: int, d: int, k: int, weighted: bool, dtype: torch.dtype, form: Form) -> None:
    x, r = clustered(n, d).to(dtype), relevance_of(n) if weighted else None
    assert picks_of(form, [x], [k], None if r is None else [r]) == [oracle(x, k, None if r is None else r.tolist())]


@pytest.mark.parametrize("weighted", [False, True])
def test_beyond_the_rank(weighted: bool, form: Form) -> None:
    """5 channels, 40 picks of 41: eight rounds, each of which is diverse in itself; no row comes twice."""
    x, r = clustered(41, 5), relevance_of(41) if weighted else None
    (picks,) = picks_of(form, [x], [40], None if r is None else [r])
    assert len(set(picks)) == 40
    assert picks == oracle(x, 40, None if r is None else r.tolist())
    assert all(torch.linalg.matrix_rank(x[picks[i : i + 5]].double()) == 5 for i in range(0, 40, 5))


def test_repeated_and_zero_rows_and_no_relevance(form: Form) -> None:
    """Copies come in later rounds, the first one first; rows without length or relevance come last, by index."""
    x, r = clustered(11, 20).repeat(3, 1), torch.ones(33)
    x[[4, 20]] = 0
    r[30] = 0
    picks = picks_of(form, [x], [33], [r])[0]
    assert sorted(picks) == list(range(33))
    assert picks[-3:] == [4, 20, 30]
    at = [picks.index(i) for i in range(33)]
    copies = [i for i in range(22) if i not in (4, 8, 9, 15, 19, 20)]
    assert all(at[i] < at[i + 11] for i in copies)
    assert {i % 11 for i in picks[:11]} == set(range(11))
    assert picks == picks_of(form, [x * 3], [33], [r * 7])[0]


def test_nothing_to_choose_by(form: Form) -> None:
    for x in (torch.zeros(9, 4), torch.ones(9, 4)):
        assert picks_of(form, [x], [9]) == [list(range(9))]
    assert picks_of(form, [clustered(9, 4)], [9], [torch.zeros(9)]) == [list(range(9))]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_only_ratios_of_lengths_and_relevances_matter(scale: float, form: Form) -> None:
    x, r = clustered(30, 12), relevance_of(30)
    assert picks_of(form, [x * scale], [8], [r * scale]) == picks_of(form, [x], [8], [r])


def test_ragged_batch_equals_single_problems(form: Form) -> None:
    """The shortest problem has run out long before the longest is done, and one has rows of another width."""
    sizes, budgets = [33, 5, 45, 33, 1, 20], [15, 2, 17, 3, 1, 20]
    units = [clustered(n, 24 - 10 * (n == 20), seed) for seed, n in enumerate(sizes)]
    relevance = [relevance_of(n, seed) for seed, n in enumerate(sizes)]
    single = [picks_of(form, [x], [k], [r])[0] for x, k, r in zip(units, budgets, relevance)]
    assert picks_of(form, units, budgets, relevance) == single
    assert single == [oracle(x, k, r.tolist()) for x, k, r in zip(units, budgets, relevance)]


def test_strided_rows(form: Form) -> None:
    wide = clustered(40, 32)
    for x in (wide[:, ::2], wide.T, wide[::3]):
        assert picks_of(form, [x], [4]) == picks_of(form, [x.contiguous()], [4])


@pytest.mark.usefixtures("poisoned")
def test_unwritten_memory_is_never_used(form: Form) -> None:
    units, budgets = [clustered(n, 7, n) for n in (1, 37, 50)], [1, 5, 16]
    assert picks_of(form, units, budgets) == [oracle(x, k) for x, k in zip(units, budgets)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_non_finite_rows_are_refused_and_harm_no_memory(bad: float, form: Form) -> None:
    """The check may be read long after the picks are in use, so these have to be indices that exist."""
    x, fine = clustered(7, 4), clustered(3, 4)
    x[5, 2] = bad
    with kernels.deferring() as checks:
        picks = picks_of(form, [fine, x], [3, 7])
    assert sorted(picks[0]) == [0, 1, 2]
    assert all(0 <= i < 7 for i in picks[1])
    with pytest.raises(ValueError, match=r"feature rows of unit 1 hold 1 NaN or Inf.*5"):
        kernels.DeferredChecks(checks).raise_if_failed()
    with pytest.raises(ValueError, match=r"relevances of unit 0 hold 1 NaN or Inf"):
        picks_of(form, [fine], [2], [torch.tensor([1.0, bad, 1.0])])


def test_a_batch_of_small_problems_reads_nothing_back() -> None:
    """The form that runs on every device but the CPU."""
    with Watch() as watch, kernels.deferring() as checks:
        dpp_greedy([clustered(50, 8, seed) for seed in range(3)], [40, 30, 20])
    assert watch.reads == 0
    assert len(checks) == 1


def test_large_problems_on_the_cpu_take_the_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x, r = clustered(600, 40), relevance_of(600)
    with Watch() as watch:
        alone = dpp_greedy([x], [90], relevance=[r])[0]
    assert watch.largest == 600 * 40  # no N x N matrix, and of 90 picks no more than a round takes
    monkeypatch.setattr(reference, "TOGETHER", 600)
    with Watch() as watch, kernels.deferring():
        together = dpp_greedy([x], [90], relevance=[r])[0]
    assert watch.reads == 0
    assert torch.equal(alone, together)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [0]}, r"budgets\[0\]=0: choose 1..6"),
        ({"budgets": [7]}, r"budgets\[0\]=7: choose 1..6"),
        ({"features": [torch.zeros(0, 4)]}, r"features\[0\] is empty"),
        ({"relevance": []}, "1 feature tensors need as many relevances, got 0"),
        ({"relevance": [torch.ones(5)]}, r"relevance\[0\] is torch.float32 \(5,\): expected a float tensor \[6\]"),
        ({"relevance": [torch.ones(6, dtype=torch.int64)]}, r"relevance\[0\] is torch.int64"),
        ({"relevance": [torch.tensor([1.0, 1, 1, 1, 1, -2])]}, "relevances of unit 0 go down to -2: use numbers >= 0"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"features": [clustered(6, 2)], "budgets": [3], **change}
    with pytest.raises(ValueError, match=message):
        dpp_greedy(call.pop("features"), call.pop("budgets"), **call)


def test_empty_batch_and_gradients() -> None:
    assert dpp_greedy([], []) == []
    assert not dpp_greedy([clustered(20, 8).requires_grad_()], [5])[0].requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [[576], [576] * 3, [576, 100, 320]])
def test_no_wait_and_a_graph(sizes: list[int]) -> None:
    never_waits_and_replays(dpp_greedy, sizes)
