"""What the routes of one application share: the queue, the life of each request, the end of them all."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from vtprune.integrations.serve import body
from vtprune.integrations.serve.call import Call
from vtprune.integrations.serve.errors import RequestError, closing, gone, timed_out
from vtprune.integrations.serve.handler import ChatHandler, internal
from vtprune.integrations.serve.limits import Limits, read_json
from vtprune.integrations.serve.model import ServedModel
from vtprune.integrations.serve.status import Status

log = logging.getLogger("vtprune.serve")


class Server:
    """Serves one model. Lives in one event loop."""

    def __init__(self, served: ServedModel, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.status = Status(served.name, served.recipe)
        self.calls: dict[str, Call] = {}
        self.open = True
        self._running: set[asyncio.Future[Any]] = set()
        # One thread, as a tokenizer lends itself to one at a time.
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="vtprune-prompts")

    def prepare(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run a function on the thread that makes prompts."""
        return asyncio.get_running_loop().run_in_executor(self._maker, work)

    async def chat(self, request: Request) -> Response:
        """Answer one chat request. Raises RequestError.

        Its place in the queue is free again once nothing of it runs any more, also where nobody waits for it.
        """
        call = self._admit()
        try:
            asked = body.read(await self._body(request, call), self.served.name, self.served.recipe, self.limits)
        except BaseException as error:
            self._end(call, error)
            raise
        handler = ChatHandler(self.served, self.limits, self.prepare, call, asked)
        task = self._watched(asyncio.ensure_future(handler.answer()))
        task.add_done_callback(partial(self._answered, call, handler))
        client = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({task, client}, timeout=call.left, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the server stops to wait for it
            call.stop(closing())
            raise
        finally:
            client.cancel()
        if not task.done():
            call.stop(gone() if client.done() else timed_out(call.seconds))
            call.check()
        try:
            answer = task.result()
        except RequestError:
            raise
        except Exception as error:
            raise internal(call) from error
        answer.headers["X-Request-Id"] = call.id
        return answer

    def stop(self) -> None:
        """Accept nothing more, and let what runs end at its next token."""
        self.open = False
        for call in self.calls.values():
            call.stop(closing())

    async def close(self) -> None:
        """Stop, wait until nothing runs, and take the patch off the model."""
        self.stop()
        while self._running:
            await asyncio.wait(self._running)
        await asyncio.to_thread(self.served.shutdown)
        self._maker.shutdown()

    def _admit(self) -> Call:
        if not self.open:
            raise closing()
        if len(self.calls) > self.limits.waiting:
            self.status.count("busy")
            message = f"{len(self.calls)} requests are waiting or running: ask again in a while, or raise --max-waiting"
            raise RequestError(message, 503, code="busy")
        call = Call(f"chatcmpl-{uuid.uuid4().hex}", self.limits.seconds)
        self.calls[call.id] = call
        self.status.arrived()
        return call

    async def _body(self, request: Request, call: Call) -> dict[str, Any]:
        reading = read_json(request.headers, request.stream(), self.limits.body_bytes)
        try:
            return await asyncio.wait_for(reading, call.left)
        except asyncio.TimeoutError as error:
            raise timed_out(call.seconds) from error
        except ClientDisconnect as error:
            raise gone() from error

    def _watched(self, future: asyncio.Future[Any]) -> asyncio.Future[Any]:
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def _answered(self, call: Call, handler: ChatHandler, task: asyncio.Future[Any]) -> None:
        """The answer is there, or a stream has begun, whose generation goes on."""
        done = handler.generation.done
        if done is None or done.done():
            self._end(call, _error(task) or (_error(done) if done else None))
        else:
            self._watched(done).add_done_callback(lambda done: self._end(call, _error(done)))

    def _end(self, call: Call, error: BaseException | None) -> None:
        del self.calls[call.id]
        outcome = _outcome(error)
        self.status.ended(call, outcome)
        log.info("%s %s", outcome, call.line())
        if outcome == "internal_error":
            log.error("the request %s failed", call.id, exc_info=error)


def _outcome(error: BaseException | None) -> str:
    """How a request is counted."""
    if error is None:
        return "ok"
    if not isinstance(error, RequestError):
        return "internal_error"
    return "bad_request" if error.status < 499 else error.code or "internal_error"


def _error(future: asyncio.Future[Any]) -> BaseException | None:
    return asyncio.CancelledError() if future.cancelled() else future.exception()


async def _gone(request: Request) -> None:
    """Returns when the client closes the connection; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
