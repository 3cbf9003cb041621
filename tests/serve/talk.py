"""A realtime session through the official client; every event is checked against the client's own types."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, get_args

from openai.resources.realtime.realtime import RealtimeConnection
from openai.types.realtime import RealtimeServerEvent
from serve.harness import MODEL, Running, b64

KINDS = get_args(get_args(RealtimeServerEvent)[0])  # the types of all events, annotated as a union
EVENTS = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in KINDS}
HEARD_TOO = b'"rate":16000'  # which OpenAI does not know: input only
WAIT_S = 10.0
LAST = "rate_limits.updated"  # of a response
MANUAL = {"type": "realtime", "turn_detection": None}


class Talk:
    """One session. `told` is all that the server has said, as it was sent."""

    def __init__(self, connection: RealtimeConnection) -> None:
        self.connection, self.told = connection, []
        self.session = self.next("session.created")["session"]

    def next(self, *kinds: str) -> dict[str, Any]:
        """The next event, which must be of one of these kinds if any are named."""
        message = self.connection._connection.recv(timeout=WAIT_S, decode=False)  # recv() of the client waits for ever
        self.connection.parse_event(message)
        event = json.loads(message)
        checked = EVENTS[event["type"]].model_validate_json(message.replace(HEARD_TOO, b'"rate":24000'))
        assert not checked.model_extra, f"{event['type']} has keys that the client does not know"
        assert event["event_id"] not in {earlier["event_id"] for earlier in self.told}
        self.told.append(event)
        assert not kinds or event["type"] in kinds, event
        return event

    def until(self, kind: str, passes: Callable[[dict[str, Any]], bool] = lambda event: True) -> list[dict[str, Any]]:
        """The events to the next one of a kind."""
        found = [self.next()]
        while found[-1]["type"] != kind or not passes(found[-1]):
            found.append(self.next())
        return found

    def send(self, kind: str, **fields: Any) -> None:
        self.connection.send({"type": kind, **fields})  # type: ignore[arg-type]

    def update(self, **session: Any) -> dict[str, Any]:
        self.send("session.update", session=session)
        return self.next("session.updated")["session"]

    def say(self, data: bytes, piece: int = 9_600) -> None:
        """Append audio in pieces."""
        for begin in range(0, len(data), piece):
            self.send("input_audio_buffer.append", audio=b64(data[begin : begin + piece]))

    def commit(self) -> str:
        self.send("input_audio_buffer.commit")
        return str(self.until("conversation.item.done")[-1]["item"]["id"])

    def ask(self, data: bytes, **response: Any) -> list[dict[str, Any]]:
        """A whole turn by hand; the events of its response."""
        self.say(data)
        self.commit()
        self.send("response.create", **({"response": response} if response else {}))
        return self.until(LAST)

    def error(self) -> dict[str, Any]:
        return self.next("error")["error"]


@contextlib.contextmanager
def talking(running: Running, *, key: str = "none", **session: Any) -> Iterator[Talk]:
    """A session with turns by hand, unless it says otherwise."""
    with running.client(key).realtime.connect(model=MODEL) as connection:
        talk = Talk(connection)
        talk.update(**{**MANUAL, **session})
        yield talk


MADE = ("response.output_audio_transcript.delta", "response.output_audio.delta")


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The kinds of events, repeated ones once: of text and speech, which come as they are made, each once in a run."""
    kept: list[str] = []
    for name in (event["type"] for event in events):
        run = kept[-2:] if name in MADE and kept and kept[-1] in MADE else kept[-1:]
        if name not in run:
            kept.append(name)
    return kept


def transcript(events: list[dict[str, Any]]) -> str:
    names = ("response.output_audio_transcript.delta", "response.output_text.delta")
    return "".join(event["delta"] for event in events if event["type"] in names)


def pcm(events: list[dict[str, Any]]) -> bytes:
    data = [event["delta"] for event in events if event["type"] == "response.output_audio.delta"]
    return b"".join(map(base64.b64decode, data))
