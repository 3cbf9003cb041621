"""What a client is told when something does not work: OpenAI's error object, with its status and headers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.audio import AudioError
from covo_npu.runtime.engine import ContextError
from covo_npu.runtime.prompt import PromptError

log = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES: dict[type[CovoError], str] = {  # errors that the client's input caused
    AudioError: "invalid_audio",
    ContextError: "context_length_exceeded",
    PromptError: "invalid_value",
}
NO_RETRY = {"x-should-retry": "false"}  # clients of OpenAI try a 500 three times unless they are told not to


class ApiError(CovoError):
    """A request that is answered by an error object."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's name for errors of this status."""
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def object(self) -> dict[str, Any]:
        """The error object itself: message, type, param and code."""
        return {"message": str(self), "type": self.type, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """Return the answer that says so."""
        return JSONResponse({"error": self.object}, self.status, self.headers)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Return the error of a request that cannot be understood or done. param: what in it is meant."""
    return ApiError(400, message, code, param)


def unsupported(param: str, message: str) -> ApiError:
    """Return the error of a request for what this model cannot do."""
    return invalid(param, message, "unsupported_value")


def told(error: Exception, param: str | None = None) -> ApiError:
    """Return what a client is told of an error. One that its input did not cause is logged, and not described.

    param: what in the request it is about, if it is about the request.
    """
    if isinstance(error, ApiError):
        return error
    for kind, code in CODES.items():
        if isinstance(error, kind):
            return ApiError(400, str(error), code, param)
    log.error("a reply failed", exc_info=error)
    return ApiError(500, "the reply failed; the server's log says why", "reply_failed", headers=NO_RETRY)
