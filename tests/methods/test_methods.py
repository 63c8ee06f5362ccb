"""Every method against its oracle, and what all of them promise: budget, order, dtype, batch, bad input."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import families
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtprune
from vtprune import Assignment, Method, Signal, Span, Visual
from vtprune.methods.raster import blocks
from vtprune.signals import kind_of

ALL = [cls.name for cls in vtprune.methods()]
PRE_LLM = [cls.name for cls in vtprune.methods() if cls.seam == "pre_llm"]
CLS, LAST_ROW = Signal("cls", -1), Signal("last_row", -1)
# A base view, a separator, and a mosaic of 4 rows of 5 with newlines.
MOSAIC = (Span(0, (1, 3, 3)), Span(10, (1, 4, 5), newline=True))
MOSAIC_SIZE = 9 + 1 + 24


def visual(n: int, budget: int | None, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Visual:
    """A unit with random features and every signal a method may ask for."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=g).to(dtype)
    row = torch.rand(n, generator=g)
    asked = {need for method in vtprune.methods() for need in method().needs}
    sizes = {"N": n, "C": 8, "d": 8, "G": 2, "T": 8, "H": 2}
    signals = {}
    for need in asked | {CLS, LAST_ROW}:
        shape = kind_of(need).shape
        dims = [sizes[dim] for dim in shape.strip("[]").split(", ")]
        signals[need] = row if shape == "[N]" else torch.rand(dims, generator=g)
    return Visual(x, budget, **{"signals": signals, **fields})


def check(answer: Assignment, n: int, budget: int) -> None:
    """Exactly `budget` distinct tokens, ascending; the order, if any, is a permutation of them."""
    assert answer.idx.dtype == torch.int64
    assert answer.idx.tolist() == sorted(set(answer.idx.tolist()))
    assert len(answer.idx) == budget
    assert int(answer.idx[0]) >= 0
    assert int(answer.idx[-1]) < n
    if answer.order is not None:
        assert torch.equal(answer.order.sort().values, answer.idx)
    if answer.scores is not None:
        assert answer.scores.shape == (n,)
        assert answer.scores.dtype == torch.float32


# What holds for every method


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("n", "fields"),
    [
        (1, {"grid": (1, 1, 1)}),
        (7, {}),
        (30, {"grid": (1, 5, 6)}),
        (60, {"grid": (4, 3, 5)}),
        (MOSAIC_SIZE, {"spans": MOSAIC}),
        (12, {"spans": (Span(1, (2, 2, 2)),)}),
    ],
    ids=["one", "line", "image", "video", "mosaic", "separators"],
)
def test_exact_budget_and_identity_when_all_stay(name: str, n: int, fields: dict[str, Any]) -> None:
    method = vtprune.create(name)
    for budget in range(1, n + 1):
        unit = visual(n, budget, **fields)
        answer = method(unit)
        check(answer, n, budget)
        assert answer.apply(unit.x).shape == (budget, 16)
    assert torch.equal(answer.idx, torch.arange(n))
    assert torch.equal(answer.apply(unit.x), unit.x)


@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single_calls_and_repeats(name: str) -> None:
    method = vtprune.create(name)
    units = [
        visual(30, 7, 1, grid=(1, 5, 6)),
        visual(MOSAIC_SIZE, 11, 2, spans=MOSAIC),
        visual(1, 1, 3),
        visual(30, 30, 4),
    ]
    first = method.batch(units)
    for again in (method.batch(units), [method(u) for u in units], method.batch(units[::-1])[::-1]):
        for a, b in zip(first, again):
            for field in dataclasses.fields(Assignment):
                left, right = getattr(a, field.name), getattr(b, field.name)
                assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_keeps_what_float32_keeps(name: str, dtype: torch.dtype) -> None:
    half = visual(30, 9, dtype=dtype, grid=(1, 5, 6))
    full = dataclasses.replace(half, x=half.x.float())
    method = vtprune.create(name)
    assert torch.equal(method(half).idx, method(full).idx)
    out = method(half).apply(half.x)
    assert out.dtype == dtype
    # Sums grow beyond 1, where the last digit of bfloat16 is coarser.
    assert torch.allclose(out.float(), method(full).apply(full.x), atol=0.01, rtol=2**-8)


