"""What is answered to a request that is not served, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A refusal: an HTTP status, a sentence that names the way out, the field at fault and a code for programs."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def headers(self) -> dict[str, str]:
        """How long to wait where waiting helps; and no second try, which OpenAI's client makes, where it does not."""
        if self.status == 503:
            return {"Retry-After": "1"}
        return {"X-Should-Retry": "false"}

    def document(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Stopped(RequestError):
    """A request that ended before its answer was there: its time was over, its client gone, or the server stops."""


def timed_out(seconds: float) -> Stopped:
    """The time that a request may take is over."""
    message = f"the request took longer than {seconds:g} s: ask for fewer tokens, or raise --timeout"
    return Stopped(message, 504, code="timeout")


def gone() -> Stopped:
    """The client closed the connection; nobody reads this. 499 is what proxies log for it."""
    return Stopped("the client closed the connection", 499, code="cancelled")


def closing() -> Stopped:
    """The server shuts down."""
    return Stopped("the server is shutting down: ask again in a while", 503, code="shutting_down")
