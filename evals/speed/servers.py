"""Servers that `vtprune bench --serve` measures: each a process of its own, started as users start it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from vtprune.recipe import Recipe

ENGINES = ("vtprune", "vllm")
PATIENCE = 900  # seconds until a server has loaded its model
GRACE = 30  # seconds in which it ends when it is told to


class Server:
    """A server under way at `url`."""

    def __init__(self, popen: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.popen, self.url, self._log = popen, url, log
        self._processes: list[psutil.Process] = []

    def find_children(self) -> None:
        """Look for its processes, which takes a while: those that `resident` counts from now on."""
        try:
            main = psutil.Process(self.popen.pid)
            self._processes = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            self._processes = []

    def resident(self) -> int:
        """Resident memory of its processes now, in bytes."""
        total = 0
        for process in self._processes:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total

    def last_words(self) -> str:
        """The end of what it has printed, to stand behind an error."""
        said = self._log.read_text(errors="replace").strip()
        return f"; it said: {said[-1500:]}" if said else ""

    def wait(self) -> None:
        """Return once it answers; ValueError if it ends before, or takes longer than `PATIENCE`."""
        for _ in range(PATIENCE):
            try:
                status = self.popen.wait(1)
            except subprocess.TimeoutExpired:
                if self._answers():
                    return
            else:
                raise ValueError(f"the server ended with status {status} before it answered{self.last_words()}")
        raise ValueError(f"the server does not answer after {PATIENCE} s{self.last_words()}")

    def _answers(self) -> bool:
        # A proxy that this machine uses does not reach its own loopback.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}/health", timeout=10):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def end(self) -> None:
        """Stop it and its children."""
        self.find_children()
        self.popen.terminate()
        _, left = psutil.wait_procs(self._processes, GRACE)
        for process in left:
            process.kill()
        self.popen.wait()


@contextmanager
def started(
    engine: str,
    model: str | None,
    recipe: Recipe,
    clients: int,
    device: str,
    dtype: str,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """A server that answers, on a free port of this machine; it is gone at the end.

    clients: how many requests may wait at once. arguments: go to its command line as they are.
    Raises ValueError for an engine that is unknown or not installed here, and for a server that does not come up.
    """
    check(engine, model)
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "recipe.json", Path(folder) / "log.txt"
        recipe.save(file)
        port = _free_port()
        if engine == "vllm":
            line = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype]
            line += ["--trust-request-mm-kwargs", "--mm-processor-kwargs", json.dumps({"vtprune": str(file)})]
        else:
            line = ["-m", "vtprune.cli", "serve", "--recipe", str(file), "--device", device, "--dtype", dtype]
            line += ["--max-waiting", str(clients), *(["--model", model] if model else [])]
        with log.open("wb") as into:
            popen = subprocess.Popen(
                [sys.executable, *line, "--host", "127.0.0.1", "--port", str(port), *arguments],
                stdout=into,
                stderr=subprocess.STDOUT,
            )
        server = Server(popen, f"http://127.0.0.1:{port}", log)
        try:
            server.wait()
            yield server
        finally:
            server.end()


def check(engine: str, model: str | None) -> None:
    """Raise ValueError for an engine that is unknown, not installed here, or that needs a model."""
    if engine not in ENGINES:
        raise ValueError(f"--serve {engine}: choose one of {', '.join(ENGINES)}")
    if engine == "vllm" and find_spec("vllm") is None:
        raise ValueError("--serve vllm: vLLM is not installed here: run this where it is (pip install 'vtprune[vllm]')")
    if engine == "vllm" and model is None:
        raise ValueError("--serve vllm: name a model with --model; the embedded toy is for --serve vtprune")


def version_of(module: str) -> str | None:
    """Version of the distribution that brings a module, as vLLM has several; None where none does."""
    found = packages_distributions().get(module)
    return version(found[0]) if found else None


def _free_port() -> int:
    """A port that is free now; the server takes it a moment later, as vLLM says nowhere which one it found."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
