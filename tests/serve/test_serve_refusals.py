"""What is refused: each with a status, a sentence and OpenAI's shape; and the server answers on as before."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import serving
from PIL import Image, PngImagePlugin
from serving import Running, data_url, message, picture

from vtprune.integrations.serve import Limits, ServedModel
from vtprune.integrations.serve.body import read

LIMITS = Limits(images=3, pixels=250_000, body_bytes=300_000, new_tokens=64)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving.serving(ServedModel(None, "divprune", keep=0.25), LIMITS) as one:
        yield one


@pytest.fixture(autouse=True)
def _answers_on(running: Running) -> Iterator[None]:
    yield
    answer = running.ask("what shape is there ?", [picture(1, 64, 64)])
    assert answer.usage.vtprune["visual_tokens_kept"] == 64


def asked(running: Running, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": running.model, "messages": [message("how many ?", [picture(0, 64, 64)])], "max_tokens": 4}
    status, answer = running.post(body | fields)
    if status != 200:
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
        return status, answer["error"]
    return status, answer


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"keep_ratio": 0}, "keep_ratio=0 is outside the valid range"),
        ({"keep_ratio": -0.5}, "outside the valid range"),
        ({"keep_ratio": 1.5}, "outside the valid range"),
        ({"keep_ratio": float("nan")}, "keep_ratio=nan is outside"),
        ({"keep_ratio": float("inf")}, "keep_ratio=inf is outside"),
        ({"keep_ratio": "0.5"}, "is a str"),
        ({"keep_ratio": True}, "is a bool"),
        ({"keep_tokens": 0}, "keep_tokens=0 is outside"),
        ({"keep_tokens": 2.0}, "is a float"),
        ({"keep_tokens": False}, "is a bool"),
        ({"keep_tokens": [4]}, "is a list"),
        ({"keep_ratio": 0.5, "keep_tokens": 8}, "name one"),
        ({"keep": 0.5}, "'keep': use keep_ratio or keep_tokens"),
        ({"keep_ratio": 0.5, "min_pixels": 4}, "'min_pixels'"),
        ("0.5", "is no dict"),
    ],
)
def test_budgets(running: Running, budget: Any, told: str) -> None:
    status, error = asked(running, mm_processor_kwargs=budget)
    assert status == 400
    assert error["param"] == "mm_processor_kwargs"
    assert told in error["message"]


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"model": "gpt-4o"}, 404, "ask for 'vtprune-toy'"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": "hello"}, 400, "a list"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "is a int"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "'input_audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:x"}]}]}, 400, "'url'"),
        ({"messages": [{"role": "user", "content": "<image> what ?"}]}, 400, "'<image>'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, 400, "KeyError"),
        ({"messages": [message("what ?", [picture(0)] * 4)]}, 400, "4 images"),
        ({"messages": [message("what ?", films=[b"film"])]}, 400, "takes no videos"),
        ({"max_tokens": 0}, 400, "max_tokens=0"),
        ({"max_tokens": 65}, 400, "at most 64"),
        ({"max_completion_tokens": 1000}, 400, "max_completion_tokens=1000"),
        ({"max_tokens": "4"}, 400, "max_tokens='4'"),
        ({"temperature": -1}, 400, "temperature=-1"),
        ({"temperature": float("nan")}, 400, "temperature=nan"),
        ({"top_p": 0}, 400, "top_p=0"),
        ({"seed": 2**70}, 400, "seed="),
        ({"n": 2}, 400, "n=2: nothing but 1 is served"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"generation_config": "{}"}, 400, "generation_config"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"stop": [""]}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream='yes' is no bool"),
        ({"vtprune": {"draw": True}}, 400, "'show'"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, 400, "cannot be set"),
        ({"chat_template_kwargs": {"images": [1]}}, 400, "is a list"),
        ({"prompt": "hello"}, 400, "'prompt'"),
    ],
)
def test_fields(running: Running, fields: dict[str, Any], status: int, told: str) -> None:
    found, error = asked(running, **fields)
    assert (found, told in error["message"]) == (status, True), error["message"]


def test_fields_that_change_nothing_are_taken(running: Running) -> None:
    same = {"n": 1, "logprobs": False, "user": "me", "metadata": {"a": "b"}, "response_format": {"type": "text"}}
    assert asked(running, **same, tool_choice="auto", presence_penalty=0, seed=1)[0] == 200


def png(width: int, height: int) -> bytes:
    """A picture whose header announces a size, and that holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