# A choice that hangs on the last digits differs between a kernel and its reference, a batch and a single call, a CPU
# and a GPU, because each sums in an order of its own.
LAST_DIGITS = 1e-6
SHAKY = """{name} keeps other tokens when what it reads changes by one part in a million: {lost} left and {gained} came.
Float32 knows no more than that, so that such a choice differs from device to device. Look for: a difference of two
nearly equal numbers (`1 - similarity` of tokens that are alike), a comparison of two numbers that are equal in exact
arithmetic (`similarity >= 1`), `argmax` over scores that are all but equal, and sums in half precision. Instead:
subtract the vectors and not their norms, compare with a margin, and work in float32. Exact ties are another matter:
sort stably (`best_first` of vtprune.kernels), so that they go to the lower index."""


def shaken(unit: Visual, seed: int) -> Visual:
    """The same unit, with each number changed by at most one part in a million."""
    g = torch.Generator().manual_seed(seed)

    def other(t: Tensor) -> Tensor:
        return t * (1 + LAST_DIGITS * (2 * torch.rand(t.shape, generator=g) - 1))

    return dataclasses.replace(unit, x=other(unit.x), signals={kind: other(s) for kind, s in unit.signals.items()})


def rests_on_last_digits(method: Method) -> tuple[list[int], list[int]] | None:
    """The tokens that leave and that come where the last digits change, or None if all choices stay."""
    shapes: list[tuple[int, dict[str, Any]]] = [(30, {"grid": (1, 5, 6)}), (60, {"grid": (4, 3, 5)})]
    shapes.append((MOSAIC_SIZE, {"spans": MOSAIC}))
    for (n, fields), seed in itertools.product(shapes, range(5)):
        unit = visual(n, n // 4, seed, **fields)
        before, after = (set(method(u).idx.tolist()) for u in (unit, shaken(unit, seed)))
        if before != after:
            return sorted(before - after), sorted(after - before)
    return None


@pytest.mark.parametrize("name", ALL)
def test_no_choice_hangs_on_the_last_digits(name: str) -> None:
    found = rests_on_last_digits(vtprune.create(name))
    if found:
        pytest.fail(SHAKY.format(name=name, lost=found[0], gained=found[1]), pytrace=False)


@dataclasses.dataclass(frozen=True)
class _Shaky(Method):
    """Chooses by the distance of tokens that are all but equal, of which float32 holds no digit, or by their norms."""

    name = "shaky"
    careful: bool = False

    def __call__(self, v: Visual) -> Assignment:
        near = v.x + 1e-4 * v.x.roll(1, 0)
        scores = v.x.norm(dim=-1) if self.careful else 1 - F.cosine_similarity(near, v.x, dim=-1)
        return Assignment(scores.topk(v.budget or 1).indices.sort().values)


def test_a_choice_that_hangs_on_the_last_digits_is_found() -> None:
    assert rests_on_last_digits(_Shaky()) is not None
    assert rests_on_last_digits(_Shaky(careful=True)) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ALL)
