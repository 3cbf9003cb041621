"""POST /v1/realtime/client_secrets: a key for one page, for a while."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from covo_npu.serve.exchange import read_body
from covo_npu.serve.realtime.conversation import new_id
from covo_npu.serve.realtime.session import updated, usual
from covo_npu.serve.schema import Model, misread
from covo_npu.serve.security import MAX_SECRET
from covo_npu.serve.service import Service

MAX_BODY_BYTES = 4 * MAX_SECRET  # a secret holds its session, without the spaces


class ExpiresAfter(Model):
    """How long a secret may last, from its creation."""

    anchor: str = "created_at"
    seconds: int = Field(default=600, ge=10, le=7200)


class SecretRequest(Model):
    """What is asked for."""

    expires_after: ExpiresAfter = Field(default_factory=ExpiresAfter)
    session: dict[str, Any] = Field(default_factory=dict)


async def create_secret(request: Request) -> Response:
    """Answer with a secret, and the session that it opens."""
    service: Service = request.app.state.service
    try:
        body = await read_body(request, service.settings, MAX_BODY_BYTES)
        asked = SecretRequest.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise misread(error) from None
    settings = updated(usual(service, asked.session.get("model") or service.name), asked.session, service, "session")
    value, expires_at = service.secrets.issue(asked.expires_after.seconds, asked.session)
    session = settings.echo(new_id("sess"), expires_at)
    return JSONResponse({"value": value, "expires_at": expires_at, "session": session})
