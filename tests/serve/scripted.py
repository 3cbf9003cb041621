"""A server that says what a script says: the page's files and /v1/realtime, for what a real server seldom does."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

PAGE = Path(__file__).parents[2] / "serve/page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
RATE = 24_000
MODEL = {"id": "covo-audio-chat", "voices": ["default"]}

Step = tuple[str, Any]  # ("text", str), ("audio", int16 [n]), ("wait", seconds), ("fail", message), ("die", None)


@dataclass
class Scripted:
    """Replies are taken from `replies` one after the other, the last one again and again.

    turns: hands-free, (start, end) in ms of the turns that are noticed; refuse: answers instead of the server.
    """

    replies: list[list[Step]]
    turns: list[tuple[int, int]] = field(default_factory=list)
    refuse: Callable[[Request], Response | None] = lambda request: None
    events: list[dict[str, Any]] = field(default_factory=list)  # of all clients, in order, with "samples" for audio
    sent: list[dict[str, Any]] = field(default_factory=list)
    connections: list[ServerConnection] = field(default_factory=list)

    def __enter__(self) -> Scripted:
        self.server = serve(self._talk, "127.0.0.1", 0, process_request=self._answer, subprotocols=["realtime"])
        self.port = self.server.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End, also for the clients that are connected."""
        self.server.shutdown()
        for connection in self.connections:
            connection.close()
        self.thread.join()

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def of(self, *types: str) -> list[dict[str, Any]]:
        """The client's events of these types."""
        return [event for event in self.events if event["type"] in types]

    def gets(self, count: int, *types: str) -> bool:
        """Whether so many of the client's events of these types arrive, now or soon."""
        end = time.monotonic() + 10
        while len(self.of(*types)) < count and time.monotonic() < end:
            time.sleep(0.01)
        return len(self.of(*types)) == count

    @property
    def heard(self) -> np.ndarray:
        """All samples that were appended."""
        pieces = [event["samples"] for event in self.of("input_audio_buffer.append")]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int16)

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        refused = self.refuse(request)
        if refused:
            return refused
        path = request.path.partition("?")[0]
        if path == "/v1/realtime":
            return None
        if path == "/v1/models":
            return response(HTTPStatus.OK, "application/json", json.dumps({"data": [MODEL]}))
        file = PAGE / (path[1:] or "index.html")
        if file.parent != PAGE or not file.is_file():
            return response(HTTPStatus.NOT_FOUND, "text/plain", path)
        return response(HTTPStatus.OK, TYPES[file.suffix], file.read_text("utf-8"))

    def _talk(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        with contextlib.suppress(ConnectionClosed):
            _Client(self, connection).run()


class _Client:
    def __init__(self, server: Scripted, connection: ServerConnection) -> None:
        self.server, self.connection = server, connection
        self.count = 0
        self.position_ms = 0.0
        self.handsfree = False
        self.turns: Iterable[tuple[int, int]] = list(server.turns)
        self.replying: threading.Thread | None = None
        self.cancelled = threading.Event()

    def send(self, type_: str, **fields: Any) -> None:
        self.count += 1
        event = {"type": type_, "event_id": f"event_{self.count}", **fields}
        self.server.sent.append(event)
        self.connection.send(json.dumps(event))

    def run(self) -> None:
        self.send("session.created", session={"type": "realtime", "model": "covo-audio-chat"})
        for message in self.connection:
            event = json.loads(message)
            if event["type"] == "input_audio_buffer.append":
                event["samples"] = np.frombuffer(base64.b64decode(event.pop("audio")), "<i2")
            self.server.events.append(event)
            handler = getattr(self, "on_" + event["type"].replace(".", "_"), None)
            if handler:
                handler(event)

    def on_session_update(self, event: dict[str, Any]) -> None:
        self.handsfree = event["session"]["audio"]["input"]["turn_detection"] is not None
        self.send("session.updated", session=event["session"])

    def on_input_audio_buffer_append(self, event: dict[str, Any]) -> None:
        before, self.position_ms = self.position_ms, self.position_ms + 1000 * event["samples"].size / RATE
        if not self.handsfree:
            return
        for start, end in self.turns:
            if before <= start + 300 < self.position_ms:
                self.send("input_audio_buffer.speech_started", audio_start_ms=start, item_id=f"q{start}")
                self.cancel("turn_detected")
            if before <= end < self.position_ms:
                self.send("input_audio_buffer.speech_stopped", audio_end_ms=end, item_id=f"q{start}")
                self.send("input_audio_buffer.committed", item_id=f"q{start}")
                self.on_response_create(event)

    def on_input_audio_buffer_commit(self, event: dict[str, Any]) -> None:
        self.send("input_audio_buffer.committed", item_id="q")

    def on_response_create(self, event: dict[str, Any]) -> None:
        replies = self.server.replies
        script = replies.pop(0) if len(replies) > 1 else replies[0]
        self.cancelled.clear()
        self.replying = threading.Thread(target=self.reply, args=(script,))
        self.replying.start()

    def on_response_cancel(self, event: dict[str, Any]) -> None:
        if not self.cancel("client_cancelled"):
            message = "Cancellation failed: no active response found"
            error = {"type": "invalid_request_error", "code": "response_cancel_not_active", "message": message}
            self.send("error", error={**error, "param": None, "event_id": event["event_id"]})

    def on_conversation_item_truncate(self, event: dict[str, Any]) -> None:
        names = ("item_id", "content_index", "audio_end_ms")
        self.send("conversation.item.truncated", **{name: event[name] for name in names})

    def cancel(self, reason: str) -> bool:
        if not (self.replying and self.replying.is_alive()):
            return False
        self.reason = reason
        self.cancelled.set()
        self.replying.join()
        return True

    def reply(self, script: list[Step]) -> None:
        with contextlib.suppress(ConnectionClosed):
            self.speak(script)

    def speak(self, script: list[Step]) -> None:
        self.count += 1
        response, item = f"resp_{self.count}", f"item_{self.count}"
        part = {"response_id": response, "item_id": item, "output_index": 0, "content_index": 0}
        spoken = ""
        status: dict[str, Any] = {"status": "completed", "status_details": None}
        self.send("response.created", response={"id": response, "status": "in_progress"})
        self.send("response.output_item.added", response_id=response, output_index=0, item={"id": item})
        self.send("response.content_part.added", part={"type": "audio"}, **part)
        for kind, value in script:
            if self.cancelled.is_set():
                break
            if kind == "text":
                spoken += value
                self.send("response.output_audio_transcript.delta", delta=value, **part)
            elif kind == "audio":
                data = base64.b64encode(value.astype("<i2").tobytes()).decode()
                self.send("response.output_audio.delta", delta=data, **part)
            elif kind == "wait":
                self.cancelled.wait(value)
            elif kind == "fail":
                error = {"type": "server_error", "code": "internal", "message": value}
                status = {"status": "failed", "status_details": {"type": "failed", "error": error}}
                break
            elif kind == "event":
                self.send(value.pop("type"), **value)
            elif kind == "die":
                self.connection.socket.shutdown(socket.SHUT_RDWR)
                return
        if self.cancelled.is_set():
            status = {"status": "cancelled", "status_details": {"type": "cancelled", "reason": self.reason}}
        if status["status"] == "completed":
            self.send("response.output_audio.done", **part)
            self.send("response.output_audio_transcript.done", transcript=spoken, **part)
            self.send("response.content_part.done", part={"type": "audio", "transcript": spoken}, **part)
            self.send("response.output_item.done", response_id=response, output_index=0, item={"id": item})
        self.send("response.done", response={"id": response, **status, "output": []})


def response(status: HTTPStatus, kind: str, body: str) -> Response:
    """A whole HTTP response."""
    data = body.encode()
    headers = Headers({"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close"})
    return Response(status, status.phrase, headers, data)