def test_non_finite_input_is_refused(name: str, bad: float) -> None:
    method = vtprune.create(name)
    unit = visual(10, 4)
    source = unit.signals[method.needs[0]] if method.needs else unit.x
    source[3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        method(unit)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("budget", [None, 0, -1, 11])
def test_budget_outside_the_unit_is_refused(name: str, budget: int | None) -> None:
    method = vtprune.create(name)
    if budget is None and method.adaptive:
        assert 1 <= len(method(visual(10, None)).idx) <= 10
        return
    with pytest.raises(
        ValueError, match=r"keep=\.\.\." if budget is None else rf"budget={budget}: {name} can keep 1..10"
    ):
        method(visual(10, budget))


@pytest.mark.parametrize("name", ALL)
def test_what_does_not_read_the_question_chooses_the_same_for_another(name: str) -> None:
    """A server may use the tokens that were kept of an image again where `reads_text` is False."""
    model, batch = families.model("llava"), families.inputs("llava")
    stages = vtprune.create(name).stages(0.4, 4)
    if any(stage.method.reads_text for stage in stages):
        pytest.skip("its choice depends on the question")
    ids = batch["input_ids"]
    asked = torch.where(ids == model.config.image_token_id, ids, (ids + 7) % 40 + 1)
    behind = (ids == model.config.image_token_id).nonzero()[-1, -1] + 1
    asked = torch.cat([ids[:, :behind], asked[:, behind:]], 1)
    assert not torch.equal(asked, ids)
    kept = []
    with torch.no_grad(), vtprune.patch(model, stages) as handle:
        for question in (ids, asked):
            model(**{**batch, "input_ids": question})
            kept.append([unit.positions.tolist() for unit in handle.last.units])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ALL)
def test_methods_are_frozen_values(name: str) -> None:
    method = vtprune.create(name)
    assert method == vtprune.create(name)
    assert hash(method) == hash(vtprune.create(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"  # type: ignore[misc]
    assert (type(method).__doc__ or "").strip()


# auto


def test_a_recipe_of_auto_says_which_method_it_stands_for() -> None:
    recipe = vtprune.Recipe((vtprune.Stage("pre_llm", vtprune.create("auto"), 0.25),))
    recipe = vtprune.Recipe.from_json(recipe.to_json())
    assert recipe.stages[0].method == vtprune.create("volcov")


# divprune


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (35, 9), (64, 64)])
@pytest.mark.parametrize("memory", ["auto", "fast", "low"])
def test_divprune(n: int, k: int, memory: str) -> None:
    unit = visual(n, k)
    answer = vtprune.create("divprune", memory=memory)(unit)
    assert answer.order is not None
    assert answer.order.tolist() == oracles.divprune(unit.x, k)


def test_divprune_takes_copies_last() -> None:
    """Zero rows are as far from everything as unrelated ones; equal rows (newlines) count once until all is taken."""
    x = repeated()
    others = {i for i in range(20) if i not in range(5, 20, 2)}
    kept = set(vtprune.create("divprune")(Visual(x, 13)).idx.tolist())
    assert others <= kept
    for k in range(14, 21):
        check(vtprune.create("divprune")(Visual(x, k)), 20, k)


@pytest.mark.parametrize("objective", ["maxsum", "kcenter"])
@pytest.mark.parametrize("pivot", ["cls", "center", "farthest", "random"])
def test_todre_with_repeated_and_zero_rows(pivot: str, objective: str) -> None:
    for x in (repeated(), torch.zeros(20, 4), torch.ones(20, 4)):
        for k in (1, 2, 13, 19, 20):
            check(vtprune.create("todre", pivot=pivot, objective=objective)(Visual(x, k)), 20, k)


def repeated() -> Tensor:
    """20 tokens: 8 equal ones, 2 zero, 10 varied."""
    x = visual(20, 10).x
    x[5::2] = x[5]
    x[[0, 8]] = 0
    return x


def test_divprune_ignores_the_order_of_tokens() -> None:
    unit, perm = visual(40, 12), torch.randperm(40)
    plain = vtprune.create("divprune")(unit).order
    moved = vtprune.create("divprune")(Visual(unit.x[perm], 12)).order
    assert plain is not None
    assert moved is not None
    assert torch.equal(perm[moved], plain)


# todre


