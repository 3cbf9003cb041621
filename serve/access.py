"""A line in the log and a number in the metrics for every request, and the id by which a client may ask about it."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from covo_npu.serve.errors import NO_RETRY, ApiError
from covo_npu.serve.logs import REQUEST_ID
from covo_npu.serve.metrics import Metrics

log = logging.getLogger(__name__)

ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
GONE = 499  # what is logged of a client that left before its answer; nginx's number
QUIET = ("/health", "/ready", "/metrics")  # asked every few seconds, logged only if they fail


class Access:
    """Tells of every request when it is over. paths: those that the metrics tell apart."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if ACCEPTABLE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        status, started = GONE, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.close" and status == GONE:
                status = 403  # what a server makes of it before it has accepted
            await send(message)

        REQUEST_ID.set(request_id)  # for good: whoever runs this task logs its faults
        try:
            await self._app(scope, receive, watched)
        except Exception:
            if scope["type"] == "http" and status == GONE:
                fault = ApiError(500, "the server has a fault; its log says more", headers=NO_RETRY)
                await fault.response()(scope, receive, watched)
            status = 500
            raise
        finally:
            self._tell(scope, status, time.monotonic() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        path = get_route_path(scope)
        self._metrics.http.labels(path if path in self._paths else "other", str(status)).inc()
        if path in QUIET and status < 400:
            return
        method = scope.get("method", "WEBSOCKET")
        raw = scope["raw_path"].decode("ascii", "replace")  # as it was sent: still quoted, so on one line
        client = (scope.get("client") or ("-",))[0]
        fields = {"method": method, "path": raw, "status": status, "seconds": round(seconds, 4), "client": client}
        log.info("%s %s %s %d in %.3f s", client, method, raw, status, seconds, extra=fields)
