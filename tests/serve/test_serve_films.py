"""Films in a request: one, two, damaged, too large, and to a model that takes none."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import openai
import pytest
import serving
import torch
from serving import Alone, Running, picture

from vtprune.evals.video import read
from vtprune.integrations.serve import Limits, ServedModel

av = pytest.importorskip("av")


def film(seed: int, frames: int = 8, side: int = 32, form: str = "mp4", codec: str = "libx264") -> bytes:
    """A drifting picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, 2 * side, 3), dtype=np.uint8)
    target = io.BytesIO()
    with av.open(target, "w", format=form) as file:
        stream = file.add_stream(codec, rate=4)
        stream.width = stream.height = side
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:, i : i + side]), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return target.getvalue()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Alone]]:
    torch.manual_seed(0)
    folder = checkpoints.save("qwen2_5_vl", tmp_path_factory.mktemp("model") / "qwen2_5_vl")
    served = ServedModel(str(folder), "divprune", keep=0.5, name="tiny", device="cpu", dtype="float32")
    with serving.serving(served, Limits(video_frames=6, videos=2, pixels=20_000)) as running:
        yield running, Alone(folder)


@pytest.mark.parametrize("count", [1, 2])
def test_films_are_answered_as_by_generate(pair: tuple[Running, Alone], count: int) -> None:
    running, alone = pair
    films = [film(seed) for seed in range(count)]
    for budget, keep in (({}, 0.5), ({"keep_tokens": 3}, 3)):
        answer = running.ask("what?", films=films, extra_body={"mm_processor_kwargs": budget})
        expected = alone.ids("what?", films=[read(one, 6) for one in films], keep=keep)
        assert answer.vtprune["completion_token_ids"] == expected
        assert [unit["grid"][0] for unit in answer.vtprune["images"]] == [3] * count, "two frames make a time step"
        assert answer.usage.vtprune["visual_tokens"] > answer.usage.vtprune["visual_tokens_kept"] > 0


def test_a_film_beside_a_picture(pair: tuple[Running, Alone]) -> None:
    running, _ = pair
    answer = running.ask("what?", [picture(0)], [film(0)])
    assert sorted(unit["grid"][0] for unit in answer.vtprune["images"]) == [1, 3]


WHOLE = film(0)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"no film at all", "cannot be read as a video"),
        (WHOLE[: len(WHOLE) // 2], "video 2"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "video 2"),
        (b"ffconcat version 1.0\nfile a.mp4\n", "cannot be read as a video: it is none of"),
        (film(0, form="yuv4mpegpipe", codec="rawvideo"), "cannot be read as a video: it is none of"),
        (film(0, side=128), "6 frames of 128 x 128 pixels"),
    ],
    ids=["text", "cut off", "a playlist", "a list of files", "another container", "large"],
)
def test_bad_films_are_named(pair: tuple[Running, Alone], data: bytes, told: str) -> None:
    running, _ = pair
    with pytest.raises(openai.BadRequestError, match="video 2") as error:
        running.ask("what?", films=[WHOLE, data])
    assert told in str(error.value)
    assert running.ask("what?", films=[WHOLE])


def test_too_many_films(pair: tuple[Running, Alone]) -> None:
    running, _ = pair
    with pytest.raises(openai.BadRequestError, match="3 videos: a request may hold 2"):
        running.ask("what?", films=[WHOLE] * 3)


def test_a_film_from_a_file_is_refused(pair: tuple[Running, Alone], tmp_path: Path) -> None:
    running, _ = pair
    (tmp_path / "a.mp4").write_bytes(WHOLE)
    for url in (str(tmp_path / "a.mp4"), (tmp_path / "a.mp4").as_uri()):
        part: dict[str, Any] = {"type": "video_url", "video_url": {"url": url}}
        status, answer = running.post({"messages": [{"role": "user", "content": [part]}]})
        assert status == 400
        assert "files of the server are never read" in answer["error"]["message"]
