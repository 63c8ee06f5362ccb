"""A real server on 127.0.0.1, a real client of it, and what a patched model answers by itself."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
import uvicorn
from PIL import Image

import vtprune
from vtprune.evals import models
from vtprune.integrations.serve import Limits, ServedModel, create_app
from vtprune.integrations.serve.run import bound, url_of

ENDLESS = {"logit_bias": {"2": -100}}  # the end token of the tiny models never comes


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def with_long_context(folder: Path) -> Path:
    """The checkpoint, whose answers may take minutes."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["max_position_embeddings"] = 1 << 20
    file.write_text(json.dumps(config))
    return folder


def data_url(content: Image.Image | bytes, kind: str = "image/png") -> str:
    if isinstance(content, Image.Image):
        buffer = io.BytesIO()
        content.save(buffer, "PNG")
        content = buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def message(text: str, images: Sequence[Any] = (), films: Sequence[bytes] = ()) -> dict[str, Any]:
    """A turn of the user; images may be pictures, bytes or addresses."""
    urls = [one if isinstance(one, str) else data_url(one) for one in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    parts += [{"type": "video_url", "video_url": {"url": data_url(film, "video/mp4")}} for film in films]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@dataclass
class Running:
    """A server under way."""

    url: str
    model: str
    served: ServedModel | None = None
    server: Any = None

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **options})

    def ask(self, text: str, images: Sequence[Any] = (), films: Sequence[bytes] = (), **options: Any) -> Any:
        """A whole answer; what is no field of OpenAI's goes into `extra_body`, and the ids of the answer come back."""
        extra = {"vtprune": {"show": True}, **options.pop("extra_body", {})}
        options = {"max_tokens": 8, "temperature": 0, **options}
        messages: Any = [message(text, images, films)]
        with self.client() as client:
            made = client.chat.completions.create(model=self.model, messages=messages, extra_body=extra, **options)
            return list(made) if options.get("stream") else made

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        return self.fetch(urllib.request.Request(self.url + path, headers=headers))

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        status, text = self.fetch(urllib.request.Request(self.url + path, data, headers))
        return status, json.loads(text)

    def fetch(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def status(self) -> dict[str, Any]:
        return json.loads(self.get("/vtprune")[1])

    def until(self, outcome: str, count: int = 1) -> dict[str, Any]:
        """The counters once so many requests had an outcome and nothing is in flight."""
        for _ in range(2000):
            status = self.status()
            if status["requests"]["by_outcome"].get(outcome, 0) >= count and not status["requests"]["in_flight"]:
                return status
        raise AssertionError(f"no {outcome}: {status}")


@contextmanager
def serving(served: ServedModel, limits: Limits | None = None, api_key: str | None = None) -> Iterator[Running]:
    """A server in a thread; it is closed, and its model unpatched, at the end."""
    app = create_app(served, limits=limits, api_key=api_key)
    opened = bound("127.0.0.1", 0, api_key is not None, False)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield Running(url_of(opened), served.name, served, app.state.server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


@dataclass
class Process:
    """`vtprune serve` under way, and what it has said."""

    running: Running
    popen: subprocess.Popen[str]
    lines: list[str]
    reader: threading.Thread

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """(exit status, all that it said) once a signal has ended it."""
        self.popen.send_signal(number)
        status = self.popen.wait(60)
        self.reader.join(60)
        return status, "".join(self.lines)


@contextmanager
def command(*arguments: str, model: str = "vtprune-toy") -> Iterator[Process]:
    """`vtprune serve` as users start it, at a free port, once it says where it is."""
    line = [sys.executable, "-m", "vtprune.cli", "serve", "--port", "0", *arguments]
    popen = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert popen.stdout is not None
    lines: list[str] = []
    try:
        while not (lines and "serves" in lines[-1]):
            lines.append(popen.stdout.readline())
            assert lines[-1], "".join(lines)
        url = lines[-1].split()[-1]
        # A pipe that nobody reads would stop it in the end.
        reader = threading.Thread(target=lines.extend, args=(popen.stdout,), daemon=True)
        reader.start()
        yield Process(Running(url, model), popen, lines, reader)
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait(60)


@dataclass
class Alone:
    """The same checkpoint without a server: its processor as transformers calls it, and `generate`."""

    folder: Path
    method: Any = "divprune"
    _loaded: Any = field(default=None, repr=False)

    def ids(
        self, text: str, images: Sequence[Any] = (), films: Sequence[Any] = (), *, keep: Any, new: int = 8
    ) -> list[int]:
        """Greedy tokens of the answer under a budget."""
        if self._loaded is None:
            self._loaded = models.load(str(self.folder), "cpu", "float32")
        model, processor = self._loaded
        content = [{"type": "image", "image": one} for one in images] + [{"type": "video"}] * len(films)
        turns = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        if films:
            words = processor.apply_chat_template(turns, add_generation_prompt=True)
            inputs = processor(
                text=words, videos=[f.frames for f in films], video_metadata=[f.metadata for f in films],
                do_sample_frames=False, return_tensors="pt",
            )  # fmt: skip
        else:
            inputs = processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        with vtprune.patch(model, self.method, keep=keep), torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        return made[0, inputs["input_ids"].shape[1] :].tolist()
