"""An application at an address of this machine, until a signal ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

LAST_TOKEN = 10  # seconds in which a request that was stopped comes to its next token, and its answer to the client


def key_of(key: str | None, file: Path | None) -> str | None:
    """The API key that was given, or the one that a file holds. Raises ValueError where there is none in it."""
    if key is not None and file is not None:
        raise ValueError("--api-key and --api-key-file: give one of them")
    found = key if file is None else file.read_text(encoding="utf-8").strip()
    if found is not None and not found.strip():
        raise ValueError(f"--api-key{'' if file is None else f'-file {file}'}: the key is empty")
    return found


def bound(host: str, port: int, has_key: bool, anyone: bool) -> socket.socket:
    """A socket at the address, which nobody can connect to before the server listens; port 0 takes a free one.

    Raises ValueError for an address that other machines reach, unless there is a key or `anyone` may ask.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host}: no such address ({error})") from error
    if not ipaddress.ip_address(address[0]).is_loopback and not has_key and not anyone:
        raise ValueError(
            f"--host {host}: other machines reach this address, and no API key is set: give --api-key-file, or say "
            "--allow-anyone"
        )
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise ValueError(f"--port {port}: {host} cannot listen there ({error.strerror}): choose another one") from error
    return opened


def own_names(opened: socket.socket) -> list[str] | None:
    """The names of a socket that only this machine reaches; None for one that others reach, under whatever name."""
    address = opened.getsockname()[0]
    if not ipaddress.ip_address(address).is_loopback:
        return None
    return ["localhost", address, f"[{address}]"]


def url_of(opened: socket.socket) -> str:
    """Where a client finds it."""
    host, port = opened.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """Tells when it listens, and lets requests that take longer than the grace end with an error of their own."""

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], late: Callable[[], None], grace: float
    ) -> None:
        super().__init__(config)
        self._ready, self._late, self._grace = ready, late, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self._grace, self._late)
        await super().shutdown(sockets)
        timer.cancel()


def run(app: FastAPI, opened: socket.socket, ready: Callable[[], None], grace: float, log_level: str = "info") -> None:
    """Serve until SIGINT or SIGTERM; requests that run then have `grace` seconds to end. Returns when all is closed.

    ready: called once clients can connect.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("vtprune.serve").setLevel(log_level.upper())
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=math.ceil(grace) + LAST_TOKEN,
    )  # fmt: skip
    # uvicorn repeats the signal when it has ended, for handlers that stood there before: it has done its work by then.
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    try:
        _Server(config, ready, app.state.server.stop, grace).run(sockets=[opened])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