@pytest.mark.parametrize("objective", ["maxsum", "kcenter"])
@pytest.mark.parametrize("pivot", ["cls", "center", "farthest"])
@pytest.mark.parametrize("spans", [(), MOSAIC], ids=["image", "mosaic"])
def test_todre(objective: str, pivot: str, spans: tuple[Span, ...]) -> None:
    unit = visual(MOSAIC_SIZE, 15, spans=spans)
    answer = vtprune.create("todre", objective=objective, pivot=pivot)(unit)
    candidates = range(9) if spans else range(MOSAIC_SIZE)
    first = oracles.todre_pivot(unit.x, pivot, candidates, unit.signals[CLS])
    assert answer.order is not None
    assert answer.order.tolist() == oracles.diverse(unit.x, 15, {"kcenter": "maxmin"}.get(objective, objective), first)


def test_todre_reads_cls_only_for_its_pivot() -> None:
    assert vtprune.create("todre").needs == (CLS,)
    assert vtprune.create("todre", pivot="center").needs == ()


def test_todre_without_cls_token_says_what_it_did() -> None:
    bare = visual(20, 5, signals={})
    answer = vtprune.create("todre")(bare)
    assert torch.equal(answer.idx, vtprune.create("todre", pivot="center")(visual(20, 5)).idx)
    assert "no CLS" in bare.state["note"]
    assert "center" in bare.state["note"]


def test_todre_random_pivot_follows_the_seed() -> None:
    def first(seed: int, **fields: Any) -> int:
        order = vtprune.create("todre", pivot="random", seed=seed)(visual(MOSAIC_SIZE, 3, **fields)).order
        assert order is not None
        return int(order[0])

    assert first(5) == first(5)
    assert len({first(seed) for seed in range(20)}) > 5
    assert {first(seed, spans=MOSAIC) for seed in range(60)} == set(range(9))


@pytest.mark.parametrize(("option", "value"), [("objective", "max"), ("pivot", "corner")])
def test_todre_options(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option}='{value}': choose"):
        vtprune.create("todre", **{option: value})


# random


def test_random_depends_on_seed_and_size_only() -> None:
    def kept(seed: int, n: int, k: int, unit: int = 0) -> list[int]:
        return vtprune.create("random", seed=seed)(visual(n, k, unit)).idx.tolist()

    assert kept(0, 50, 10) == kept(0, 50, 10, unit=1)
    assert len({tuple(kept(seed, 50, 10)) for seed in range(10)}) == 10
    assert set(kept(3, 50, 10)) < set(kept(3, 50, 20))


def test_random_is_uniform() -> None:
    """Each of 20 tokens is kept a quarter of the time: 400 draws, within five standard deviations."""
    counts = torch.zeros(20)
    for seed in range(400):
        counts[vtprune.create("random", seed=seed)(visual(20, 5)).idx] += 1
    assert (counts - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_random_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    vtprune.create("random")(visual(20, 5))
    vtprune.create("todre", pivot="random")(visual(20, 5))
    assert torch.equal(torch.get_rng_state(), before)


# uniform


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 16, 16), (1, 3, 11), (1, 11, 3), (5, 4, 4), (3, 1, 7)])
def test_uniform_lattice(grid: tuple[int, int, int]) -> None:
    n = grid[0] * grid[1] * grid[2]
    for k in range(1, n + 1):
        assert vtprune.create("uniform")(visual(n, k, grid=grid)).idx.tolist() == oracles.lattice(grid, k)


def test_uniform_examples() -> None:
    uniform = vtprune.create("uniform")
    assert uniform(visual(16, 4, grid=(1, 4, 4))).idx.tolist() == [5, 7, 13, 15]
    assert uniform(visual(9, 3)).idx.tolist() == [1, 4, 7]
    assert uniform(visual(32, 2, grid=(8, 2, 2))).idx.tolist() == [11, 27]