WHOLE = bomb(64)
PICTURES: dict[str, tuple[str, str]] = {
    "no picture": (data_url(b"hello, this is text"), "cannot be read as a picture"),
    "cut off": (data_url(WHOLE[: len(WHOLE) // 2]), "cannot be read as a picture"),
    "an SVG": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot be read as a picture"),
    "a PostScript file": (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), "cannot be read"),
    "of two frames": (data_url(gif()), "holds 2 frames"),
    "too many pixels": (data_url(bomb(600)), "600 x 600 pixels"),
    "of a header that lies": (data_url(png(400, 400)), "cannot be read as a picture"),
    "one too many": (data_url(bomb(499)), "499 x 499 pixels, and a request may have 250000 in all"),
    "a bomb": (data_url(png(30_000, 30_000)), "pixels"),
    "no base64": ("data:image/png;base64,????", "no valid base64"),
    "percent-encoded": ("data:image/png,%89PNG", "is not base64"),
    "empty": ("data:image/png;base64,", "0 bytes"),
    "a file": ("file:///etc/passwd", "files of the server are never read"),
    "a path": ("/etc/passwd", "files of the server are never read"),
    "bare base64": (base64.b64encode(WHOLE).decode(), "is no data URL"),
    "remote": ("http://127.0.0.1:1/a.png", "--allow-remote-urls"),
    "remote in capitals": ("HTTPS://example.org/a.png", "--allow-remote-urls"),
    "FTP": ("ftp://127.0.0.1/a.png", "is no data URL"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(running: Running, kind: str) -> None:
    url, told = PICTURES[kind]
    status, error = asked(running, messages=[message("what ?", [picture(0), url])])
    assert status == 400
    assert error["message"].startswith("image 2")
    assert told in error["message"]


def test_a_bomb_is_refused_before_it_is_decoded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels are never asked for."""
    decoded = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda self: decoded.append(self.size))
    status, error = asked(running, messages=[message("what ?", [bomb(600)])])
    assert (status, error["code"]) == (400, "too_many_pixels")
    assert not decoded
    asked(running, messages=[message("what ?", [bomb(64)])])
    assert decoded == [(64, 64)], "the test sees what is decoded"
    monkeypatch.undo()


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_long_bodies(running: Running, announced: bool) -> None:
    import http.client

    data = json.dumps({"messages": [message("x" * LIMITS.body_bytes)]}).encode()
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
    headers = {"Content-Type": "application/json"}
    pieces: Any = data if announced else iter([data[i : i + 4096] for i in range(0, len(data), 4096)])
    try:
        connection.request("POST", "/v1/chat/completions", pieces, headers, encode_chunked=not announced)
        answer = connection.getresponse()
    except (BrokenPipeError, ConnectionResetError):  # it did not read on
        answer = connection.getresponse()
    assert answer.status == 413
    assert str(LIMITS.body_bytes) in json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize(
    ("data", "told"),
    [(b"{", "no JSON"), (b"[1]", "a JSON list"), (b"\xff\xfe", "no JSON"), (b"[" * 100_000, "no JSON")],
)
def test_bodies_that_are_no_object(running: Running, data: bytes, told: str) -> None:
    status, answer = running.post(data)
    assert status == 400
    assert told in answer["error"]["message"]


def test_a_form_of_a_foreign_page_is_refused(running: Running) -> None:
    """Browsers send text/plain across origins without asking first."""
    status, answer = running.post({"messages": [message("hello")]}, Content_Type="text/plain")
    assert status == 415
    assert "application/json" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/docs", "/openapi.json", "/load_model", "/nothing"])
def test_other_paths_do_not_exist(running: Running, path: str) -> None:
    status, answer = running.post({}, path)
    assert status == 404
    assert path in answer["error"]["message"]


def test_a_method_that_a_path_has_not(running: Running) -> None:
    status, text = running.get("/v1/chat/completions")
    assert status == 405
    assert "error" in json.loads(text)


def test_a_prompt_longer_than_the_context(running: Running) -> None:
    status, error = asked(running, messages=[message("what " * 5000)])
    assert status == 400
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]


@pytest.mark.parametrize("name", ["new_tokens", "images", "seconds", "body_bytes"])
def test_limits_below_their_least(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: -1})


def test_what_is_read_of_a_request(running: Running) -> None:
    assert running.served is not None
    body = {"messages": [{"role": "user", "content": "hi"}], "seed": 3, "user": "me", "n": 1, "stream": True}
    made = read(body, "vtprune-toy", running.served.recipe, LIMITS)
    assert made.fields.keys() == {"messages", "stream"}
    assert (made.seed, made.stream, made.show, made.new_tokens) == (3, True, False, None)
