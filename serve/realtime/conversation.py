"""The items of a realtime conversation, as the protocol shows them, and which of them wait for an answer."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from covo_npu.runtime.audio import SAMPLE_RATE
from covo_npu.runtime.engine import ContextError, Dialogue
from covo_npu.serve.errors import invalid, told


def new_id(kind: str) -> str:
    """Return an id like OpenAI's."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class LastReply:
    """The reply that the model heard itself say last, and how much of it was sent."""

    item_id: str
    samples: int


class Conversation:
    """Items in order. What the model remembers of them is its dialogue; what it has not been asked yet waits here.

    max_seconds: of what waits, which is asked as one question.
    """

    def __init__(self, max_seconds: float) -> None:
        self.id, self.dialogue = new_id("conv"), Dialogue()
        self._items: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, Tensor] = {}  # waveforms [N] at 24 kHz of the questions without an answer
        self._max_samples = round(max_seconds * SAMPLE_RATE)  # of those together
        self.last_reply = LastReply("", 0)
        self._audio_tokens = 0  # of the dialogue but for the last reply
        self._last_codes = 0  # of that

    def add(self, item: dict[str, Any]) -> str | None:
        """Put an item at the end; return the id of the one before."""
        before = self.last_id
        self._items[item["id"]] = item
        return before

    def ask(self, item: dict[str, Any], waveform: Tensor) -> str | None:
        """Put a question at the end; return the id of the item before. Raises ApiError if too much waits already."""
        samples = sum(map(len, self._waiting.values())) + len(waveform)
        if samples > self._max_samples:
            message = (
                f"with this question {samples / SAMPLE_RATE:.1f} s would wait for an answer, at most "
                f"{self._max_samples / SAMPLE_RATE:.1f} s can be asked: create a response, or delete items that wait; "
                "then send it again"
            )
            raise told(ContextError(message))
        self._waiting[item["id"]] = waveform
        return self.add(item)

    def item(self, item_id: str) -> dict[str, Any]:
        """Return an item. Raises ApiError if there is none of this id."""
        if item_id not in self._items:
            raise invalid("item_id", f"there is no item {item_id[:64]!r} in the conversation", "item_not_found")
        return self._items[item_id]

    @property
    def last_id(self) -> str | None:
        """The id of the last item."""
        return next(reversed(self._items), None)

    def __contains__(self, item_id: str) -> bool:
        """Whether there is an item of this id."""
        return item_id in self._items

    def delete(self, item_id: str) -> None:
        """Take a question back that waits. Raises ApiError for what the model remembers."""
        self.item(item_id)
        if item_id not in self._waiting:
            message = "the model has heard this item and cannot forget it: end the session, or truncate its last reply"
            raise invalid("item_id", message, "unsupported_value")
        del self._items[item_id], self._waiting[item_id]

    def question(self) -> tuple[tuple[str, ...], Tensor]:
        """Return the ids of the items that wait, and all of them as one waveform. Raises ApiError if none does."""
        if not self._waiting:
            message = "there is nothing to answer: send audio and commit it first"
            raise invalid(None, message, "conversation_has_no_question")
        return tuple(self._waiting), torch.cat(list(self._waiting.values()))

    def answered(self, ids: Iterable[str], placeholders: int, codes: int, reply: LastReply) -> None:
        """Note that the model remembers questions now, with so many placeholders, and a reply of so many codes."""
        for item_id in ids:
            self._waiting.pop(item_id, None)
        self._audio_tokens += self._last_codes + placeholders
        self._last_codes, self.last_reply = codes, reply

    def truncated(self, codes: int) -> None:
        """Note that the model remembers so many codes of the last reply only."""
        self._last_codes = codes

    @property
    def audio_tokens(self) -> int:
        """How many tokens of what the model remembers are audio."""
        return self._audio_tokens + self._last_codes


def user_item(item_id: str | None = None) -> dict[str, Any]:
    """Return the item of a spoken question."""
    content = [{"type": "input_audio", "transcript": None}]
    return _message(item_id, "user", "completed", content)


def reply_item() -> dict[str, Any]:
    """Return the item of a reply that has just begun."""
    return _message(None, "assistant", "in_progress", [])


def _message(item_id: str | None, role: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": item_id or new_id("item"),
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": role,
        "content": content,
    }
