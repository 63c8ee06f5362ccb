"""How much one request may ask for, and how a body is read without holding more of it than that."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vtprune.integrations.serve.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """What a request may bring and ask for; ValueError for a limit below 1.

    body_bytes: bytes of a request's body, pictures and films included. images, videos: of one request.
    pixels: of all pictures and frames of a request together, read from their headers before anything is decoded; each
    takes three bytes of memory. video_frames: frames taken of a film. new_tokens: tokens to generate.
    seconds: from arrival to the last token. waiting: requests that wait while one is generated; further ones are
    refused with 503. remote_urls: fetch pictures and films from http(s) addresses, any that this machine reaches; files
    are never read.
    """

    body_bytes: int = 32 << 20
    images: int = 16
    pixels: int = 128_000_000
    videos: int = 4
    video_frames: int = 32
    new_tokens: int = 2048
    seconds: float = 300.0
    waiting: int = 32
    remote_urls: bool = False

    def __post_init__(self) -> None:
        least = {"images": 0, "videos": 0, "waiting": 0, "seconds": 0.001}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "remote_urls" and not value >= least.get(field.name, 1):
                raise ValueError(f"the limit {field.name}={value!r} must be at least {least.get(field.name, 1)}")


async def read_json(headers: Mapping[str, str], chunks: AsyncIterator[bytes], most: int) -> dict[str, Any]:
    """The JSON object in a body of at most `most` bytes, whether its length is announced or not.

    Raises RequestError: 415 for another content type, which browsers send from foreign pages without asking first, 413
    for a longer body, 400 for anything but one JSON object.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("send the request as JSON, with the header Content-Type: application/json", 415)
    announced = headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > most:
        raise _too_long(most)
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > most:
            raise _too_long(most)
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:  # text that is no UTF-8 is a ValueError, too
        raise RequestError(f"the body is no JSON: {error!s:.200}") from error
    if not isinstance(document, dict):
        raise RequestError(f"the body is a JSON {type(document).__name__}: send an object")
    return document


def _too_long(most: int) -> RequestError:
    message = f"the body is longer than {most} bytes: send smaller pictures or films, or raise --max-body-bytes"
    return RequestError(message, 413, code="body_too_large")
