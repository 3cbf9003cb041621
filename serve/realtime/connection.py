"""A realtime session over a websocket: what the client's events do, from the handshake to the end."""

from __future__ import annotations

import asyncio
import binascii
import json
import logging
import time
from asyncio import FIRST_COMPLETED
from base64 import b64decode
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_core import from_json
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from covo_npu.serve.errors import ApiError, invalid, unsupported
from covo_npu.serve.exchange import ClientGoneError
from covo_npu.serve.realtime.conversation import Conversation, new_id, user_item
from covo_npu.serve.realtime.hearing import Hearing
from covo_npu.serve.realtime.response import Response, count_codes
from covo_npu.serve.realtime.session import SessionSettings, updated, usual
from covo_npu.serve.security import refuse
from covo_npu.serve.service import Service
from covo_npu.serve.vad import SpeechStarted
from covo_npu.serve.worker import READY

log = logging.getLogger(__name__)

SUBPROTOCOL = "realtime"
CODE_MS = 40  # of speech in an audio code
SAMPLES_PER_MS = 24
AHEAD_MS = 1_000  # by which a client's player may think to have played more than it was sent
NORMAL, GOING_AWAY = 1000, 1001  # RFC 6455, section 7.4.1
MAX_ID = 64  # characters of an id that a client makes up

Event = dict[str, Any]


