"""Who is let in: keys, host names, origins; what is cut off: bodies, messages, and senders that do not move."""

from __future__ import annotations

import base64
import contextlib
import hmac
import http.client
import json
import logging
import queue
import re
import socket
import time
from collections.abc import Iterator
from logging.handlers import QueueHandler
from typing import Any

import openai
import pytest
from serve.harness import ENGLISH, MODEL, Running, serving, spoken
from serve.talk import talking
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from covo_npu.runtime import CovoAudio
from covo_npu.serve import protocols, security
from covo_npu.serve.logs import RequestId
from covo_npu.serve.security import MAX_SECRET, Gate, Secrets
from covo_npu.serve.settings import Settings

CLOSED = b"(closed)"
Reply = tuple[int, dict[str, str], Any]


def ask(running: Running, path: str = "/v1/models", method: str = "GET", body: Any = None, **headers: str) -> Reply:
    """Status, headers and JSON of an answer, by a client that sends what it is told."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    data = None if body is None else json.dumps(body) if not isinstance(body, bytes) else body
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status, {k.lower(): v for k, v in response.headers.items()}, json.loads(text) if is_json else text


def raw(running: Running, *pieces: bytes) -> bytes:
    """All that comes back until the connection is closed, or for a second; the pieces are sent one after the other."""
    found = b""
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        with contextlib.suppress(TimeoutError):
            while piece := connection.recv(65536):
                found += piece
                connection.settimeout(1)
            return found + CLOSED
    return found


@pytest.fixture(scope="module")
def keyed(model: CovoAudio) -> Iterator[Running]:
    with serving(model, api_keys=("first key", "schlüssel"), origins=("https://app.example",)) as running:
        yield running


# --- keys


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic first key", "first key",
                                    "Bearer first key\t.", "Bearer first", "Bearer " + "x" * 8000])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/nothing", "/v1/realtime/client_secrets"])
def test_without_a_right_key_nothing_is_answered(keyed: Running, header: str | None, path: str) -> None:
    headers = {} if header is None else {"authorization": header}
    status, _, answer = ask(keyed, path, "POST" if path != "/v1/models" else "GET", {}, **headers)
    assert status == 401 and answer["error"]["type"] == "authentication_error"
    assert answer["error"]["code"] in ("missing_api_key", "invalid_api_key")
    assert "first key" not in json.dumps(answer)


@pytest.mark.parametrize("header", ["Bearer first key", "bearer first key", "Bearer  first key "])
def test_a_right_key_is_let_in(keyed: Running, header: str) -> None:
    assert ask(keyed, authorization=header)[0] == 200
    assert keyed.client("first key").models.list().data


def test_a_key_is_compared_with_all_keys_whatever_is_found(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """By digests of one length, in constant time: the time of an answer says nothing of a key."""
    seen: list[tuple[bytes, bytes]] = []
    compare = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or compare(a, b))
    for key in ("first key", "x", "first ke", "y" * 500):
        seen.clear()
        ask(keyed, authorization=f"Bearer {key}")
        assert len(seen) == 2 and {len(part) for pair in seen for part in pair} == {32}


def test_keys_hold_under_a_prefix() -> None:
    """Ray leaves the prefix of a route in the path, and says it in root_path: routes are found without it."""

    async def reached(request: Request) -> PlainTextResponse:
        return PlainTextResponse("reached")

    known = Secrets(("first key",))
    gate = Middleware(Gate, settings=Settings(api_keys=("first key",)), known=known)
    app = Starlette(routes=[Route("/v1/models", reached), Route("/ready", reached)], middleware=[gate])
    for prefix in ("", "/covo", "/v1"):
        client = TestClient(app, root_path=prefix)
        assert client.get(f"{prefix}/ready").status_code == 200
        assert client.get(f"{prefix}/v1/models").status_code == 401
        assert client.get(f"{prefix}/v1/models", headers={"authorization": "Bearer first key"}).text == "reached"


def test_what_needs_no_key(keyed: Running) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert ask(keyed, path)[0] == 200
    assert b"first key" not in ask(keyed, "/metrics")[2]


def url(running: Running, path: str = "/v1/realtime") -> str:
    return f"ws://127.0.0.1:{running.port}{path}?model={MODEL}"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 401),
        ({"additional_headers": {"authorization": "Bearer wrong"}}, 401),
        ({"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]}, 401),
        ({"subprotocols": ["realtime"]}, 401),
        ({"additional_headers": {"authorization": "Bearer first key"}, "origin": "https://evil.example"}, 403),
        ({"additional_headers": {"authorization": "Bearer first key"}, "origin": "null"}, 403),
        ({"additional_headers": {"authorization": "Bearer first key"}, "origin": "https://app.example"}, None),
        ({"subprotocols": ["realtime", "openai-insecure-api-key.first key".replace(" ", "%20")]}, 401),
    ],
)
def test_websockets_are_examined_too(keyed: Running, fields: dict[str, Any], status: int | None) -> None:
    if status is None:
        with connect(url(keyed), **fields) as websocket:
            assert json.loads(websocket.recv())["type"] == "session.created"
        return
    with pytest.raises(InvalidStatus) as caught, connect(url(keyed), **fields):
        pass
    assert caught.value.response.status_code == status
    assert json.loads(caught.value.response.body)["error"]["message"]


def test_a_key_may_come_as_a_subprotocol(model: CovoAudio) -> None:
    with serving(model, api_keys=("key-1",)) as running:
        offered = ["realtime", "openai-insecure-api-key.key-1", "openai-beta.realtime-v1"]
        with connect(url(running), subprotocols=offered) as websocket:  # type: ignore[arg-type]
            assert websocket.subprotocol == "realtime"  # the key is not sent back
            assert json.loads(websocket.recv())["type"] == "session.created"


def test_secrets_are_known_by_their_signature() -> None:
    """To every server with the same keys, until they expire; a changed one to none."""
    now = 1000.0
    secrets, replica = (Secrets(keys, lambda: now) for keys in (("key-1", "key-2"), ("key-2", "key-1")))
    value, expires = secrets.issue(60, {"a": 1})
    assert expires == 1060 and value.startswith("ek_") and value != secrets.issue(60, {"a": 1})[0]
    assert re.fullmatch(r"[\w.!#$%&'*+^`|~-]+", value)  # RFC 9110: what a subprotocol may hold
    assert secrets.session(value.encode()) == replica.session(value.encode()) == {"a": 1}
    assert Secrets(("key-1",), lambda: now).session(value.encode()) is None
    wrong = {value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :] for at in range(3, len(value))}
    wrong |= {value[:at] for at in range(len(value))} | {"ek_", "ek_.", ".", "", value + "A", "ek_\xff." + value}
    assert [secrets.session(each.encode("latin-1")) for each in wrong] == [None] * len(wrong)
    now = 1061.0
    assert secrets.session(value.encode()) is None


def test_what_anybody_may_sign_is_looked_at() -> None:
    """Without keys no secret is needed, and one may be forged: it must be a session, or is none."""
    secrets = Secrets(())
    for body in (b"", b"[]", b"[1]", b'["9", "", {}]', b"[9e99, 1, {}]", b'[99999999999, "", []]', b"\xff", b"null"):
        text = base64.urlsafe_b64encode(body).decode().rstrip("=")
        signature = hmac.digest(secrets._key, text.encode(), "sha256")
        signed = f"ek_{text}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
        assert secrets.session(signed.encode()) is None


def test_a_session_too_long_for_a_header_is_refused(model: CovoAudio) -> None:
    with serving(model, api_keys=("key",)) as running:
        create = running.client("key").realtime.client_secrets.create
        assert len(create(session={"type": "realtime", "instructions": "a" * 2800}).value) < MAX_SECRET
        with pytest.raises(openai.BadRequestError, match="say less of the session"):
            create(session={"type": "realtime", "instructions": "a" * 3100})
        with pytest.raises(openai.APIStatusError, match="longer than 16384 bytes; say less") as caught:
            create(session={"type": "realtime", "instructions": "a" * 16_384})
        assert caught.value.status_code == 413


# --- names and pages


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True), ("localhost:8000", True), ("[::1]:9", True), ("127.8.8.8", True), ("a.localhost", True),
        ("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("[", False), ("[::1", False),
        ("localhost@evil.example", False), ("evil.example@localhost", False), ("", False), ("0.0.0.0", False),
    ],
)  # fmt: skip
def test_without_keys_only_names_of_this_machine_are_answered(running: Running, host: str, allowed: bool) -> None:
    status, _, answer = ask(running, host=host)
    assert status == (200 if allowed else 403)
    assert allowed or answer["error"]["code"] == "host_not_allowed"
    assert ask(running, "/health", host=host)[0] == status


def test_with_a_key_or_when_told_any_name_is_answered(keyed: Running, model: CovoAudio) -> None:
    assert ask(keyed, host="gpu.example", authorization="Bearer first key")[0] == 200
    with serving(model, trusted=True) as running:
        assert ask(running, host="gpu.example")[0] == 200


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("http://127.0.0.1:{port}", "127.0.0.1:{port}", True),
        ("https://localhost", "localhost:443", True),
        ("http://LOCALHOST:80", "localhost", True),
        ("http://127.0.0.1:1", "127.0.0.1:{port}", False),
        ("http://localhost:{port}", "127.0.0.1:{port}", False),
        ("https://evil.example", "127.0.0.1:{port}", False),
        ("null", "127.0.0.1:{port}", False),
        ("http://[", "127.0.0.1:{port}", False),
        ("", "127.0.0.1:{port}", False),
    ],
)
def test_pages_of_others_are_refused(running: Running, origin: str, host: str, allowed: bool) -> None:
    """A page that posts without asking first, as forms may, and a websocket, which browsers do not guard."""
    fields = {"origin": origin.format(port=running.port), "host": host.format(port=running.port)}
    status, _, answer = ask(running, "/v1/chat/completions", "POST", {}, **fields, content_type="text/plain")
    assert status == (400 if allowed else 403)
    assert allowed or answer["error"]["code"] == "origin_not_allowed"


def test_pages_that_are_allowed_get_what_browsers_want(keyed: Running) -> None:
    asked = {"origin": "https://app.example", "access_control_request_method": "POST"}
    wanted = "authorization,content-type,x-stainless-lang"
    status, headers, _ = ask(keyed, "/v1/chat/completions", "OPTIONS", **asked, access_control_request_headers=wanted)
    assert status == 200 and headers["access-control-allow-origin"] == "https://app.example"
    assert set(wanted.split(",")) <= {name.strip() for name in headers["access-control-allow-headers"].split(",")}
    status, headers, _ = ask(keyed, authorization="Bearer first key", origin="https://app.example")
    assert status == 200 and headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in headers["access-control-expose-headers"].lower()
    status, headers, _ = ask(keyed, authorization="Bearer first key", origin="https://evil.example")
    assert status == 403 and "access-control-allow-origin" not in headers


# --- bodies, messages, senders


def test_a_body_beyond_the_limit_is_refused(model: CovoAudio) -> None:
    with serving(model, max_body_bytes=100_000) as running:
        error = pytest.raises(openai.APIStatusError)
        with error as caught:
            running.client().chat.completions.create(model=MODEL, messages=[spoken(ENGLISH)])
        assert caught.value.status_code == 413 and caught.value.code == "request_too_large"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        for length in (b"100001", b"9" * 19):  # none of them is waited for
            assert b" 413 " in raw(running, head + b"content-length: " + length + b"\r\n\r\n{")[:20]
        chunk = b"%x\r\n%s\r\n" % (60_000, b"x" * 60_000)
        assert b" 413 " in raw(running, head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 2)[:20]
        assert running.idle()


def test_a_message_beyond_the_limit_ends_its_session_only(running: Running) -> None:
    with talking(running) as talk:
        with connect(url(running), max_size=None) as websocket:
            websocket.recv()
            websocket.send("x" * (16 << 20))
            assert json.loads(websocket.recv())["error"]["code"] == "invalid_json"
            # While it is sent, or after it; then the reset of the connection may come before its close frame is read.
            with pytest.raises(ConnectionClosed, match=r"message too big|no close frame received or sent"):
                websocket.send("x" * ((16 << 20) + 1))
                websocket.recv()
        talk.update()
    assert running.idle()


def test_slow_senders_are_cut_off(model: CovoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "HEADERS_S", 0.4)
    with serving(model, body_idle_s=0.4, body_s=1.5) as running:
        began = time.monotonic()
        assert raw(running) == CLOSED  # says nothing at all
        assert raw(running, b"GET /v1/models HTTP/1.1\r\nhost: loc") == CLOSED  # stops in its headers
        answered = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        found = raw(running, answered, b"GET /he")  # stops in its second request
        assert found.count(b"HTTP/1.1 200") == 1 and found.endswith(CLOSED)
        assert time.monotonic() - began < 8
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000\r\n\r\n"
        assert b" 408 " in raw(running, head + b'{"model":')[:20]
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as drip:  # a byte now and then
            began = time.monotonic()
            drip.sendall(head)
            with pytest.raises(OSError):
                while time.monotonic() - began < 8:
                    drip.sendall(b"x")
                    time.sleep(0.05)
            assert 1.2 < time.monotonic() - began < 6
        assert running.idle() and running.client().models.list().data
        time.sleep(0.8)  # connections that are kept alive are not those
        assert running.clients[-1].models.list().data


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /v1/models\r\nx-injected: 1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-request-id: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(running: Running, request_line: bytes) -> None:
    found = raw(running, request_line)
    status, _, headers = found.partition(b"\r\n")
    assert status.startswith((b"HTTP/1.1 40", b"HTTP/1.1 20")) and b"x-injected" not in headers.lower()
    assert status.startswith(b"HTTP/1.1 40") == (b" b\r\n" not in request_line)  # a folded header is one value
    assert b"\r\nb" not in headers and b"a\r\n b" not in headers


def test_a_websocket_that_is_none_is_counted_as_refused(keyed: Running) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        connect(url(keyed, "/nothing"))
    end = time.monotonic() + 10  # it is counted a moment after it was answered
    while not keyed.metric("http_requests_total", path="other", status="403") and time.monotonic() < end:
        time.sleep(0.01)
    assert keyed.metric("http_requests_total", path="other", status="403") == 1
    assert not keyed.metric("http_requests_total", path="other", status="499")


@pytest.mark.parametrize("given", ["a b", "x" * 65, "a;b", 'a"b', "é", ""])
def test_ids_that_clients_make_up_are_only_taken_if_harmless(running: Running, given: str) -> None:
    _, headers, _ = ask(running, x_request_id=given.encode().decode("latin-1"))
    assert headers["x-request-id"].startswith("req_")
    assert ask(running, x_request_id="my-id.1")[1]["x-request-id"] == "my-id.1"


@pytest.mark.parametrize(
    "path",
    ["/../setup.py", "/%2e%2e/settings.py", "/..%2fapp.py", "/%2e%2e%2f%2e%2e%2fetc/passwd", "//etc/passwd", "/app.py",
     "/....//settings.py", "/%00", "/.%00./app.py", "/page/../../cli.py"],
)  # fmt: skip
def test_only_the_page_is_served(running: Running, path: str) -> None:
    status, _, answer = ask(running, path)
    assert status == 404 and "import" not in str(answer)


def test_nothing_of_a_dialogue_is_logged(
    running: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither text nor audio nor keys; the path is as it was sent, so that it cannot begin a line."""
    import logging

    logger = logging.getLogger("covo_npu.serve")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG, "covo_npu.serve"):
            found = running.client("my-secret-key").chat.completions.create(
                model=MODEL, messages=[{"role": "system", "content": "Sesame."}, spoken(ENGLISH)], max_tokens=20
            )
            ask(running, "/v1/x%0aINFO%20faked")
            while not any("%0aINFO" in message for message in caplog.messages):  # a moment after the answer
                time.sleep(0.01)
    finally:
        logger.removeHandler(caplog.handler)
    assert any("%0aINFO" in message for message in caplog.messages)
    logged = caplog.text + "".join(capfd.readouterr())
    for secret in ("Sesame", "my-secret-key", found.choices[0].message.content[:5], "UklGR", "\nINFO faked"):
        assert secret not in logged


def test_faults_of_the_server_are_answered_and_logged_under_their_id(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> bytes:
        raise RuntimeError("broken on purpose")

    noted: queue.Queue[logging.LogRecord] = queue.Queue()
    handler, logger = QueueHandler(noted), logging.getLogger("uvicorn.error")
    handler.prepare = lambda record: record  # type: ignore[method-assign]  # with the exception itself
    handler.addFilter(RequestId())
    logger.addHandler(handler)
    monkeypatch.setattr(running.service.metrics, "text", broken)
    try:
        status, headers, body = ask(running, "/metrics", x_request_id="mine")
        record = noted.get(timeout=30)  # the answer comes first
    finally:
        logger.removeHandler(handler)
    assert (status, headers["x-request-id"], headers["x-should-retry"]) == (500, "mine", "false")
    assert body["error"]["type"] == "server_error" and "on purpose" not in str(body)
    assert record.request_id == "mine" and "broken on purpose" in str(record.exc_info[1])
