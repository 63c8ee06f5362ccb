"""`vtprune.Stream` keeps of a video in parts what `vtprune.select` keeps of the whole, where the rule allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import Assignment, Method, Selected, Stage, Stream, Visual

H, W, D = 6, 6, 8
P = H * W
DIVISIONS = [(12,), (4, 8), (1,) * 12, (3, 5, 4), (2, 2, 7, 1), (6, 6)]
divisions = pytest.mark.parametrize("parts", DIVISIONS, ids=str)


def video(frames: int, seed: int = 0) -> Tensor:
    """[T * P, D]: a still scene with noise, one cut in the middle."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(2, P, D, generator=g)
    return (scenes[torch.arange(frames) * 2 // frames] + 0.3 * torch.randn(frames, P, D, generator=g)).flatten(0, 1)


def streamed(stream: Stream, x: Tensor, parts: Sequence[int], **signals: Tensor) -> list[Selected]:
    """The answers to all parts, the last one that of `finish`."""
    found, first = [], 0
    for t in parts:
        last = first + t * P
        own = {kind: signal[first:last] for kind, signal in signals.items()}
        found.append(stream.push(x[first:last], (t, H, W), own))
        first = last
    assert first == len(x)
    return [*found, stream.finish()]


def joined(found: Sequence[Selected]) -> tuple[Tensor, Tensor]:
    """What is kept of the video, where it stands there; that the answers together are about all of it is checked."""
    ends = [part.start + part.n for part in found]
    assert [part.start for part in found] == [0, *ends[:-1]]
    assert all(len(part.idx) == len(part.features) for part in found)
    return torch.cat([part.idx + part.start for part in found]), torch.cat([part.features for part in found])


@divisions
@pytest.mark.parametrize(
    ("method", "options", "stage"),
    [
        ("dycoke", {}, {}),
        ("dycoke", {"k": 0.5}, {}),
        ("dycoke", {}, {"keep": 0.25}),  # of four frames the first keeps 12 tokens, the others 8
        ("aim", {}, {}),
        ("aim", {"rounds": 1}, {}),
        ("aim", {}, {"keep": 0.25}),
        ("aim", {}, {"keep": 1.0}),
        ("average_pool", {}, {"keep": 0.25, "per": "frame"}),
        ("average_pool", {"stride": 2}, {"per": "frame"}),
        ("divprune", {}, {"keep": 0.3, "per": "frame"}),
        ("uniform", {}, {"keep": 5, "per": "frame"}),
        ("random", {"seed": 3}, {"keep": 0.1, "per": "frame"}),
        ("evs", {}, {"keep": 0.1, "per": "frame"}),
        ("prunevid", {}, {"keep": 0.5, "per": "frame"}),
    ],
)
def test_any_division_keeps_what_the_whole_video_keeps(
    parts: tuple[int, ...], method: str, options: dict[str, Any], stage: dict[str, Any]
) -> None:
    x = video(12)
    (whole,) = vtprune.select(x, method, grid=(12, H, W), **stage, **options)
    idx, features = joined(streamed(Stream(method, **stage, **options), x, parts))
    assert torch.equal(idx, whole.idx)
    assert torch.equal(features, whole.features)


@pytest.mark.parametrize("parts", [(11,), (1,) * 11, (3, 8), (5, 6)], ids=str)
@pytest.mark.parametrize("method", ["dycoke", "aim"])
def test_a_last_window_that_is_not_complete_comes_with_finish(method: str, parts: tuple[int, ...]) -> None:
    x = video(11)
    (whole,) = vtprune.select(x, method, grid=(11, H, W))
    found = streamed(Stream(method), x, parts)
    idx, features = joined(found)
    assert found[-1].n == (3 * P if method == "dycoke" else 0)
    assert torch.equal(idx, whole.idx)
    assert torch.equal(features, whole.features)


@pytest.mark.parametrize("keep", [None, 0.07, 0.3, 0.6])
@pytest.mark.parametrize("method", ["aim", "dycoke", "evs"])
def test_a_whole_video_in_one_part_is_what_select_keeps(method: str, keep: float | None) -> None:
    x = video(8)
    (whole,) = vtprune.select(x, method, keep=keep, grid=(8, H, W))
    part = Stream(method, keep=keep).push(x, (8, H, W))
    assert torch.equal(part.idx, whole.idx)
    assert torch.equal(part.features, whole.features)
    assert torch.equal(part.scores, whole.scores) if whole.scores is not None else part.scores is None
    assert part.notes == whole.notes


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_evs_compares_the_first_frame_of_a_part_with_the_last_before_it(keep: float) -> None:
    """A later part that repeats the last frame but in three places keeps these first, and nothing whole."""
    x = video(5)
    stream = Stream("evs", keep=keep)
    stream.push(x[: 3 * P], (3, H, W))
    again = x[2 * P : 3 * P].clone()
    again[[4, 9, 30]] = -again[[4, 9, 30]]
    part = stream.push(torch.cat([again, x[3 * P : 4 * P]]), (2, H, W))
    assert part.start == 3 * P
    assert len(part.idx) == round(keep * 2 * P)
    assert part.scores is not None
    assert part.scores[:P].topk(3).indices.sort().values.tolist() == [4, 9, 30]
    whole = vtprune.select(torch.cat([x[: 3 * P], again, x[3 * P : 4 * P]]), "evs", keep=keep, grid=(5, H, W))[0]
    assert whole.scores is not None
    assert torch.equal(part.scores, whole.scores[3 * P :])
    assert {4, 9, 30} & set(part.idx.tolist())
    one = stream.push(again, (1, H, W))  # a part of one frame is no still image
    assert one.notes == ()
    assert len(one.idx) == round(keep * P)


def test_evs_without_keep_keeps_the_first_frame_of_the_video_alone() -> None:
    x = video(8)
    found = streamed(Stream("evs"), x, (4, 2, 1, 1))
    assert set(range(P)) <= set(found[0].idx.tolist())
    assert [len(part.idx) for part in found] == [P, P // 2, P // 4, P // 4, 0]
    for part in found[1:-1]:
        assert part.scores is not None
        order = part.scores.sort(descending=True, stable=True).indices[: part.n // 4]
        assert torch.equal(part.idx, order.sort().values)


def test_a_frame_that_begins_a_last_group_of_dycoke_is_no_still_image() -> None:
    """With a budget the tokens least like the frame's own mean stay, as of every first frame, and not a lattice."""
    x = video(5)
    *_, last = streamed(Stream("dycoke", keep=0.25), x, (5,))
    frame = x[4 * P :]
    unlike = 1 - torch.cosine_similarity(frame, frame.mean(0, keepdim=True))
    assert last.idx.tolist() == unlike.topk(P // 4).indices.sort().values.tolist()


@pytest.mark.parametrize("method", ["dycoke", "evs"])
def test_a_buffer_may_be_filled_anew_for_every_part(method: str) -> None:
    x = video(12)
    stream, buffer, found = Stream(method, keep=0.25), torch.empty(3 * P, D), []
    for part in x.split(3 * P):
        found.append(stream.push(buffer.copy_(part), (3, H, W)))
    expected = joined(streamed(Stream(method, keep=0.25), x, (3, 3, 3, 3)))
    idx, features = joined([*found, stream.finish()])
    assert torch.equal(idx, expected[0])
    assert torch.equal(features, expected[1])


def test_what_a_method_reads_comes_in_parts_too() -> None:
    x, cls, keys = video(6), torch.rand(6 * P), torch.randn(6 * P, 4)
    stage = {"keep": 9, "per": "frame", "contextual": 3}
    (whole,) = vtprune.select(x, "visionzip", grid=(6, H, W), signals={"cls": cls, "mean_keys": keys}, **stage)
    idx, features = joined(streamed(Stream("visionzip", **stage), x, (1, 3, 2), cls=cls, mean_keys=keys))
    assert torch.equal(idx, whole.idx)
    assert torch.equal(features, whole.features)
    text = torch.randn(5, D)
    (whole,) = vtprune.select(x, "mmtok", keep=4, per="frame", grid=(6, H, W), text=text)
    idx, _ = joined(streamed(Stream("mmtok", keep=4, per="frame", text=text), x, (4, 2)))
    assert torch.equal(idx, whole.idx)


class Pairs(Method):
    """Of every two frames, the tokens of the highest "cls" signal, and a log of what it saw."""

    def __init__(self) -> None:
        self.log: list[Visual] = []

    @property
    def needs(self) -> tuple[vtprune.Signal, ...]:
        return (vtprune.Signal("cls", None),)

    @property
    def window(self) -> int | None:
        return 2

    def __call__(self, v: Visual) -> Assignment:
        self.log.append(v)
        assert v.budget is not None
        return Assignment(v.signals[self.needs[0]].topk(v.budget).indices.sort().values)


def test_a_rule_of_ones_own_streams_once_it_says_its_window() -> None:
    """Signals wait beside their frames; of the video only the frame before is held, in storage of its own."""
    x, cls = video(7), torch.rand(7 * P)
    rule = Pairs()
    found = streamed(Stream(rule, keep=1 / P), x, (3, 2, 2), cls=cls)
    assert [part.n // P for part in found] == [2, 2, 2, 1]
    assert [v.grid for v in rule.log] == [(2, H, W)] * 3 + [(1, H, W)]
    for number, (v, part) in enumerate(zip(rule.log, found, strict=True)):
        assert torch.equal(v.x, x[part.start : part.start + part.n])
        assert torch.equal(v.signals[rule.needs[0]], cls[part.start : part.start + part.n])
        if number:
            assert v.before is not None
            assert torch.equal(v.before, x[part.start - P : part.start])
            assert v.before.untyped_storage().nbytes() == P * D * 4
    assert rule.log[0].before is None
    assert all(v.video for v in rule.log)


def test_a_last_frame_that_is_not_finite_is_refused_although_all_of_it_stays() -> None:
    """No rule is asked about such a part, but the next one would be compared with its last frame."""
    x = video(2)
    stream = Stream("evs", keep=0.99)
    with pytest.raises(ValueError, match="NaN or Inf"):
        stream.push(torch.full((P, D), torch.inf), (1, H, W))
    assert torch.equal(stream.push(x[:P], (1, H, W)).features, x[:P])


def test_after_finish_another_video_begins() -> None:
    x = video(6)
    stream = Stream("evs", keep=0.3)
    first = streamed(stream, x, (6,))
    stream_of_halves = streamed(stream, x[: 4 * P], (4,))
    assert torch.equal(first[0].idx, vtprune.select(x, "evs", keep=0.3, grid=(6, H, W))[0].idx)
    assert torch.equal(stream_of_halves[0].idx, vtprune.select(x[: 4 * P], "evs", keep=0.3, grid=(4, H, W))[0].idx)
    assert stream.push(torch.randn(4, 5), (1, 2, 2)).start == 0  # frames of another kind are welcome then
    with pytest.raises(ValueError, match=r"finish\(\) without a push"):
        Stream("evs").finish()


BLANK = torch.zeros(2 * P, D)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(2 * P, D + 1)}, ValueError, r"frames of \(6, 6, 9, .*those before had \(6, 6, 8, "),
    ({"features": BLANK.half()}, ValueError, r"torch.float16, cpu\), .*torch.float32, cpu\)"),
    ({"grid": (2, 4, 9)}, ValueError, r"frames of \(4, 9, .*had \(6, 6, .*finish\(\) ends it"),
    ({"grid": (1, 6, 6)}, ValueError, r"grid=\(1, 6, 6\) .*has 36 tokens, but the image has 72"),
    ({"grid": None}, TypeError, r"grid is missing: pass \(t, h, w\)"),
    ({"features": [BLANK]}, TypeError, "the next frames of one video; each video has a Stream of its own"),
    ({"features": BLANK[None]}, ValueError, r"\[1, 72, 8\].*must be \[N, D\]"),
    ({"features": torch.full_like(BLANK, torch.nan)}, ValueError, "NaN or Inf"),
    ({"signals": {"cls": torch.rand(3)}}, ValueError, r"signal 'cls' of image 0 is \[3\]"),
    ({"signals": {"cls": torch.rand(2 * P)}}, ValueError, r"signals \['cls'\]: the frames that wait came with \[\]"),
]


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(("change", "error", "match"), BAD)
def test_a_bad_part_is_refused_and_leaves_the_stream_as_it_was(
    change: dict[str, Any], error: type[Exception], match: str, frames: int
) -> None:
    """Whether its frames complete a window (three wait) or would wait, too."""
    x = video(8)
    stream = Stream("dycoke", keep=0.25)
    waiting = 3 if frames == 2 else 1
    begun = [stream.push(x[: waiting * P], (waiting, H, W))]
    with pytest.raises(error, match=match):
        stream.push(**{"features": BLANK, "grid": (2, H, W), **change})
    rest = stream.push(x[waiting * P :], (8 - waiting, H, W))
    (whole,) = vtprune.select(x, "dycoke", keep=0.25, grid=(8, H, W))
    assert torch.equal(joined([*begun, rest, stream.finish()])[0], whole.idx)


REFUSED = [cls.name for cls in vtprune.methods() if cls.seam == "pre_llm" and not cls().window]


@pytest.mark.parametrize("method", REFUSED)
def test_rules_that_need_the_whole_video_are_refused_by_name(method: str) -> None:
    name = vtprune.create(method).resolved.name
    with pytest.raises(ValueError, match=rf"{name} chooses among .* whole video.*\(aim, dycoke, evs, .*per='frame'"):
        Stream(method, keep=0.5)


def test_video_rules_say_what_they_need() -> None:
    assert {"fastvid", "flashvid", "holitom", "prunevid", "vidcom2"} <= set(REFUSED)
    windows = {cls.name: cls().window for cls in vtprune.methods() if cls().window}
    assert windows == {"aim": 1, "dycoke": 4, "evs": 1}
    with pytest.raises(ValueError, match="dycoke chooses among"):
        Stream("dycoke", faithful=True)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"keep": 64}, ValueError, "evs: keep=64 counts tokens of the whole video.*a share in .0, 1.*per='frame'"),
        (
            {"method": Stage("llm", vtprune.create("evs"), keep_total=0.5)},
            ValueError,
            "evs: keep_total=0.5 is one for the whole video",
        ),
        ({"method": [Stage("llm", vtprune.create("evs"))] * 2}, ValueError, "2 stages: a later stage"),
        ({"method": "fastv", "keep": 0.5}, ValueError, "fastv acts inside a model"),
        ({"keep": 0.0}, ValueError, "keep=0.0 is outside"),
        ({"ratios": 0.5}, TypeError, "evs has no option 'ratios'"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], error: type[Exception], match: str) -> None:
    call = {"method": "evs", **given}
    with pytest.raises(error, match=match):
        Stream(call.pop("method"), **call)