class Realtime:
    """GET /v1/realtime, as an ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        websocket = WebSocket(scope, receive, send)
        try:
            settings = self._settings(websocket)
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in scope["subprotocols"] else None)
        await Session(websocket, self._service, settings).run()

    def _settings(self, websocket: WebSocket) -> SessionSettings:
        """Return how a session begins. Raises ApiError if it may not."""
        service, said = self._service, websocket.scope.get("covo.session", {})
        if service.worker.state != READY:
            raise service.worker.not_ready()
        if len(service.sessions) >= service.settings.sessions:
            message = f"all {service.settings.sessions} realtime sessions are taken"
            raise ApiError(429, message, "too_many_sessions", headers={"retry-after": "10"})
        if websocket.query_params.get("intent", "conversation") != "conversation":
            raise unsupported("intent", "sessions are conversations: this model does not transcribe")
        model = websocket.query_params.get("model") or said.get("model") or service.name
        return updated(usual(service, model), said, service, "session")


class Session:
    """One session. Client events are handled one after the other; a response runs beside them."""

    def __init__(self, websocket: WebSocket, service: Service, settings: SessionSettings) -> None:
        self._websocket, self._service, self._settings = websocket, service, settings
        self._id, self._conversation = new_id("sess"), Conversation(service.max_seconds)
        self._hearing = Hearing(settings.input_format, settings.turn_detection, service.max_seconds)
        self._turn: tuple[str, int] | None = None  # item and begin of the turn that is going on
        self._response: Response | None = None
        self._opened = self._settings.instructions  # of the response that opened the dialogue
        self._ends_at = time.monotonic() + service.settings.session_s
        self._expires_at = int(time.time() + service.settings.session_s)
        self._receiving: asyncio.Future[Any] | None = None  # the next message
        self._ending = asyncio.Event()  # the server is

    async def run(self) -> None:
        """Serve the client until it leaves, or has to."""
        worker, dialogue = self._service.worker, self._conversation.dialogue
        self._service.sessions.add(self)
        try:
            await worker.call(lambda: worker.dialogues.hold(dialogue))
            await self._send("session.created", session=self._echo())
            while (text := await self._next()) is not None:
                await self._handle(text)
        except ClientGoneError:
            pass
        finally:
            self._service.sessions.discard(self)
            tasks = [task for task in (self._receiving, self._response and self._response.task) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            worker.post(lambda: worker.dialogues.forget(dialogue))

    def end(self) -> None:
        """Let the session end when its response has."""
        self._ending.set()

    # --- messages

    async def _next(self) -> str | None:
        """Return the next message of the client, None when the session is over."""
        ending = asyncio.ensure_future(self._ending.wait())
        receiving = self._receiving = asyncio.ensure_future(self._websocket.receive())
        heard_at = time.monotonic()
        try:
            while not receiving.done():
                now = time.monotonic()
                response = self._response.task if self._active and self._response else None
                over = self._over(now, heard_at)
                if over is not None:
                    await self._close(*over)
                    return None
                until = min(self._ends_at, heard_at + self._service.settings.idle_s)
                await asyncio.wait({receiving, response or ending}, timeout=until - now, return_when=FIRST_COMPLETED)
                if response is not None:  # a client that is being answered is not idle
                    heard_at = time.monotonic()
        finally:
            ending.cancel()
        message = receiving.result()
        if message["type"] == "websocket.disconnect":
            raise ClientGoneError
        return message.get("text") or ""

    def _over(self, now: float, heard_at: float) -> tuple[str, str, int] | None:
        """Return why the session has to end, if it has to: code, message, and the websocket's code."""
        if now >= self._ends_at:
            return "session_expired", "the session has lasted as long as one may", NORMAL
        if self._ending.is_set() and not self._active:
            return "server_ending", "the server is ending", GOING_AWAY
        if now >= heard_at + self._service.settings.idle_s:
            return "session_idle", "nothing was sent for too long", NORMAL
        return None

    async def _close(self, code: str, message: str, status: int) -> None:
        await self._error(invalid(None, message, code))
        try:
            await self._websocket.close(status, message)
        except RuntimeError:
            raise ClientGoneError from None

    async def _send(self, name: str, **fields: Any) -> None:
        event = {"type": name, "event_id": new_id("event"), **fields}
        try:
            await self._websocket.send_text(json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        except (WebSocketDisconnect, RuntimeError):  # RuntimeError: it was closed before
            raise ClientGoneError from None

    async def _error(self, error: ApiError, event_id: str | None = None) -> None:
        await self._send("error", error={**error.object, "event_id": event_id})

    async def _handle(self, text: str) -> None:
        event_id = None
        try:
            event = _parsed(text)
            event_id = event.get("event_id") if isinstance(event.get("event_id"), str) else None
            name = _text(event, "type")
            handler = HANDLERS.get(name)
            if handler is None:
                raise invalid("type", f"there is no event {name[:MAX_ID]!r}; there is: {', '.join(HANDLERS)}")
            await handler(self, event)
        except ApiError as error:
            await self._error(error, event_id)
        except ClientGoneError:
            raise
        except Exception:
            log.exception("an event of a realtime session met a fault")
            await self._error(ApiError(500, "the server has a fault; its log says more", "server_fault"), event_id)

    # --- the session

    def _echo(self) -> dict[str, Any]:
        return self._settings.echo(self._id, self._expires_at)

    @property
    def _active(self) -> bool:
        return self._response is not None and not self._response.task.done()

    async def _update(self, event: Event) -> None:
        before, changed = self._settings, updated(self._settings, event.get("session"), self._service, "session")
        self._require_same_prompt(changed, "session.instructions")
        old, new = before.input_format, changed.input_format
        if (new.type, new.sample_rate) != (old.type, old.sample_rate):
            self._hearing.change(new, changed.turn_detection)
        elif changed.turn_detection != before.turn_detection:
            if self._turn:  # what was heard of it belongs to no turn now
                await self._clear(event)
            self._hearing.listen(changed.turn_detection)
        self._settings = changed
        await self._send("session.updated", session=self._echo())

    def _require_same_prompt(self, changed: SessionSettings, param: str) -> None:
        begun = self._active or self._conversation.dialogue.rounds > 0
        if begun and changed.instructions not in (self._settings.instructions, self._opened):
            raise unsupported(param, "the prompt opens a dialogue and stays as it is: begin a new session for another")

    # --- what is heard

    async def _append(self, event: Event) -> None:
        data, started = _audio(event.get("audio"), "audio"), time.perf_counter()
        turns = await self._service.compute(self._hearing.append, data)
        if detection := self._settings.turn_detection:
            self._service.metrics.vad_s.observe(time.perf_counter() - started)
            for turn in turns:
                try:
                    if isinstance(turn, SpeechStarted):
                        await self._speech_started(turn.at_ms, detection.interrupt_response)
                    else:
                        await self._speech_stopped(turn.at_ms, detection.create_response)
                except ApiError as error:  # of one turn: the others are told all the same
                    await self._error(error, event.get("event_id"))
            self._hearing.trim()

    async def _speech_started(self, at_ms: int, interrupt: bool) -> None:
        item_id = new_id("item")
        self._turn = item_id, at_ms
        await self._send("input_audio_buffer.speech_started", audio_start_ms=at_ms, item_id=item_id)
        if interrupt and self._active and self._response:
            await self._response.cancel("turn_detected")

    async def _speech_stopped(self, at_ms: int, respond: bool) -> None:
        self._service.metrics.turns.inc()
        item_id, begin_ms = self._turn or (new_id("item"), at_ms)
        await self._send("input_audio_buffer.speech_stopped", audio_end_ms=at_ms, item_id=item_id)
        await self._commit_turn(item_id, begin_ms, at_ms)
        if respond and not self._active:
            self._respond(self._settings, None)

    async def _commit(self, event: Event) -> None:
        await self._commit_turn(self._turn[0] if self._turn else new_id("item"), None, None)

    async def _commit_turn(self, item_id: str, begin_ms: int | None, end_ms: int | None) -> None:
        waveform = await self._service.compute(self._hearing.take, begin_ms, end_ms)
        self._turn, item = None, user_item(item_id)
        before = self._conversation.ask(item, waveform)
        await self._send("input_audio_buffer.committed", item_id=item_id, previous_item_id=before)
        await self._tell_item(item, before)

    async def _clear(self, event: Event) -> None:
        self._hearing.clear()
        self._turn = None
        await self._send("input_audio_buffer.cleared")

    # --- the conversation

    async def _tell_item(self, item: dict[str, Any], before: str | None) -> None:
        for name in ("conversation.item.added", "conversation.item.done"):
            await self._send(name, previous_item_id=before, item=item)

    async def _create_item(self, event: Event) -> None:
        said = event.get("item")
        if not isinstance(said, dict) or said.get("type") != "message" or said.get("role") != "user":
            raise unsupported("item", "only the user's spoken messages can be added: type message, role user")
        item_id, after = said.get("id") or new_id("item"), event.get("previous_item_id")
        if not isinstance(item_id, str) or len(item_id) > MAX_ID or item_id in self._conversation:
            raise invalid("item.id", f"expected an id of its own of at most {MAX_ID} characters")
        if after not in (None, self._conversation.last_id or "root"):
            raise unsupported("previous_item_id", "items can only be added at the end")
        parts = said.get("content")
        if not isinstance(parts, list) or not parts:
            raise invalid("item.content", "expected a list of input_audio parts")
        waveform = await self._service.compute(self._heard, [_part(part, n) for n, part in enumerate(parts)])
        item = user_item(item_id)
        await self._tell_item(item, self._conversation.ask(item, waveform))

    def _heard(self, parts: list[bytes]) -> Any:
        hearing = Hearing(self._settings.input_format, None, self._service.max_seconds)
        for data in parts:
            hearing.append(data)
        return hearing.take()

    async def _retrieve_item(self, event: Event) -> None:
        await self._send("conversation.item.retrieved", item=self._conversation.item(_text(event, "item_id")))

    async def _delete_item(self, event: Event) -> None:
        item_id = _text(event, "item_id")
        if self._active and self._response and item_id in self._response.asked:
            raise invalid("item_id", "this item is being answered: cancel the response first")
        self._conversation.delete(item_id)
        await self._send("conversation.item.deleted", item_id=item_id)

    async def _truncate_item(self, event: Event) -> None:
        """Let the model's history hold what was heard of the last reply; a response under way ends with that."""
        item_id, index, end_ms = _text(event, "item_id"), event.get("content_index"), event.get("audio_end_ms")
        self._conversation.item(item_id)
        if index != 0:
            raise invalid("content_index", "a reply has one part, 0")
        if not isinstance(end_ms, int) or isinstance(end_ms, bool) or end_ms < 0:
            raise invalid("audio_end_ms", "expected milliseconds, a number of at least 0")
        if self._active and self._response and self._response.item_id == item_id:
            await self._response.cancel("client_cancelled")
        last, worker = self._conversation.last_reply, self._service.worker
        if last.item_id != item_id or not last.samples or self._active:
            raise unsupported("item_id", "only the last reply can be truncated, and only one that was spoken")
        sent_ms = last.samples // SAMPLES_PER_MS
        if end_ms > sent_ms + AHEAD_MS:
            raise invalid("audio_end_ms", f"the reply has {sent_ms} ms, found {end_ms}")
        item = self._conversation.item(item_id)
        # Of a reply that was ended there are codes that were never spoken, even if all that was sent was heard.
        if end_ms < sent_ms or item["status"] == "incomplete":
            dialogue, heard = self._conversation.dialogue, min(end_ms, sent_ms) // CODE_MS
            await worker.call(lambda: worker.engine.truncate(dialogue, heard))
            self._conversation.truncated(count_codes(dialogue.mark.reply, self._service))
        item["content"] = [{"type": "output_audio", "transcript": None}]
        await self._send("conversation.item.truncated", item_id=item_id, content_index=0, audio_end_ms=end_ms)

    # --- responses

    async def _create_response(self, event: Event) -> None:
        if self._active:
            code = "conversation_already_has_active_response"
            raise invalid(None, "a response is under way: wait for its end, or cancel it", code)
        settings = updated(self._settings, event.get("response") or {}, self._service, "response")
        self._require_same_prompt(settings, "response.instructions")
        self._respond(settings, event.get("event_id"))

    def _respond(self, settings: SessionSettings, event_id: str | None) -> None:
        async def refused(error: ApiError) -> None:
            await self._error(error, event_id)

        self._response = Response(self._service, self._conversation, settings, self._send, refused)
        if not self._conversation.dialogue.rounds:
            self._opened = settings.instructions

    async def _cancel_response(self, event: Event) -> None:
        wanted, response = event.get("response_id"), self._response
        if response is None or not self._active or wanted not in (None, response.id):
            raise invalid("response_id", "there is no such response under way", "response_cancel_not_active")
        await response.cancel("client_cancelled")


HANDLERS: dict[str, Callable[[Session, Event], Awaitable[None]]] = {
    "session.update": Session._update,
    "input_audio_buffer.append": Session._append,
    "input_audio_buffer.commit": Session._commit,
    "input_audio_buffer.clear": Session._clear,
    "conversation.item.create": Session._create_item,
    "conversation.item.retrieve": Session._retrieve_item,
    "conversation.item.truncate": Session._truncate_item,
    "conversation.item.delete": Session._delete_item,
    "response.create": Session._create_response,
    "response.cancel": Session._cancel_response,
}


def _parsed(text: str) -> Event:
    """Return an event of a client. Raises ApiError if it is none.

    Half a character of UTF-16 is refused, as in requests over HTTP: Python's json takes it, and it cannot be sent.
    """
    try:
        event = from_json(text)
    except ValueError as error:
        raise invalid(None, f"expected an event as JSON text: {error}", "invalid_json") from None
    if not isinstance(event, dict):
        raise invalid(None, "expected an event, which is an object", "invalid_type")
    return event


def _text(event: Event, name: str) -> str:
    value = event.get(name)
    if not isinstance(value, str):
        raise invalid(name, f"expected {name}, a text", "missing_required_parameter")
    return value


def _audio(text: Any, where: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise invalid(where, f"{where}: expected audio in base64", "invalid_audio") from None


def _part(part: Any, n: int) -> bytes:
    where = f"item.content[{n}]"
    if not isinstance(part, dict) or part.get("type") != "input_audio":
        raise unsupported(where, "this model answers spoken questions: expected an input_audio part")
    return _audio(part.get("audio"), f"{where}.audio")
