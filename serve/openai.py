"""OpenAI's HTTP interface: chat completions that hear and speak, and the list of models."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.engine import Dialogue
from covo_npu.runtime.events import Audio, Done, Reply, Text
from covo_npu.serve.chat_request import Chat, read_chat, reply_name
from covo_npu.serve.dialogues import Dialogues, Turn
from covo_npu.serve.errors import ApiError, invalid, told
from covo_npu.serve.exchange import ClientGoneError, read_body, send_events, unless_gone
from covo_npu.serve.formats import PcmChunks, encode, to_base64
from covo_npu.serve.service import Service
from covo_npu.serve.usage import Usage
from covo_npu.serve.worker import Question, ReplyStream

FINISH = {"stop": "stop", "length": "length", "context": "length"}  # stop_reason of a reply: OpenAI's finish_reason


class ChatCompletions:
    """POST /v1/chat/completions, as an ASGI application: it has to notice that a client leaves."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGoneError), self._service.worker.place():
            body = await read_body(Request(scope, receive), self._service.settings)
            await unless_gone(receive, self._answer(body, scope, receive, send))

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        chat = await service.compute(read_chat, body, service)
        exchange = _Exchange(chat, service)
        try:
            async with service.worker.reply(exchange.question) as stream:
                if chat.stream:
                    await send_events(send, exchange.chunks(stream))
                else:
                    completion = await exchange.completion(stream)
                    await JSONResponse(completion)(scope, receive, send)
        except CovoError as error:
            raise told(error, "messages") from error


class _Exchange:
    """One request and its reply in OpenAI's words."""

    def __init__(self, chat: Chat, service: Service) -> None:
        self._chat, self._service = chat, service
        self._id, self._audio_id = f"chatcmpl-{uuid.uuid4().hex}", f"audio_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._expires = self._created + int(service.settings.keep_s)
        self._earlier_audio = 0  # audio tokens of the rounds before
        self.question = Question(chat.waveform, chat.ask, self._dialogue, self._remember)

    # --- in the worker's thread

    def _dialogue(self, dialogues: Dialogues) -> Dialogue:
        chat = self._chat
        if chat.after is None:
            return Dialogue()
        turn = dialogues.find(chat.after)
        if turn is None:
            raise ApiError(404, self._forgotten(), "dialogue_not_found", chat.after_param)
        if chat.system is not None and chat.system != turn.system:
            raise invalid("messages", "the system prompt is not the one that the dialogue began with")
        self._earlier_audio = turn.audio_tokens
        return dialogues.go_on(turn)

    def _forgotten(self) -> str:
        settings = self._service.settings
        message = (
            f"the dialogue that {self._chat.after_param} names is not here any more: one is kept for "
            f"{settings.keep_s / 3600:g} hours after its last reply, and less if memory is short. Begin a new one: "
            "this model cannot read its replies"
        )
        if settings.session_header is None:
            return message
        return (
            f"{message}. Or it lives in another replica: send the header {settings.session_header} with every "
            "question, the same for all of one dialogue"
        )

    def _remember(self, dialogues: Dialogues, dialogue: Dialogue, reply: Reply) -> None:
        audio_tokens = self._earlier_audio + reply.placeholders + len(reply.audio_codes)
        turn = Turn(dialogue, dialogue.mark, self._chat.ask.system or "", audio_tokens)
        dialogues.keep(turn, (self._audio_id, reply_name(self._chat.history, reply.text)))

    # --- on the event loop

    async def completion(self, stream: ReplyStream) -> dict[str, Any]:
        """Return the whole completion. Raises ApiError."""
        try:
            reply = await stream.whole()
        except Exception as error:
            raise told(error) from error
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if self._chat.ask.speaks:
            data = await self._service.compute(encode, reply.waveform, self._chat.format)
            message |= {
                "content": None,
                "audio": {
                    "id": self._audio_id,
                    "data": to_base64(data),
                    "expires_at": self._expires,
                    "transcript": reply.text,
                },
            }
        finish = FINISH[reply.stop_reason]
        return {
            **self._head("chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
            "usage": self._usage(reply, stream),
            "covo": {"stop_reason": reply.stop_reason},
        }

    async def chunks(self, stream: ReplyStream) -> AsyncIterator[dict[str, Any] | ApiError]:
        """Yield the completion in chunks. An error before the first is raised, a later one is the last chunk."""
        begun = False
        try:
            async for delta in self._deltas(stream):
                begun = True
                yield delta
        except Exception as error:
            if not begun:
                raise told(error) from error
            yield told(error)

    async def _deltas(self, stream: ReplyStream) -> AsyncIterator[dict[str, Any]]:
        speaks = self._chat.ask.speaks
        first_text: dict[str, Any] = {"id": self._audio_id}
        first_data = dict(first_text)
        chunks, begun = PcmChunks(), False
        async for event in stream:
            if not begun:
                yield self._chunk({"role": "assistant", "refusal": None})
                begun = True
            if isinstance(event, Text) and not speaks:
                yield self._chunk({"content": event.text})
            elif isinstance(event, Text):
                yield self._chunk({"content": None, "audio": {**first_text, "transcript": event.text}})
                first_text = {}
            elif isinstance(event, Audio):
                for data in chunks.push(event.samples):
                    yield self._chunk({"audio": {**first_data, "data": data}})
                    first_data = {}
            elif isinstance(event, Done):
                for data in chunks.finish():
                    yield self._chunk({"audio": {**first_data, "data": data}})
                if speaks:
                    yield self._chunk({"audio": {"expires_at": self._expires}})
                yield self._chunk({}, FINISH[event.reply.stop_reason])
                if self._chat.include_usage:
                    usage = self._usage(event.reply, stream)
                    yield {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._chat.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._chat.model}

    def _usage(self, reply: Reply, stream: ReplyStream) -> dict[str, Any]:
        cached = stream.before.length
        return Usage(
            prompt=cached + reply.prompt_tokens,
            cached=cached,
            heard=self._earlier_audio + reply.placeholders,
            completion=len(reply.tokens),
            codes=len(reply.audio_codes),
        ).chat()


def models(service: Service) -> list[dict[str, Any]]:
    """Return the model under each of its names, with the voices that it may be asked for."""
    return [
        {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "covo-npu",
            "voices": service.voices,
        }
        for name in service.settings.model_names
    ]


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    return JSONResponse({"object": "list", "data": models(request.app.state.service)})


async def show_model(request: Request) -> Response:
    """GET /v1/models/NAME."""
    service, name = request.app.state.service, request.path_params["name"]
    service.require_model(name)
    return JSONResponse(next(model for model in models(service) if model["id"] == name))


async def speech(request: Request) -> Response:
    """POST /v1/audio/speech, which this model cannot do."""
    message = (
        "this model answers spoken questions and reads no text aloud: ask POST /v1/chat/completions with an "
        "input_audio part"
    )
    raise ApiError(404, message, "unsupported_endpoint")
