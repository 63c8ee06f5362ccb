"""The application: its routes, its page, and who may ask."""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vtprune.integrations.serve.errors import RequestError
from vtprune.integrations.serve.limits import Limits
from vtprune.integrations.serve.model import ServedModel
from vtprune.integrations.serve.server import Server

# The page is one file: it loads nothing, and talks to this server alone.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(
    served: ServedModel, *, limits: Limits | None = None, api_key: str | None = None, hosts: Sequence[str] | None = None
) -> FastAPI:
    """The application that serves a model, which is loaded and patched by then.

    limits: what one request may ask for, the defaults of `Limits` for None. api_key: what clients have to send as
    `Authorization: Bearer KEY`, None for no key. hosts: the names that it may be called by, None for all; without a key
    they keep out web pages whose own name leads to this machine (DNS rebinding).

    All state belongs to the application, so a process can hold several. When it is shut down, its requests end, and the
    patch is taken off the model. Raises ValueError for an empty key.
    """
    if api_key is not None and not api_key.strip():
        raise ValueError("the API key is empty: give one, or none at all")
    server = Server(served, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await server.close()

    # Its own pages about the routes load scripts from elsewhere.
    app = FastAPI(title="vtprune", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _unknown)
    app.include_router(_open_routes(server))
    app.include_router(_guarded_routes(server), dependencies=[Depends(_Key(api_key))])
    return app


class _Key:
    """Refuses requests without the key."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    async def __call__(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in a time that does not depend on where they differ.
        same = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
        if scheme.lower() != "bearer" or not same:
            message = "this server wants an API key: send the header Authorization: Bearer KEY"
            raise RequestError(message, 401, code="invalid_api_key")


def _open_routes(server: Server) -> APIRouter:
    """What everybody may see, as it tells nothing of requests."""
    router = APIRouter()
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @router.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"})

    @router.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"} if server.open else {"status": "closing"}, 200 if server.open else 503)

    return router


def _guarded_routes(server: Server) -> APIRouter:
    router = APIRouter()
    model = {"id": server.served.name, "object": "model", "created": int(time.time()), "owned_by": "vtprune"}

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.chat(request)

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != model["id"]:
            message = f"the model {name!r:.200} is not served here: ask for {model['id']!r}"
            raise RequestError(message, 404, "model", "model_not_found")
        return JSONResponse(model)

    @router.get("/vtprune")
    async def status(request: Request, format: str | None = None) -> Response:
        wants_text = request.headers.get("accept", "").startswith(("text/plain", "application/openmetrics-text"))
        if format == "prometheus" or (format is None and wants_text):
            return _metrics(server)
        if format not in (None, "json"):
            raise RequestError(f"format={format!r:.40}: use json or prometheus", param="format")
        return JSONResponse(server.status.document())

    @router.get("/metrics")
    async def metrics() -> Response:
        return _metrics(server)

    return router


def _metrics(server: Server) -> Response:
    return PlainTextResponse(server.status.prometheus(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _refused(_: Request, error: Any) -> Response:
    return JSONResponse(error.document(), error.status, error.headers)


async def _unknown(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _refused(request, RequestError(message, error.status_code))
