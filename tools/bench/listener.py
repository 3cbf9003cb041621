"""A client of covo-serve that asks one spoken question and notes when what arrives.

Only the standard library: what is measured is the server, and a server elsewhere can be measured without its packages.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

RATE = 24_000  # Hz of streamed samples
SAMPLE_BYTES = 2
PATH = "/v1/chat/completions"
TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Heard:
    """How one question was answered. Times are seconds since it was sent.

    Playback is thought to begin with the first sound; a pause is where it has played all that has come.
    """

    status: int  # of HTTP; 0: there was none, or the connection was lost
    ended_s: float
    tokens: int = 0
    ttft_s: float = 0.0  # to the first text
    itl_s: tuple[float, ...] = ()  # between one piece of text and the next
    ttfa_s: float = 0.0  # to the first sound
    audio_s: float = 0.0  # of speech
    rtf: float = 0.0  # seconds to the last sound, a second of speech
    pauses_s: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is a whole reply."""
        return self.status == http.client.OK


def question(wav: bytes, max_new_tokens: int, seed: int) -> bytes:
    """Return the body of a request for streamed text and speech."""
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}}
    body = {
        "model": "covo-audio-chat",
        "messages": [{"role": "user", "content": [part]}],
        "modalities": ["text", "audio"],
        "audio": {"voice": "default", "format": "pcm16"},
        "max_completion_tokens": max_new_tokens,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def ask(url: str, body: bytes, api_key: str) -> Heard:
    """Return how a question was answered, refusals and lost connections too."""
    place = urlsplit(url)
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    headers = {"content-type": "application/json", "authorization": f"Bearer {api_key}"}
    sent = time.perf_counter()
    try:
        with contextlib.closing(kind(place.netloc, timeout=TIMEOUT_S)) as connection:
            connection.request("POST", place.path.rstrip("/") + PATH, body, headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                answer.read()
                return Heard(answer.status, time.perf_counter() - sent)
            return _listen(answer, sent)
    except (OSError, ValueError, http.client.HTTPException):  # ValueError: no address, no key, or no events
        return Heard(0, time.perf_counter() - sent)


def _listen(answer: http.client.HTTPResponse, sent: float) -> Heard:
    texts: list[float] = []
    sounds: list[tuple[float, int]] = []  # moment, bytes
    tokens, whole = 0, False
    for event in _events(answer):
        moment = time.perf_counter() - sent
        whole = whole or event is None
        if event is None:
            continue
        if "error" in event:
            return Heard(int(http.client.INTERNAL_SERVER_ERROR), moment)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event.get("choices", ()):
            audio = choice["delta"].get("audio") or {}
            if audio.get("transcript"):
                texts.append(moment)
            if audio.get("data"):
                sounds.append((moment, len(base64.b64decode(audio["data"]))))
    ended = time.perf_counter() - sent
    if not whole:
        return Heard(0, ended)
    seconds = sum(count for _, count in sounds) / (SAMPLE_BYTES * RATE)
    return Heard(
        http.client.OK,
        ended,
        tokens,
        ttft_s=texts[0] if texts else 0.0,
        itl_s=tuple(later - earlier for earlier, later in pairwise(texts)),
        ttfa_s=sounds[0][0] if sounds else 0.0,
        audio_s=seconds,
        rtf=sounds[-1][0] / seconds if seconds else 0.0,
        pauses_s=pauses(sounds),
    )


def pauses(sounds: list[tuple[float, int]]) -> tuple[float, ...]:
    """Return how long each pause of playback is. sounds: when a piece came, and its bytes."""
    found, played_until = [], None
    for moment, count in sounds:
        if played_until is not None and moment > played_until:
            found.append(moment - played_until)
        played_until = max(moment, played_until or moment) + count / (SAMPLE_BYTES * RATE)
    return tuple(found)


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any] | None]:
    """Yield the events of a stream, and None for the one that says that it is over."""
    for line in answer:
        if line.startswith(b"data: "):
            data = line[len(b"data: ") :].strip()
            yield None if data == b"[DONE]" else json.loads(data)
