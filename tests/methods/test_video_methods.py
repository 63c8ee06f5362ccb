"""The video methods against their oracles, at the frame counts where the official codes break, and on real layouts."""

from __future__ import annotations

from typing import Any

import families
import oracles_video as oracle
import pytest
import reference
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune import Assignment, Span, Visual
from vtprune.methods.clips import clips, evenly_shared
from vtprune.methods.counting import apportion
from vtprune.methods.density_peaks import clusters
from vtprune.methods.scenes import refined
from vtprune.methods.segments import cut, run_lengths, still_places
from vtprune.methods.shared import bipartite
from vtprune.methods.video.aim import KEYS
from vtprune.methods.video.fastvid import LOOKED_AT
from vtprune.methods.video.holitom import RECEIVED
from vtprune.methods.video.prunevid import scenes

GRIDS = [(1, 3, 4), (2, 3, 3), (3, 2, 5), (4, 3, 3), (5, 3, 3), (7, 2, 3), (8, 3, 4), (9, 2, 2), (13, 2, 3)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def video(grid: tuple[int, int, int], seed: int = 0, d: int = 12) -> Tensor:
    """[T, P, D]: a still background with noise, one place that moves, a cut in the middle."""
    t, h, w = grid
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, h * w, d, generator=g)
    x = scenes[(torch.arange(t) * 2 // t)] + 0.15 * torch.randn(t, h * w, d, generator=g)
    x[torch.arange(t), torch.arange(t) % (h * w)] = torch.randn(t, d, generator=g)
    return x


def unit(x: Tensor, budget: int | None, grid: tuple[int, int, int], **fields: Any) -> Visual:
    return Visual(x.flatten(0, 1), budget, grid=grid, **fields)


def some(n: int) -> list[int]:
    """Budgets: the smallest, the largest, and a few between."""
    return sorted({1, 2, n // 7 or 1, n // 4 or 1, n // 2, n - 1, n} - {0})


# evs, dycoke, vidcom2


@every_grid
def test_evs(grid: tuple[int, int, int]) -> None:
    x = video(grid)
    n = grid[0] * grid[1] * grid[2]
    natural = max(grid[1] * grid[2], int(0.25 * n))
    for budget in some(n):
        fair = budget < natural and grid[0] > 1
        kept = vtprune.create("evs")(unit(x, budget, grid)).idx.tolist()
        assert kept == (oracle.evs_fair if fair else oracle.evs)(x, budget)
        assert vtprune.create("evs", faithful=True)(unit(x, budget, grid)).idx.tolist() == oracle.evs(x, budget)
        if budget >= grid[0]:
            assert not fair or len({i // (grid[1] * grid[2]) for i in kept}) == grid[0], "every frame keeps something"
    for ratio in (0.1, 0.5, 1.0):
        count = max(grid[1] * grid[2], int(ratio * n))
        assert vtprune.create("evs", ratio=ratio)(unit(x, None, grid)).idx.tolist() == oracle.evs(x, count)


@every_grid
def test_dycoke(grid: tuple[int, int, int]) -> None:
    x = video(grid)
    n = grid[0] * grid[1] * grid[2]
    p, firsts = grid[1] * grid[2], -(-grid[0] // 4)
    natural = firsts * p + (grid[0] - firsts) * int(0.3 * p)
    for budget in some(n):
        fair = budget < natural and grid[0] > 1
        kept = vtprune.create("dycoke")(unit(x, budget, grid)).idx.tolist()
        assert kept == (oracle.dycoke_fair if fair else oracle.dycoke)(x, budget)
        faithful = vtprune.create("dycoke", faithful=True)(unit(x, budget, grid))
        assert faithful.idx.tolist() == oracle.dycoke(x, budget)
        if budget >= grid[0]:
            assert not fair or len({i // p for i in kept}) == grid[0], "every frame keeps something"


@every_grid
@pytest.mark.parametrize("k", [0.3, 0.7, 1.0])
def test_dycoke_as_published(grid: tuple[int, int, int], k: float) -> None:
    """In the official order; a video of one frame, which official code cannot take, stays whole."""
    x = video(grid)
    answer = vtprune.create("dycoke", k=k, faithful=True)(unit(x, None, grid))
    assert answer.order is not None
    expected = oracle.dycoke_official(x, k) if grid[0] > 1 else list(range(grid[1] * grid[2]))
    assert answer.order.tolist() == expected


def test_dycoke_keeps_what_the_official_code_loses() -> None:
    """A last odd frame stays, and the third of the last four is compared."""

    def counts(frames: int, faithful: bool) -> list[int]:
        grid = (frames, 2, 3)
        kept = vtprune.create("dycoke", k=0.5, faithful=faithful)(unit(video(grid), None, grid)).idx
        return torch.bincount(kept // 6, minlength=frames).tolist()

    assert counts(9, False) == [6, 3, 3, 3, 6, 3, 3, 3, 6]
    assert counts(9, True) == [6, 3, 3, 3, 6, 3, 3, 3, 0]
    assert counts(8, False) == [6, 3, 3, 3, 6, 3, 3, 3]
    assert counts(8, True) == [6, 3, 3, 3, 6, 3, 6, 3]


def test_dycoke_options() -> None:
    for k in (-0.1, 1.5, True):
        with pytest.raises(ValueError, match=r"k=.*use a share in \[0, 1\]"):
            vtprune.create("dycoke", k=k)
    (stage,) = vtprune.create("dycoke").stages(0.3, 8)
    assert (stage.where, stage.compact, stage.newlines) == ("llm", False, "keep")
    first, second = vtprune.create("dycoke", kv=True).stages(0.3, 8)
    assert (first.where, second.where, second.method.name, second.keep) == ("llm", 3, "dycoke_kv", 0.3)
    assert len(vtprune.create("dycoke", kv=True).stages(1.0, 8)) == 1


@every_grid
@pytest.mark.parametrize("ratio", [0.15, 0.25, 0.8])
def test_vidcom2(grid: tuple[int, int, int], ratio: float) -> None:
    x = video(grid)
    answer = vtprune.create("vidcom2", ratio=ratio)(unit(x, None, grid))
    kept, scores = oracle.vidcom2(x, ratio)
    assert answer.idx.tolist() == kept
    assert answer.scores is not None
    torch.testing.assert_close(-answer.scores.double(), torch.tensor(scores, dtype=torch.float64), rtol=0, atol=1e-5)


def test_vidcom2_at_a_budget_differs_by_rounding_only() -> None:
    """Every frame keeps the official count up to one, and they sum to the budget."""
    x, grid = video((8, 4, 4), seed=3), (8, 4, 4)
    for budget in (16, 32, 40, 60):
        exact = torch.bincount(vtprune.create("vidcom2")(unit(x, budget, grid)).idx // 16, minlength=8)
        kept, _ = oracle.vidcom2(x, budget / 128)
        official = torch.bincount(torch.tensor(kept) // 16, minlength=8)
        assert int(exact.sum()) == budget
        assert int((exact - official).abs().max()) <= 1


def test_apportion() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        parts, cap = int(torch.randint(1, 9, (), generator=g)), int(torch.randint(1, 7, (), generator=g))
        total = int(torch.randint(0, parts * cap + 1, (), generator=g))
        weights = torch.rand(parts, generator=g) * torch.randint(0, 2, (parts,), generator=g)
        shares = apportion(weights, total, cap)
        assert int(shares.sum()) == total
        assert int(shares.min()) >= 0
        assert int(shares.max()) <= cap
        ideal = weights * total / weights.sum()
        if weights.sum() > 0 and float(ideal.max()) <= cap:
            assert float((shares - ideal).abs().max()) < 1 + 1e-4
    assert apportion(torch.zeros(3), 4, 2).tolist() == [2, 1, 1]
    assert evenly_shared(7, 3, torch.device("cpu")).tolist() == [2, 2, 3]


# holitom


def seen_of(grid: tuple[int, int, int], seed: int = 5) -> Tensor:
    return torch.rand(grid[0], grid[1] * grid[2], generator=torch.Generator().manual_seed(seed))


def agrees(answer: Assignment, v: Visual, expected: dict[int, Tensor]) -> None:
    """The same tokens stand at the same places with the same features."""
    assert answer.idx.tolist() == sorted(expected)
    features = torch.stack([expected[i] for i in sorted(expected)])
    torch.testing.assert_close(answer.apply(v.x).double(), features, rtol=0, atol=1e-5)


@every_grid
@pytest.mark.parametrize("beta", [0.6, None])
def test_holitom(grid: tuple[int, int, int], beta: float | None) -> None:
    x, seen = video(grid), seen_of(grid)
    n = grid[0] * grid[1] * grid[2]
    method = vtprune.create("holitom", beta=beta)
    for budget in some(n):
        v = unit(x, budget, grid, signals={RECEIVED: seen.flatten()})
        answer = method(v)
        assert len(answer.idx) == budget
        agrees(answer, v, oracle.holitom(x, seen, 0.8, beta, None, budget))


@every_grid
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.9])
def test_holitom_as_published(grid: tuple[int, int, int], ratio: float) -> None:
    x, seen = video(grid), seen_of(grid)
    v = unit(x, None, grid, signals={RECEIVED: seen.flatten()})
    agrees(vtprune.create("holitom", ratio=ratio)(v), v, oracle.holitom(x, seen, 0.8, 0.6, ratio, None))


@pytest.mark.parametrize("what", ["all still", "nothing still"])
def test_holitom_on_extreme_videos(what: str) -> None:
    """No dynamic token at all, and no static one."""
    grid = (6, 2, 3)
    x = torch.randn(6, 6, 8) if what == "nothing still" else torch.randn(1, 6, 8).expand(6, -1, -1).clone()
    seen = seen_of(grid)
    for budget in (1, 3, 6, 7, 20, 36):
        v = unit(x, budget, grid, signals={RECEIVED: seen.flatten()})
        answer = vtprune.create("holitom")(v)
        assert len(answer.idx) == budget
        if what == "nothing still":
            assert torch.equal(answer.apply(v.x), v.x[answer.idx])
        elif budget <= 6:
            assert int(answer.idx.max()) < 6, "one segment, so all stand in its first frame"


def test_segments_equal_the_cell_by_cell_programme() -> None:
    """Ties and all: random videos of up to 14 frames with few places, so that many windows save the same."""
    g = torch.Generator().manual_seed(0)
    for _ in range(150):
        t, p = int(torch.randint(2, 15, (), generator=g)), int(torch.randint(1, 6, (), generator=g))
        same = torch.rand(t - 1, p, generator=g) < torch.rand((), generator=g) ** 0.5
        assert cut(still_places(run_lengths(same))) == oracle.dp_segments(same.tolist())


def test_holitom_stages_and_options() -> None:
    first, second = vtprune.create("holitom").stages(0.15, 28)
    assert (first.where, first.keep, first.compact) == ("llm", 0.15, False)
    assert (second.where, second.method.name, second.keep) == (18, "holitom_inner", None)
    assert len(vtprune.create("holitom", inner=False).stages(0.15, 28)) == 1
    assert len(vtprune.create("holitom").stages(1.0, 28)) == 1
    for option, value in (("tau", 1.5), ("beta", -0.1), ("ratio", 0.0)):
        with pytest.raises(ValueError, match=f"{option}={value}"):
            vtprune.create("holitom", **{option: value})


# aim


@every_grid
@pytest.mark.parametrize("metric", ["features", "keys"])
def test_aim(grid: tuple[int, int, int], metric: str) -> None:
    x = video(grid)
    t, p = x.shape[:2]
    keys = torch.randn(t, p, 6, generator=torch.Generator().manual_seed(9))
    for budget in some(t * p):
        v = unit(x, budget, grid, signals={KEYS: keys.flatten(0, 1)})
        answer = vtprune.create("aim", metric=metric)(v)
        assert len(answer.idx) == budget
        expected = {}
        for i in range(t):
            count = (i + 1) * budget // t - i * budget // t
            one = oracle.aim(x[i], keys[i] if metric == "keys" else x[i], count) if count else {}
            expected |= {i * p + place: feature for place, feature in one.items()}
        agrees(answer, v, expected)


def test_aim_stages_and_options() -> None:
    first, *later = vtprune.create("aim").stages(0.25, 28)
    assert (first.where, first.keep) == ("llm", 0.25)
    assert [stage.where for stage in later] == list(range(15, 23))
    assert [stage.keep for stage in later] == [*(0.25 * (1 - i / 8) for i in range(1, 8)), None]
    assert [stage.keep for stage in vtprune.create("aim").stages(None, 28)][:2] == [None, 0.25 * 0.875]
    counted = vtprune.create("aim").stages(8, 28)
    assert [stage.keep for stage in counted] == [8, 7, 6, 5, 4, 3, 2, 1, None]
    assert {stage.per for stage in counted[:-1]} == {"image"}, "eight tokens of each of several videos"
    assert len(vtprune.create("aim").stages(1.0, 28)) == len(vtprune.create("aim", inner=False).stages(0.2, 28)) == 1
    with pytest.raises(ValueError, match="rounds=0"):
        vtprune.create("aim", rounds=0)
    with pytest.raises(ValueError, match="metric='values': choose 'features' or 'keys'"):
        vtprune.create("aim", metric="values")


# prunevid


@every_grid
def test_prunevid(grid: tuple[int, int, int]) -> None:
    x = video(grid)
    n = grid[0] * grid[1] * grid[2]
    for budget in some(n):
        v = unit(x, budget, grid)
        answer = vtprune.create("prunevid")(v)
        assert len(answer.idx) == budget
        agrees(answer, v, oracle.prunevid(x, 0.8, 0.25, None, budget))


@pytest.mark.parametrize("grid", [(1, 4, 5), (3, 4, 5), (5, 4, 5), (8, 4, 5)], ids=str)
def test_prunevid_as_published(grid: tuple[int, int, int]) -> None:
    """Fewer than 7 frames, and fewer than 4, included: there the official code has no neighbours and no centres."""
    x = video(grid, seed=2)
    v = unit(x, None, grid)
    agrees(vtprune.create("prunevid", ratio=0.3)(v), v, oracle.prunevid(x, 0.8, 0.25, 0.3, None))


def test_scenes_from_labels() -> None:
    assert refined([0, 0, 0, 1, 0, 2, 2]) == [(0, 4), (5, 6)]
    assert refined([0, 1, 0, 1]) == [(0, 3)], "no run of two: one scene"
    assert refined([1, 0, 0, 2, 1, 1, 1]) == [(0, 2), (3, 6)], "freed frames join the longer neighbour"
    assert refined([0, 0, 2, 1, 1]) == [(0, 2), (3, 4)], "the left one of two that are equally long"
    assert refined([0, 0, 1, 1, 0, 0]) == [(0, 1), (2, 3), (4, 5)], "all longest runs of a label stay"
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(int(torch.randint(1, 20, (), generator=g)), 3, 4, generator=g).cumsum(0)
        found = scenes(x.mean(1), max(1, int(len(x) * 0.25)))
        assert found == oracle.prunevid_scenes(x, 0.25)


def test_prunevid_options() -> None:
    for option, value in (("tau", -2.0), ("scenes", 0.0), ("ratio", 2.0)):
        with pytest.raises(ValueError, match=f"{option}={value}"):
            vtprune.create("prunevid", **{option: value})


def test_a_lonely_row_is_its_own_centre() -> None:
    """One still place among places that are not still, and copies of one token."""
    real = torch.tensor([[False, False, True], [True, False, True]])
    one = torch.ones(2, dtype=torch.int64)
    centre, member = clusters(torch.ones(2, 3, 4), real, one, one, 7)
    assert centre.tolist() == [[False, False, True], [True, False, False]]
    assert member[real].tolist() == [2, 0, 0]


# fastvid

every_variant = pytest.mark.parametrize("variant", ["ov", "lv", "qwen"])


@every_grid
@every_variant
def test_fastvid(grid: tuple[int, int, int], variant: str) -> None:
    """Fewer than eight frames too, where the official code stops."""
    x, seen = video(grid), seen_of(grid)
    n = grid[0] * grid[1] * grid[2]
    for budget in some(n):
        v = unit(x, budget, grid, signals={LOOKED_AT: seen.flatten()})
        answer = vtprune.create("fastvid", variant=variant)(v)
        assert len(answer.idx) == budget
        agrees(answer, v, oracle.fastvid(x, seen, variant, None, budget))


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
@every_variant
def test_fastvid_as_published(variant: str, ratio: float) -> None:
    """Frames alike for a while, so that scenes have several; shares no frame can hold are cut down."""
    grid = (14, 3, 4)
    x, seen = video(grid, seed=4), seen_of(grid)
    x[3:12] = x[3] + 0.1 * x[3:12]
    v = unit(x, None, grid, signals={LOOKED_AT: seen.flatten()})
    agrees(vtprune.create("fastvid", variant=variant, ratio=ratio)(v), v, oracle.fastvid(x, seen, variant, ratio, None))


def test_fastvid_options() -> None:
    for option, value in (("variant", "llava"), ("context", 1.5), ("beta", -1.0), ("tau", 3.0)):
        with pytest.raises(ValueError, match=f"{option}={value!r}"):
            vtprune.create("fastvid", **{option: value})
    v = unit(video((9, 2, 3)), 20, (9, 2, 3), signals={LOOKED_AT: seen_of((9, 2, 3)).flatten()})
    shapes = []
    means = vtprune.create("fastvid", frames=lambda x: shapes.append(x.shape) or x.mean(1))(v)  # type: ignore[func-returns-value]
    assert torch.equal(means.idx, vtprune.create("fastvid")(v).idx)
    assert shapes == [(9, 6, 12)], "frames are compared by what the caller says"


# clips


def test_clips_of_a_unit() -> None:
    x = torch.arange(40.0)[:, None]

    def seen(*spans: Span, video: bool = False, n: int = 40) -> tuple[list[list[list[int]]], list[int]]:
        found, loose = clips(Visual(x[:n], None, spans=spans, video=video))
        for clip in found:
            assert torch.equal(clip.x[..., 0], clip.at.float())
        return [clip.at.tolist() for clip in found], loose.tolist()

    assert seen(Span(0, (2, 1, 3)), n=7) == ([[[0, 1, 2], [3, 4, 5]]], [6])
    marked = Span(1, (1, 1, 2)), Span(4, (1, 1, 2))  # a class token before every frame
    assert seen(*marked, n=6, video=True) == ([[[1, 2], [4, 5]]], [0, 3])
    assert seen(*marked, n=6) == ([[[1, 2]], [[4, 5]]], [0, 3]), "crops of an image are no frames"
    rows = Span(0, (2, 2, 2), newline=True)
    assert seen(rows, n=12) == ([[[0, 1, 3, 4], [6, 7, 9, 10]]], [2, 5, 8, 11])
    assert seen(n=3) == ([[[0, 1, 2]]], [])


@pytest.mark.parametrize("name", ["evs", "dycoke", "vidcom2", "aim"])
def test_newlines_and_separators_leave_first(name: str) -> None:
    x, grid = video((4, 2, 3)), (4, 2, 3)
    whole = torch.cat([x.flatten(0, 1), torch.randn(1, 12)])
    plain = vtprune.create(name)(unit(x, 10, grid))
    beside = vtprune.create(name)(Visual(whole, 10, spans=(Span(0, grid),)))
    assert torch.equal(plain.idx, beside.idx)
    assert torch.equal(beside.idx, vtprune.create(name)(Visual(whole, 10, spans=(Span(0, grid),))).idx)
    ends = vtprune.create(name)(Visual(whole, None, spans=(Span(0, grid),)))
    assert int(ends.idx[-1]) == 24, "without a budget they stay"
    rows = torch.cat([x.view(8, 3, 12), torch.randn(8, 1, 12)], dim=1).flatten(0, 1)  # a newline behind every row
    at = (torch.arange(32).view(8, 4)[:, :3]).flatten()
    gridded = vtprune.create(name)(Visual(rows, 10, spans=(Span(0, grid, newline=True),)))
    assert torch.equal(gridded.idx, at[plain.idx])


def test_two_clips_share_the_budget() -> None:
    """Two images of different size in one unit: each by itself, in proportion to its tokens."""
    a, b = video((1, 2, 4), 1), video((1, 4, 4), 2)
    x = torch.cat([a.flatten(0, 1), b.flatten(0, 1)])
    spans = Span(0, (1, 2, 4)), Span(8, (1, 4, 4))
    both: Assignment = vtprune.create("vidcom2")(Visual(x, 6, spans=spans))
    alone = [vtprune.create("vidcom2")(unit(v, n, (1, *g))).idx for v, n, g in ((a, 2, (2, 4)), (b, 4, (4, 4)))]
    assert torch.equal(both.idx, torch.cat([alone[0], alone[1] + 8]))


def test_a_still_image_says_so() -> None:
    v = unit(video((1, 4, 4)), 4, (1, 4, 4))
    assert vtprune.create("evs")(v).idx.tolist() == [2, 6, 10, 14]
    assert "per='sample'" in v.state["note"]


@pytest.mark.parametrize("ratio", [0.0, 1.5, True, 3])
@pytest.mark.parametrize("name", ["evs", "vidcom2"])
def test_ratio_outside_its_range(name: str, ratio: Any) -> None:
    with pytest.raises(ValueError, match=f"ratio={ratio!r}: use a float in"):
        vtprune.create(name, ratio=ratio)


# cost


class Large(TorchDispatchMode):
    """Counts the tensors of more than so many elements that are made, views left out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += isinstance(out, Tensor) and not func.is_view and out.numel() > self.size
        return out


@pytest.mark.parametrize(("name", "made"), [("evs", 1), ("dycoke", 3), ("holitom", 1), ("aim", 0), ("fastvid", 0)])
def test_features_are_not_copied(name: str, made: int) -> None:
    """Frames in one run are a view, and cosines are products and lengths: one tensor of products for all of them.

    DyCoke takes the frames of reference, too, and compares first frames with their own mean.
    """
    grid = (8, 4, 4)
    x, seen = video(grid, d=256), seen_of(grid).flatten()
    v, method = unit(x, 20, grid, signals={RECEIVED: seen, LOOKED_AT: seen}), vtprune.create(name)
    with torch.no_grad(), Large(x.numel() // 2) as large:
        method(v)
    assert large.made == made


def test_aim_merges_features_between_rounds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last round makes is made once, by the seam, of all rounds' weights."""
    grid, calls = (3, 4, 4), []
    merge = bipartite.merge
    monkeypatch.setattr(bipartite, "merge", lambda *a: calls.append(a[0].shape) or merge(*a))  # type: ignore[func-returns-value]
    v = unit(video(grid), None, grid)
    one, two = (vtprune.create("aim", rounds=n) for n in (1, 2))
    assert len(one(v).idx) == 24
    assert calls == []
    assert len(two(v).idx) == 12
    assert calls == [(48, 12)]


# in models

VIDEO = ("aim", "dycoke", "evs", "fastvid", "holitom", "prunevid", "vidcom2")


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("family", ["internvl-frames", "smolvlm-frames"])
def test_frames_that_come_as_images_are_one_video_per_sample(family: str, name: str) -> None:
    """InternVL and SmolVLM see images with words between them; with per="sample" the rule sees one clip of three."""
    model, method = families.model(family), vtprune.create(name)
    stages, log = reference.spy([vtprune.Stage("llm", method, keep=0.4, per="sample")])
    batch = families.inputs(family, rows=(0, 1))
    with vtprune.patch(model, stages) as handle:
        tokens, ours = reference.greedy(model, batch, 4)
        assert handle.last is not None
        assert not any("per='sample'" in note for note in handle.last.notes)
    (call,) = log
    (v,), (answer,) = call.units, call.answers
    assert v.video
    assert v.n == 27
    one = method(Visual(v.x, v.budget, grid=(3, 3, 3), signals=v.signals))
    assert torch.equal(answer.idx, one.idx)
    assert torch.equal(answer.apply(v.x), one.apply(v.x))
    units = [families.inputs(family, rows=(0, 1), only=row).units[0] for row in (0, 1)]
    cuts = reference.cuts_of_row(log, (0, 1), units)
    compact = reference.renumbers(log)
    theirs = reference.expected(model, family, (0, 1), 1, cuts[1], tokens[1], compact=compact)
    torch.testing.assert_close(ours[1], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("family", ["internvl-frames", "llava"])
def test_a_single_frame_says_what_it_lacks(family: str, name: str) -> None:
    model = families.model(family)
    with torch.no_grad(), vtprune.patch(model, name, keep=0.5) as handle:
        model(**families.inputs(family))
        assert handle.last is not None
        assert any("per='sample'" in note for note in handle.last.notes)


@pytest.mark.parametrize("name", VIDEO)
def test_newline_and_class_tokens_stay_beside_the_budget(name: str) -> None:
    """The newline behind a video of LLaVA-OneVision, the class token before every frame of Video-LLaVA."""
    for family, frames, separators in (("llava_onevision-video", 4, [16]), ("video_llava-video", 2, [0, 17])):
        model = families.model(family)
        batch = families.inputs(family)
        (unit_at,) = batch.units[0]
        with torch.no_grad(), vtprune.patch(model, vtprune.create(name).stages(0.3, 4)[:1]) as handle:
            model(**batch)
            assert handle.last is not None
            kept = set(handle.last.index[0].tolist())
            (result,) = handle.last.units
        assert {unit_at[i] for i in separators} <= kept
        inside = len(unit_at) - len(separators)
        assert len(result.idx) == round(0.3 * inside)
        assert result.grid is None or result.grid[0] == frames


@pytest.mark.parametrize("name", VIDEO)
def test_merged_tokens_keep_the_place_of_their_centre(name: str) -> None:
    """M-RoPE: time, height and width ids of a kept token are its own."""
    model, method = families.model("qwen2_5_vl-video"), vtprune.create(name)
    batch = families.inputs("qwen2_5_vl-video")
    places = reference.positions(model, batch)
    assert places is not None
    seen = []
    see = lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1]))  # noqa: E731
    with torch.no_grad(), vtprune.patch(model, method.stages(0.3, 4)[:1]) as handle:
        hook = model.get_decoder().rotary_emb.register_forward_pre_hook(see, with_kwargs=True)
        model(**batch)
        hook.remove()
        assert handle.last is not None
        index = handle.last.index[0]
    assert torch.equal(seen[0].view(-1, *seen[0].shape[-2:])[-3:, 0], places[:, 0].index_select(1, index))
