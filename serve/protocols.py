"""uvicorn's protocols with what they lack against clients that do not move: deadlines for headers and for readers."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

HEADERS_S = 10.0  # how long the first line and the headers of a request may take
STALL_S = 30.0  # how long a reader may take nothing of what waits for it


class _Timer:
    """A call in a while, unless it is stopped before."""

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, call: Any) -> None:
        """Begin, if it does not run yet."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(seconds, self._fire, call)

    def stop(self) -> None:
        """Call nothing."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self, call: Any) -> None:
        self._handle = None
        call()


class _ReaderWatch(asyncio.Protocol):
    """Cuts a connection off whose buffer is full and does not shrink."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stalled, self._unread_bytes = _Timer(), 0
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stalled.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._stalled.start(STALL_S, self._look)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled.stop()
        super().resume_writing()

    def _look(self) -> None:
        before, self._unread_bytes = self._unread_bytes, self.transport.get_write_buffer_size()
        if self._unread_bytes < before:
            self._stalled.start(STALL_S, self._look)
        else:
            self.transport.abort()


class HttpProtocol(_ReaderWatch, H11Protocol):
    """HTTP/1.1 whose connections end when headers take too long, or when nobody reads the answer."""

    def connection_made(self, transport: Any) -> None:
        self._late = _Timer()
        self._late.start(HEADERS_S, transport.abort)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._late.start(HEADERS_S, self.transport.abort)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._late.stop()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._late.stop()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.stop()
        super().connection_lost(exc)


class WebSocketProtocol(_ReaderWatch, WebSocketsSansIOProtocol):
    """Websockets whose connections end when nobody reads what is sent."""
