"""The application: which address answers what, and what every request passes on its way."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from covo_npu.serve import openai
from covo_npu.serve.access import Access
from covo_npu.serve.errors import ApiError
from covo_npu.serve.realtime.connection import Realtime
from covo_npu.serve.realtime.secrets import create_secret
from covo_npu.serve.security import Gate
from covo_npu.serve.service import Service
from covo_npu.serve.worker import FAILED, READY

PAGE = Path(__file__).with_name("page")
PAGE_HEADERS = {  # the page runs what lies beside it, and nothing else; no other page may frame it
    "content-security-policy": "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "permissions-policy": "microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked again after an update: its files belong together
}


def build(service: Service) -> Starlette:
    """Return the application of a service."""
    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/v1/models", openai.list_models),
        Route("/v1/models/{name:path}", openai.show_model),
        Route("/v1/chat/completions", openai.ChatCompletions(service), methods=["POST"]),
        Route("/v1/realtime/client_secrets", create_secret, methods=["POST"]),
        WebSocketRoute("/v1/realtime", Realtime(service)),
        Route("/v1/audio/speech", openai.speech, methods=["POST"]),
        Route("/v1/{path:path}", nothing, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        Mount("/", Page(directory=PAGE, html=True)),
    ]
    settings = service.settings
    paths = frozenset(route.path for route in routes if isinstance(route, Route | WebSocketRoute))
    middleware = [Middleware(Access, metrics=service.metrics, paths=paths)]
    if settings.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    middleware.append(Middleware(Gate, settings=settings, known=service.secrets))
    handlers = {ApiError: _api_error, HTTPException: _http_error}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)  # type: ignore[arg-type]
    app.state.service = service
    return app


class Page(StaticFiles):
    """The files of the page."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in PAGE_HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await super().__call__(scope, receive, guarded)


async def health(request: Request) -> Response:
    """GET /health: 200 while the engine lives; an orchestrator that sees 503 should start the server anew."""
    worker = request.app.state.service.worker
    return JSONResponse({"status": worker.state}, 503 if worker.state == FAILED else 200)


async def ready(request: Request) -> Response:
    """GET /ready: 200 if a question would be taken now."""
    worker = request.app.state.service.worker
    status = "full" if worker.state == READY and worker.full else worker.state
    return JSONResponse({"status": status}, 200 if status == READY else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def nothing(request: Request) -> Response:
    """Any other part of OpenAI's interface."""
    raise ApiError(404, f"there is no {request.method} {request.url.path} here", "not_found")


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{error.detail}: {request.method} {request.url.path}"
    code = "not_found" if error.status_code == 404 else None
    return await _api_error(request, ApiError(error.status_code, message, code, headers=error.headers))