def test_uniform_covers_the_image_better_than_a_line() -> None:
    """No token of a 16x16 image is farther than 3 cells from a kept one at 11 %."""
    kept = vtprune.create("uniform")(visual(256, 28, grid=(1, 16, 16))).idx
    at = torch.stack([torch.arange(256) // 16, torch.arange(256) % 16], 1).float()
    assert torch.cdist(at, at[kept]).min(dim=1).values.max() <= 3


def test_uniform_shares_its_budget_over_spans() -> None:
    kept = vtprune.create("uniform")(visual(MOSAIC_SIZE, 17, spans=MOSAIC)).idx
    newlines = [10 + row * 6 + 5 for row in range(4)]
    counts = [int((kept < 9).sum()), int((kept == 9).sum()), sum(int(i) in newlines for i in kept)]
    assert counts == [5, 0, 2]


def test_blocks_partition_the_unit() -> None:
    for n, fields in [(MOSAIC_SIZE + 2, {"spans": MOSAIC}), (12, {"spans": (Span(3, (2, 2, 2)),)}), (6, {})]:
        parts = blocks(visual(n, 1, **fields))  # type: ignore[arg-type]
        assert sorted(torch.cat([p.flatten() for p in parts]).tolist()) == list(range(n))
    shapes = [tuple(part.shape) for part in blocks(visual(MOSAIC_SIZE, 1, spans=MOSAIC))]
    assert shapes == [(1, 3, 3), (1, 1, 1), (1, 4, 5), (1, 1, 4)]


# average_pool


@pytest.mark.parametrize(
    ("grid", "budget", "cells"),
    [
        ((1, 6, 6), 9, (3, 3)),
        ((1, 16, 16), 28, (4, 7)),
        ((1, 16, 16), 128, (8, 16)),
        ((3, 5, 7), 36, (3, 4)),
        ((1, 4, 9), 1, (1, 1)),
        ((2, 5, 5), 50, (5, 5)),
    ],
)
def test_average_pool_in_cells(grid: tuple[int, int, int], budget: int, cells: tuple[int, int]) -> None:
    n = grid[0] * grid[1] * grid[2]
    unit = visual(n, budget, grid=grid)
    answer = vtprune.create("average_pool")(unit)
    means, centres = oracles.pool(unit.x, grid, cells)
    assert answer.merges
    assert answer.idx.tolist() == centres
    assert torch.allclose(answer.apply(unit.x).double(), means, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "budget", "grid"), [(36, 12, None), (35, 8, None), (256, 29, (1, 16, 16)), (18, 7, (3, 2, 3))]
)
def test_average_pool_in_runs(n: int, budget: int, grid: tuple[int, int, int] | None) -> None:
    """29 is prime and larger than any side: runs of the raster order, as LLaVolta pools."""
    unit = visual(n, budget, grid=grid)
    answer = vtprune.create("average_pool")(unit)
    means, centres = oracles.pool(unit.x, (1, 1, n), (1, budget))
    assert answer.idx.tolist() == centres
    assert torch.allclose(answer.apply(unit.x).double(), means, atol=1e-6)
    if n % budget == 0:
        official = F.avg_pool1d(unit.x.T[None], n // budget)[0].T
        assert torch.allclose(answer.apply(unit.x), official, atol=1e-6)


@pytest.mark.parametrize("mode", ["average", "bilinear"])
def test_average_pool_weights_sum_to_one(mode: str) -> None:
    for budget in range(1, MOSAIC_SIZE + 1):
        answer = vtprune.create("average_pool", mode=mode)(visual(MOSAIC_SIZE, budget, spans=MOSAIC))
        assert answer.dst is not None
        assert answer.w is not None
        total = torch.zeros(budget).index_add_(0, answer.dst, answer.w)
        assert torch.allclose(total, torch.ones(budget))


def test_average_pool_mixes_no_newline_with_the_image() -> None:
    unit = visual(MOSAIC_SIZE, 8, spans=MOSAIC)
    answer = vtprune.create("average_pool")(unit)
    assert answer.src is not None
    assert answer.dst is not None
    block = torch.empty(MOSAIC_SIZE, dtype=torch.int64)
    for i, part in enumerate(blocks(unit)):
        block[part.flatten()] = i
    assert torch.equal(block[answer.src], block[answer.idx[answer.dst]])


def frames(grid: tuple[int, int, int], x: Tensor) -> Tensor:
    t, h, w = grid
    return x.view(t, h, w, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("grid", [(1, 6, 6), (2, 7, 9), (3, 27, 27), (1, 4, 5)])
@pytest.mark.parametrize("stride", [2, 3])
def test_fixed_stride_equals_torch(grid: tuple[int, int, int], stride: int) -> None:
    t, h, w = grid
    unit = visual(t * h * w, None, grid=grid)
    average = vtprune.create("average_pool", stride=stride)(unit)
    expected = F.avg_pool2d(frames(grid, unit.x), stride)
    assert torch.allclose(average.apply(unit.x), expected.permute(0, 2, 3, 1).reshape(-1, 16), atol=1e-6)
    bilinear = vtprune.create("average_pool", stride=stride, mode="bilinear")(unit)
    size = (-(-h // stride), -(-w // stride))
    expected = F.interpolate(frames(grid, unit.x), size=size, mode="bilinear", align_corners=False)
    assert torch.allclose(bilinear.apply(unit.x), expected.permute(0, 2, 3, 1).reshape(-1, 16), atol=1e-5)
    for answer in (average, bilinear):
        check(answer, unit.n, len(answer.idx))


def test_fixed_stride_keeps_newlines() -> None:
    unit = visual(MOSAIC_SIZE, None, spans=MOSAIC)
    answer = vtprune.create("average_pool", stride=2)(unit)
    kept = dict(zip(answer.idx.tolist(), answer.apply(unit.x)))
    assert len(kept) == 1 + 1 + 4 + 4
    for newline in (9, 15, 21, 27, 33):
        assert torch.equal(kept[newline], unit.x[newline])


def test_average_pool_options() -> None:
    with pytest.raises(ValueError, match="mode='max': choose 'average' or 'bilinear'"):
        vtprune.create("average_pool", mode="max")
    with pytest.raises(ValueError, match="stride=0"):
        vtprune.create("average_pool", stride=0)
    with pytest.raises(ValueError, match="stride=2: this unit has no grid"):
        vtprune.create("average_pool", stride=2)(visual(10, None))
    with pytest.raises(ValueError, match="stride=2 gives 9 tokens, not 5"):
        vtprune.create("average_pool", stride=2)(visual(36, 5, grid=(1, 6, 6)))


# fastv


def test_fastv_takes_the_top_of_the_row() -> None:
    unit = visual(40, 13)
    answer = vtprune.create("fastv")(unit)
    assert answer.order is not None
    assert answer.order.tolist() == oracles.top(unit.signals[LAST_ROW], 13)
    assert answer.scores is not None
    assert torch.equal(answer.scores, unit.signals[LAST_ROW])


@pytest.mark.parametrize("n", [6, 600])
def test_fastv_ties_go_to_the_lower_index(n: int) -> None:
    row = (torch.arange(n) % 3).float()
    answer = vtprune.create("fastv")(visual(n, n // 2, signals={LAST_ROW: row}))
    assert answer.order is not None
    assert answer.order.tolist() == oracles.top(row, n // 2)


def test_fastv_acts_at_its_layer() -> None:
    (stage,) = vtprune.create("fastv", layer=3).stages(0.25, 4)
    assert (stage.where, stage.keep) == (3, 0.25)
    assert vtprune.create("fastv").default_where() == 2
    assert vtprune.create("fastv").needs == (LAST_ROW,)


def test_fastv_needs_a_layer_before() -> None:
    with pytest.raises(ValueError, match="layer >= 1"):
        vtprune.create("fastv", layer=0)
    for value in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="int >= 1"):
            vtprune.create("fastv", layer=value)


@pytest.mark.parametrize("name", PRE_LLM)
def test_pre_llm_methods_act_before_the_llm(name: str) -> None:
    method: Method = vtprune.create(name)
    first, *later = [stage.where for stage in method.stages(0.5, 4)]
    assert first == "llm"
    assert all(isinstance(where, int) for where in later)
