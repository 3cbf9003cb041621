"""One exchange over HTTP: a body within limits, events as they come, and an eye on whether the client is there."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Send

from covo_npu.serve.errors import ApiError
from covo_npu.serve.settings import Settings

EVENT_STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
UNBUFFERED = (b"x-accel-buffering", b"no")  # what nginx wants to hear before it passes events on at once


class ClientGoneError(Exception):
    """Nobody is there any more to hear the answer."""


async def read_body(request: Request, settings: Settings, max_bytes: int | None = None) -> bytes:
    """Return the body of a request. Raises ApiError if it is too long or comes too slowly, ClientGoneError.

    max_bytes: where fewer will do than the settings allow.
    """
    limit = min(settings.max_body_bytes, max_bytes or settings.max_body_bytes)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_long(limit)
    body = bytearray()
    try:
        await asyncio.wait_for(_collect(request, body, limit, settings.body_idle_s), settings.body_s)
    except asyncio.TimeoutError:
        message = f"the request did not arrive in time: {len(body)} bytes came"
        raise ApiError(408, message, "request_timeout", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return bytes(body)


async def _collect(request: Request, body: bytearray, limit: int, idle_s: float) -> None:
    pieces = request.stream()
    with contextlib.suppress(StopAsyncIteration):
        while True:
            body += await asyncio.wait_for(pieces.__anext__(), idle_s)
            if len(body) > limit:
                raise _too_long(limit)


def _too_long(limit: int) -> ApiError:
    message = f"the request is longer than {limit} bytes; say less, or send audio as flac or mp3"
    return ApiError(413, message, "request_too_large", headers={"connection": "close"})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do work for a client whose request has been read; end it when the client goes away. Raises what work raises."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_events(send: Send, events: AsyncIterator[dict[str, Any] | ApiError]) -> None:
    """Answer by server-sent events: JSON objects to the last one, then [DONE]; an error is the last event.

    The answer begins with the first event: whatever is raised before is still answered with a status of its own.
    """
    begun = False
    async for event in events:
        if not begun:
            await send({"type": "http.response.start", "status": 200, "headers": [*EVENT_STREAM, UNBUFFERED]})
            begun = True
        if isinstance(event, ApiError):
            await send(_body(_line({"error": event.object}), more=False))
            return
        await send(_body(_line(event), more=True))
    await send(_body(b"data: [DONE]\n\n", more=False))


def _line(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
