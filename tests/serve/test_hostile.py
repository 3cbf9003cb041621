"""Mutated requests, audio, events and frames, by seed: each is answered or refused, and harms nobody else."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
from fuzz.fuzz import mutated, mutated_json
from serve.harness import ENGLISH, MODEL, Running, b64, spoken
from serve.test_security import ask
from websockets.sync.client import connect

from covo_npu.runtime import audio
from covo_npu.runtime.audio import AudioError
from covo_npu.serve import formats

CASES = 120
SHORT = audio.to_pcm16(np.sin(np.arange(4_800, dtype=np.float32) / 9))  # 0.2 s
EXPECTED = {200, 400, 404, 413}
FAULTS = ("server_fault", "reply_failed")


def chat_request() -> dict[str, Any]:
    part = {"type": "input_audio", "input_audio": {"data": b64(SHORT), "format": "pcm16"}}
    return {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [part, {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,"}}]},
            {"role": "assistant", "audio": {"id": "audio_1"}},
            {"role": "user", "content": [part]},
        ],
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "wav"},
        "stream": False,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 1,
        "seed": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "window": 3,
        "n": 1,
    }


@pytest.fixture
def unharmed(running: Running) -> Iterator[None]:
    """Whatever came, the server answers the next question as it answered the first, and holds nothing back."""

    def reply() -> str:
        asked: Any = [spoken(ENGLISH)]
        found = running.client().chat.completions.create(model=MODEL, messages=asked, max_completion_tokens=5)
        return str(found.choices[0].message.content)

    before = reply()
    yield
    assert running.idle() and reply() == before and running.service.worker.state == "ready"


def judged(status: int, answer: Any) -> int:
    """The status of an answer that is one of ours."""
    assert status in EXPECTED, answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["message"]
        assert answer["error"]["code"] not in FAULTS
    return status


def test_mutated_requests(running: Running, unharmed: None) -> None:
    rng, seen = random.Random(1), set()
    for _ in range(CASES):
        request = chat_request()
        if rng.random() < 0.5:
            del request["messages"][:3]  # one that could be answered
        request = mutated_json(rng, request)
        if isinstance(request, dict) and type(request.get("max_completion_tokens")) is not int:
            request["max_tokens"] = 1
        if isinstance(request, dict) and request.get("max_completion_tokens") != 1:
            request["max_completion_tokens"] = 2
        status, _, answer = ask(running, "/v1/chat/completions", "POST", json.dumps(request).encode())
        seen.add(judged(status, answer) if not isinstance(answer, bytes) else status)
    assert {200, 400} <= seen


def test_mutated_bytes(running: Running, unharmed: None) -> None:
    rng, body = random.Random(2), json.dumps(chat_request()).encode()
    bodies = [mutated(rng, body) for _ in range(CASES)]
    bodies += [b"", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{", b'"' + b"x" * 10**6, b"1" * 10**5]
    for case in bodies:
        status, _, answer = ask(running, "/v1/chat/completions", "POST", case)
        judged(status, answer)


def test_mutated_secrets(running: Running, unharmed: None) -> None:
    rng = random.Random(3)
    request = {
        "expires_after": {"anchor": "created_at", "seconds": 60},
        "session": {"type": "realtime", "instructions": "x", "audio": {"input": {"turn_detection": None}}},
    }
    for _ in range(CASES):
        status, _, answer = ask(
            running, "/v1/realtime/client_secrets", "POST", json.dumps(mutated_json(rng, request)).encode()
        )
        judged(status, answer)


def test_mutated_audio_is_heard_or_refused() -> None:
    """Containers of every kind: samples that are finite and within the limit, or one clear error."""
    rng, limit_s, seeds = random.Random(4), 2.0, []
    samples = (0.3 * np.random.default_rng(1).standard_normal((2400, 2))).clip(-1, 1)
    for container, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
                               ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")):  # fmt: skip
        file = io.BytesIO()
        soundfile.write(file, samples, 48_000, subtype, format=container)
        seeds.append(file.getvalue())
    heard = refused = 0
    for n in range(500):
        data = mutated(rng, rng.choice(seeds))
        text = b64(data)
        if n % 3 == 0:
            text = mutated(rng, text.encode()).decode("latin-1")
        try:
            waveform = formats.decode(formats.from_base64(text, "it"), rng.choice(formats.HEARD), "it", limit_s)
        except AudioError as error:
            assert str(error).startswith("it") and len(str(error)) < 300
            refused += 1
        else:
            assert waveform.isfinite().all() and waveform.shape[0] <= limit_s * audio.SAMPLE_RATE + 1
            heard += 1
    assert heard > 50 and refused > 50


EVENTS: tuple[dict[str, Any], ...] = (
    {"type": "session.update", "session": {"type": "realtime", "output_modalities": ["text"], "max_output_tokens": 2,
     "audio": {"input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": None}}}},
    {"type": "input_audio_buffer.append", "audio": b64(SHORT)},
    {"type": "input_audio_buffer.commit"},
    {"type": "response.create", "event_id": "e", "response": {"output_modalities": ["text"], "max_output_tokens": 1}},
    {"type": "response.cancel", "response_id": "r"},
    {"type": "input_audio_buffer.clear"},
    {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "id": "i",
     "content": [{"type": "input_audio", "audio": b64(SHORT)}]}},
    {"type": "conversation.item.retrieve", "item_id": "i"},
    {"type": "conversation.item.truncate", "item_id": "i", "content_index": 0, "audio_end_ms": 40},
    {"type": "conversation.item.delete", "item_id": "i"},
)  # fmt: skip


def address(running: Running) -> str:
    return f"ws://127.0.0.1:{running.port}/v1/realtime?model={MODEL}"


def test_mutated_events(running: Running, unharmed: None) -> None:
    """A session outlives whatever it is told: after every lot of events it still answers."""
    rng = random.Random(5)
    for _ in range(6):
        with connect(address(running), max_size=None) as websocket:
            websocket.send(json.dumps({**EVENTS[0], "event_id": "first"}))
            for event in rng.choices(EVENTS, k=25):
                websocket.send(json.dumps(mutated_json(rng, event) if rng.random() < 0.8 else event))
            for text in ("", "{", "null", "[]", "[" * 10_000, '{"type":' + "1" * 5_000 + "}", "\x00"):
                websocket.send(text)
            websocket.send(b"\x00\xff")
            websocket.send(json.dumps({"type": "conversation.item.retrieve", "item_id": "none", "event_id": "last"}))
            while True:
                event = json.loads(websocket.recv(timeout=60))
                if event["type"] == "error":
                    assert event["error"]["code"] not in FAULTS, event
                    if event["error"]["event_id"] == "last":
                        break
        assert running.idle()


HANDSHAKE = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n" % base64.b64encode(bytes(16))
)


def frame(opcode: int, payload: bytes, fin: bool = True) -> bytes:
    """A masked frame of a client; the mask is zero."""
    size = len(payload)
    head = bytes([128 * fin | opcode, 128 | min(size, 126)]) + (size.to_bytes(2, "big") if size > 125 else b"")
    return head + bytes(4) + payload


def test_mutated_frames(running: Running, unharmed: None) -> None:
    """Broken handshakes, broken frames: the connection ends, or goes on; the server does."""
    rng = random.Random(6)
    text = json.dumps(EVENTS[1]).encode()[:120]
    parts = ((1, text), (0, text), (2, text), (9, b"ping"), (10, b""), (8, b"\x03\xe8bye"), (3, b"?"), (1, b"\xff"))
    frames = (frame(1, text[:9], fin=False), *(frame(*part) for part in parts))
    for n in range(60):
        handshake = HANDSHAKE if n % 3 else mutated(rng, HANDSHAKE)
        sent = mutated(rng, b"".join(rng.choices(frames, k=4)))
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as connection:
            connection.settimeout(0.3 if n % 3 == 0 else 20)
            try:
                connection.sendall(handshake)
                if connection.recv(4096).startswith(b"HTTP/1.1 101"):
                    connection.sendall(sent)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
            except (ConnectionError, TimeoutError):
                pass  # cut off, or still waiting for the rest of a header
    assert not running.service.sessions or running.idle()
