"""One response of a realtime session: the events of a reply in the protocol's order, to its end or interruption."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import audio
from covo_npu.runtime.engine import ContextError, Dialogue
from covo_npu.runtime.events import Audio, Done, Reply, Text
from covo_npu.serve.dialogues import Dialogues
from covo_npu.serve.errors import ApiError, told
from covo_npu.serve.exchange import ClientGoneError
from covo_npu.serve.formats import PcmChunks
from covo_npu.serve.realtime.conversation import Conversation, LastReply, new_id, reply_item
from covo_npu.serve.realtime.session import SessionSettings, ask_of
from covo_npu.serve.service import Service
from covo_npu.serve.usage import Usage
from covo_npu.serve.worker import Question, ReplyStream

Send = Callable[..., Awaitable[None]]  # (type of event, its fields)

# stop_reason of a reply: status of the response, and its details
ENDS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "stop": ("completed", None),
    "length": ("incomplete", {"reason": "max_output_tokens"}),
    "context": ("incomplete", {"reason": "max_output_tokens"}),
}


@dataclass(frozen=True, slots=True)
class Words:
    """What the events of a reply are called, spoken or written."""

    content: str  # type of the item's content
    part: str  # type of the content part
    text: str  # where the text stands in both
    delta: str  # event that brings more text
    done: str  # event after the last of it


SPOKEN = Words(
    "output_audio",
    "audio",
    "transcript",
    "response.output_audio_transcript.delta",
    "response.output_audio_transcript.done",
)
WRITTEN = Words("output_text", "text", "text", "response.output_text.delta", "response.output_text.done")


class Response:
    """A reply on its way to the client. It runs in a task of its own."""

    def __init__(
        self, service: Service, conversation: Conversation, settings: SessionSettings, send: Send, refused: Send
    ) -> None:
        """send: tells the client an event; refused: tells it the error of a response that could not begin.

        Raises ApiError if there is nothing to answer, or it cannot be asked so.
        """
        self._service, self._conversation, self._settings, self._send = service, conversation, settings, send
        self._refused = refused
        self.id, self._item, self._reason = new_id("resp"), reply_item(), ""
        self._words = SPOKEN if settings.speaks else WRITTEN
        self._text, self._samples = "", 0
        self._stream: ReplyStream | None = None
        self._accepted = asyncio.Event()  # or refused
        self._begun = False  # the client knows of the item
        self._before: str | None = None  # the item before its own
        self._kept = False  # the model remembers an interrupted reply
        self.asked, waveform = conversation.question()  # ids of the questions
        self._question = self._ask(waveform)
        self.task = asyncio.ensure_future(self._run())

    @property
    def item_id(self) -> str:
        """The id of the reply's item."""
        return str(self._item["id"])

    async def cancel(self, reason: str) -> None:
        """End the response, if it has not ended yet, and wait until the client knows. reason: OpenAI's word for it."""
        await self._accepted.wait()
        if self._stream is not None and not self.task.done():
            self._reason = reason
            self._kept = await self._stream.interrupt(keep=self._begun)
        await asyncio.wait([self.task])

    def _ask(self, waveform: Tensor) -> Question:
        dialogue = self._conversation.dialogue

        def find(dialogues: Dialogues) -> Dialogue:
            if dialogue not in dialogues:
                message = "the server had to forget this dialogue, memory is short: begin a new session"
                raise ApiError(404, message, "dialogue_not_found")
            return dialogue

        def remember(dialogues: Dialogues, dialogue: Dialogue, reply: Reply) -> None:
            dialogues.hold(dialogue)

        return Question(waveform, ask_of(self._settings, self._service), find, remember)

    async def _run(self) -> None:
        created = False
        try:
            with self._service.worker.place():
                async with self._service.worker.reply(self._question) as stream:
                    created, self._stream = True, stream
                    self._accepted.set()
                    await self._send("response.created", response=self._object("in_progress"))
                    await self._tell(stream)
        except CovoError as error:
            if created:
                raise
            await self._refused(told(error))
            if isinstance(error, ContextError):  # it would make every later question too long as well
                for item_id in self.asked:
                    self._conversation.delete(item_id)
                    await self._send("conversation.item.deleted", item_id=item_id)
        finally:
            self._accepted.set()

    async def _tell(self, stream: ReplyStream) -> None:
        """Send what comes to its end, which is Done, a fault, or nothing more after an interruption."""
        chunks = PcmChunks()
        try:
            async for event in stream:
                if not self._begun:
                    await self._begin()
                if isinstance(event, Text):
                    self._text += event.text
                    await self._item_event(self._words.delta, delta=event.text)
                elif isinstance(event, Audio):
                    self._samples += event.samples.size
                    for data in chunks.push(event.samples):
                        await self._item_event("response.output_audio.delta", delta=data)
                elif isinstance(event, Done):
                    for data in chunks.finish():
                        await self._item_event("response.output_audio.delta", delta=data)
                    reply = event.reply
                    usage = self._remember(stream, len(reply.tokens), len(reply.audio_codes))
                    await self._finish(*ENDS[reply.stop_reason], usage)
                    return
        except ClientGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - told to the client, and logged if it is a fault of ours
            details = {key: value for key, value in told(error).object.items() if key != "param"}
            await self._finish("failed", {"error": details})
            return
        ids = self._conversation.dialogue.mark.reply
        kept = self._remember(stream, len(ids), count_codes(ids, self._service)) if self._kept else None
        await self._finish("cancelled", {"reason": self._reason}, kept)

    def _remember(self, stream: ReplyStream, tokens: int, codes: int) -> Usage:
        """Return what the round took, after noting that the model remembers it."""
        conversation, mark = self._conversation, self._conversation.dialogue.mark
        layers = self._service.model.config.adapter.num_layers
        placeholders = audio.num_placeholders(self._question.waveform.shape[0], layers)
        usage = Usage(
            prompt=mark.length - len(mark.reply),
            cached=stream.before.length,
            heard=conversation.audio_tokens + placeholders,
            completion=tokens,
            codes=codes,
        )
        conversation.answered(self.asked, placeholders, codes, LastReply(self.item_id, self._samples))
        return usage

    async def _begin(self) -> None:
        self._begun = True
        self._before = self._conversation.add(self._item)
        await self._output_event("response.output_item.added", item=self._item)
        await self._send("conversation.item.added", previous_item_id=self._before, item=self._item)
        await self._item_event("response.content_part.added", part={"type": self._words.part, self._words.text: ""})

    async def _finish(self, status: str, details: dict[str, Any] | None, usage: Usage | None = None) -> None:
        if self._begun:
            words, text = self._words, {self._words.text: self._text}
            if words is SPOKEN:
                await self._item_event("response.output_audio.done")
            await self._item_event(words.done, **text)
            await self._item_event("response.content_part.done", part={"type": words.part, **text})
            self._item["status"] = "completed" if status == "completed" else "incomplete"
            self._item["content"] = [{"type": words.content, **text}]
            await self._output_event("response.output_item.done", item=self._item)
            await self._send("conversation.item.done", previous_item_id=self._before, item=self._item)
        status_details = details and {"type": status, **details}
        await self._send("response.done", response=self._object(status, status_details, usage))
        await self._send("rate_limits.updated", rate_limits=[])

    async def _output_event(self, name: str, **fields: Any) -> None:
        await self._send(name, response_id=self.id, output_index=0, **fields)

    async def _item_event(self, name: str, **fields: Any) -> None:
        await self._output_event(name, item_id=self.item_id, content_index=0, **fields)

    def _object(self, status: str, details: dict[str, Any] | None = None, usage: Usage | None = None) -> dict[str, Any]:
        settings = self._settings
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [self._item] if self._begun else [],
            "conversation_id": self._conversation.id,
            "output_modalities": settings.modalities,
            "max_output_tokens": settings.limit,
            "audio": {"output": settings.output},
            "usage": usage and usage.realtime(),
            "metadata": settings.metadata,
        }


def count_codes(ids: Iterable[int], service: Service) -> int:
    """Return how many of a reply's ids are audio codes."""
    return sum(token >= service.model.config.audio_token_index for token in ids)
