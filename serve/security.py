"""Who may use the server: keys, short-lived secrets, and which pages a browser lets in.

Without keys a server only answers under the names of its own machine: else any page could reach it by a name of its
own that points here. A page of another server is refused wherever its browser says so, for websockets above all,
which no rule of the browser keeps from here.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from covo_npu.serve.errors import ApiError, invalid
from covo_npu.serve.settings import Settings

KEYED = "/v1/"  # paths that need a key, if there are any
REALTIME = "/v1/realtime"
KEY_PROTOCOL = "openai-insecure-api-key."  # browsers cannot send headers with a websocket, but subprotocols
DEFAULT_PORTS = (":80", ":443")
SECRET = "ek_"  # what begins so is a secret, as at OpenAI
CARRIED = TypeAdapter(tuple[int, str, dict[str, Any]])  # by a secret: its expiry, what makes it unique, the session
MAX_SECRET = 4096  # characters: servers take 8 kB of a header


class Secrets:
    """Secrets that stand in for a key, for realtime sessions only and for a while.

    A secret carries what it opens, signed: every server with the same keys knows it, and none has to remember it.
    """

    def __init__(self, api_keys: Iterable[str], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Slow on purpose: whoever is given a secret could try keys on it.
        text = "\0".join(sorted(api_keys)).encode()
        self._key = hashlib.scrypt(text, salt=b"covo realtime secrets", n=1 << 14, r=8, p=1, dklen=32)

    def issue(self, seconds: float, session: dict[str, Any]) -> tuple[str, int]:
        """Return a new secret and when it expires, in seconds of the epoch. Raises ApiError for too long a session."""
        expires = int(self._clock() + seconds)
        body = _to_text(json.dumps([expires, secrets.token_hex(8), session], separators=(",", ":")).encode())
        value = f"{SECRET}{body}.{_to_text(self._signature(body))}"
        if len(value) > MAX_SECRET:
            raise invalid(
                "session", f"a secret of {len(value)} characters is longer than {MAX_SECRET}: say less of the session"
            )
        return value, expires

    def session(self, value: bytes) -> dict[str, Any] | None:
        """Return the session that a secret was issued for, None if it is none of ours or has expired."""
        body, _, signature = value.decode("ascii", "replace").removeprefix(SECRET).partition(".")
        if not hmac.compare_digest(_to_text(self._signature(body)).encode(), signature.encode()):
            return None
        try:
            expires, _, session = CARRIED.validate_json(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        except ValueError:  # without keys anybody can sign
            return None
        return session if expires > self._clock() else None

    def _signature(self, body: str) -> bytes:
        return hmac.digest(self._key, body.encode(), "sha256")


class Gate:
    """Lets requests pass that may, and refuses the others. A secret's session is in the scope then, `covo.session`."""

    def __init__(self, app: ASGIApp, settings: Settings, known: Secrets) -> None:
        self._app, self._secrets = app, known
        self._keys = [_digest(key.encode()) for key in settings.api_keys]
        self._origins = settings.origins
        self._any_host = settings.trusted or bool(settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._examine(scope)
            except ApiError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _examine(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._any_host and not _is_loopback(host):
            message = f"this server answers as localhost only, not as {host!r}; start it with --api-key or --insecure"
            raise ApiError(403, message, "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin, host):
            message = f"pages of {origin!r} may not use this server; start it with --allow-origin to let them"
            raise ApiError(403, message, "origin_not_allowed")
        if get_route_path(scope).startswith(KEYED):  # without the prefix under which Ray may have mounted this
            self._authenticate(scope, headers)

    def _is_allowed(self, origin: str, host: str) -> bool:
        return "*" in self._origins or origin in self._origins or _netloc(origin) == _without_port(host.lower())

    def _authenticate(self, scope: Scope, headers: Headers) -> None:
        given = _given(scope, headers)
        if get_route_path(scope) == REALTIME and given is not None:
            session = self._secrets.session(given)
            if session is not None:
                scope["covo.session"] = session
                return
        if not self._keys:
            return
        if given is None:
            raise ApiError(401, "no API key: send the header 'Authorization: Bearer KEY'", "missing_api_key")
        digest = _digest(given)
        if True not in [hmac.compare_digest(digest, key) for key in self._keys]:  # all of them: no time tells which
            raise ApiError(401, "the API key is not one of this server's", "invalid_api_key")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or the handshake of a websocket, by an error object."""
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        send = _as_denial(send)
    await error.response()(scope, receive, send)


def _as_denial(send: Send) -> Send:
    async def denied(message: Any) -> None:
        if not message["type"].startswith("websocket."):
            message = {**message, "type": f"websocket.{message['type']}"}
        await send(message)

    return denied


def _given(scope: Scope, headers: Headers) -> bytes | None:
    """Return the key that a request brings, None without one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip().encode("latin-1", "replace")
    protocols: Iterable[str] = scope.get("subprotocols", ())
    return next((p[len(KEY_PROTOCOL) :].encode() for p in protocols if p.startswith(KEY_PROTOCOL)), None)


def _to_text(data: bytes) -> str:
    """Return base64 of the characters that a subprotocol may have."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or "" if "@" not in host else ""
        return name == "localhost" or name.endswith(".localhost") or ipaddress.ip_address(name).is_loopback
    except ValueError:  # a bracket that is none of an address, or a name that is no address
        return False


def _netloc(origin: str) -> str:
    try:
        return _without_port(urlsplit(origin).netloc.lower())
    except ValueError:  # a bracket that is none of an address
        return ""


def _without_port(netloc: str) -> str:
    """Return host and port, the port only if it is none of the usual ones: a proxy may have ended TLS."""
    return next((netloc.removesuffix(port) for port in DEFAULT_PORTS if netloc.endswith(port)), netloc)
