"""Who may ask, and where pictures may come from."""

from __future__ import annotations

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import checkpoints
import openai
import pytest
import serving
import torch
from serving import Running, data_url, picture

from vtprune.integrations.serve import Limits, ServedModel, create_app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return checkpoints.save("llava", tmp_path_factory.mktemp("model") / "llava")


def served(folder: Path) -> ServedModel:
    return ServedModel(str(folder), "divprune", keep=0.5, name="tiny", device="cpu", dtype="float32")


def test_a_key_guards_all_but_the_page_and_health(folder: Path) -> None:
    with serving.serving(served(folder), api_key="sésame") as running:
        assert running.get("/health")[0] == running.get("/")[0] == 200
        for path in ("/v1/models", "/vtprune", "/metrics"):
            assert running.get(path)[0] == 401
            assert running.get(path, Authorization="Bearer other")[0] == 401
            assert running.get(path, Authorization="sésame".encode().decode("latin-1"))[0] == 401
        assert running.post(b"no JSON at all")[0] == 401, "nothing is read without the key"
        good = "Bearer " + "sésame".encode().decode("latin-1")
        assert running.get("/vtprune", Authorization=good)[0] == 200
    with pytest.raises(ValueError, match="key is empty"):
        create_app(served(folder), api_key=" ")


class Pictures(BaseHTTPRequestHandler):
    """A site with a picture, one that is too long, and ways to elsewhere."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        data = base64.b64decode(data_url(picture(0)).partition(",")[2])
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        self.wfile.write(data + b"x" * (100_000 if self.path == "/long" else 0))

    def log_message(self, *_: Any) -> None:
        pass


def test_remote_pictures_where_they_are_allowed(folder: Path) -> None:
    with serving.serving(served(folder), Limits(remote_urls=True, body_bytes=50_000)) as running:
        ask_for_remote_pictures(running)


def ask_for_remote_pictures(running: Running) -> None:
    site = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=site.serve_forever).start()
    url = f"http://127.0.0.1:{site.server_port}"
    try:
        answer = running.ask("what?", [f"{url}/a.png"])
        assert answer.vtprune == running.ask("what?", [picture(0)]).vtprune
        assert running.ask("what?", [f"{url}/to/{url}/a.png"]).vtprune == answer.vtprune
        for path, told in (("long", "longer than"), ("missing", "404"), ("to/file:///etc/passwd", "cannot be fetched")):
            with pytest.raises(openai.APIStatusError, match=told):
                running.ask("what?", [f"{url}/{path}"])
    finally:
        site.shutdown()
        site.server_close()
