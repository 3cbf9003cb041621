"""The process around the application: a socket, uvicorn, the worker's thread, and an orderly end."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from covo_npu.runtime.cli.console import Terminated
from covo_npu.serve.app import build
from covo_npu.serve.protocols import HttpProtocol, WebSocketProtocol
from covo_npu.serve.service import Service
from covo_npu.serve.settings import MIB
from covo_npu.serve.worker import FAILED

MAX_MESSAGE_BYTES = 16 * MIB  # of a websocket: OpenAI's clients may send 15 MiB
MAX_CONNECTIONS = 1024
KEEP_ALIVE_S = 30
CLOSING_S = 5  # that connections have to end after the replies have


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of a certificate and of its key, in PEM."""

    certificate: Path
    key: Path


class Server(uvicorn.Server):
    """uvicorn, with the worker's life around the connections' lives."""

    def __init__(self, service: Service, tls: Tls | None, on_ready: Callable[[], None]) -> None:
        files: dict[str, Any] = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key} if tls else {}
        super().__init__(
            uvicorn.Config(
                build(service),
                http=HttpProtocol,
                ws=WebSocketProtocol,
                loop="asyncio",  # which is there everywhere; uvloop is where something else brought it
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSING_S,
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_per_message_deflate=False,  # audio in base64 does not shrink enough for its time
                **files,
            )
        )
        self._service, self._on_ready = service, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen first: whoever asks whether the server is ready gets an answer while it warms up."""
        if self.config.ssl is not None:
            # A ticket is read while the client writes its first request. Python's blocking clients, OpenAI's realtime
            # one among them, do both from two threads, which OpenSSL does not allow: the request was lost at times.
            self.config.ssl.num_tickets = 0
        await super().startup(sockets)
        self._service.worker.start(self._worker_started)
        self._service.model.when_lost(self._lost)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let replies under way end first."""
        await self._service.drain(lambda: self.force_exit)
        await super().shutdown(sockets)

    def _lost(self, error: Exception) -> None:
        self._service.worker.lose(error)
        self.should_exit = True

    def _worker_started(self) -> None:
        if self._service.worker.state == FAILED:
            self.should_exit = True
            return
        try:
            self._on_ready()
        except Exception as error:  # noqa: BLE001 - raised by run(): nobody was told where the server is
            self._lost(error)


def run(service: Service, listener: socket.socket, tls: Tls | None, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let replies under way end.

    Raises what the warm-up raises, what on_ready raises, and RankError when a rank of the model is gone: replies under
    way end with an error.

    on_ready is called, in the worker's thread, when the first question would be answered.
    """
    server = Server(service, tls, on_ready)
    try:
        with contextlib.suppress(Terminated, KeyboardInterrupt):  # uvicorn raises the signal again when it has ended
            server.run(sockets=[listener])
    finally:
        service.close()
    if service.worker.fault is not None:
        raise service.worker.fault


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound and does not listen yet. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen at {host}:{port}: {error.strerror}") from None
    return listener


def is_local(listener: socket.socket) -> bool:
    """Whether only programs of this machine reach a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def address(listener: socket.socket, host: str, tls: Tls | None) -> str:
    """Return the address of the page."""
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
