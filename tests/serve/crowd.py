"""Clients that ask, hear and leave at random moments, many at a time. `make soak` runs this file for a long while.

usage: python tests/serve/crowd.py --ckpt FOLDER [--seconds S] [--clients N] [--seed N]

It starts covo-serve, lets the clients come and go, and fails if the server answers anything but a reply or a refusal,
if a place is not given back, or if its memory in the second half is above that of the first by more than SPARE_BYTES.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import re
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from serve.harness import CHINESE, ENGLISH, MODEL, b64, program, spoken
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

STAY_S = 3.0  # how long a client stays at most before it leaves, unless it stays LONG_S
LONG_S = 10.0  # to hear most replies to their end
VISITS_PER_S = 50  # to begin at most: the clients share a core, and who waits for it for 10 s is cut off as slow
EXPECTED = {"200", "408", "429", "503", "101", "gone", "over"}
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() tells the other side at once that nobody is there
SPARE_BYTES = 64 << 20  # of the allocator and of dialogues that are held, which --parked-mib bounds


def bodies() -> list[bytes]:
    """Requests of every kind: text and speech, whole and in a stream, short and without an end of their own."""
    speech: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    endless = {"repetition_penalty": 1.0, "window_penalty": 0.1, "window": 1}  # the last id is rewarded
    kinds: list[dict[str, Any]] = [
        {"messages": [spoken(path)], "stream": stream, **kind}
        for path in (ENGLISH, CHINESE)
        for stream in (False, True)
        for kind in ({"max_completion_tokens": 5}, {**speech, "max_completion_tokens": 30}, {**speech, **endless})
    ]
    return [json.dumps({"model": MODEL, **kind}).encode() for kind in kinds]


def leave(connection: socket.socket, rng: random.Random) -> None:
    """Close a connection, politely or not."""
    if rng.random() < 0.5:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def ask(port: int, rng: random.Random, body: bytes) -> str:
    """Ask for a completion and leave: in the middle of the request, while it is answered, or when it is over."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    request = head + body
    if rng.random() < 0.1:
        request = request[: rng.randrange(len(request))]
    until = time.monotonic() + (rng.uniform(0, STAY_S) if rng.random() < 0.8 else LONG_S)
    found = b""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    try:
        connection.sendall(request)
        connection.settimeout(0.2)
        while len(request) == len(head) + len(body) or time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                piece = connection.recv(65536)
                found = (found + piece)[:4096] if len(found) < 4096 else found
                if not piece or piece.endswith((b"0\r\n\r\n", b"}")):
                    break
            if time.monotonic() > until:
                break
    finally:
        leave(connection, rng)
    return found[9:12].decode("ascii", "replace") if found else "gone"


def talk(port: int, rng: random.Random, audio: bytes) -> str:
    """Begin a realtime session and leave it somewhere between its first event and the end of a response."""
    try:
        websocket = connect(f"ws://127.0.0.1:{port}/v1/realtime?model={MODEL}", max_size=None, open_timeout=60)
    except InvalidStatus as error:
        return str(error.response.status_code)
    events: list[dict[str, Any]] = [
        {"type": "session.update", "session": {"type": "realtime", "turn_detection": None, "max_output_tokens": 40}},
        {"type": "input_audio_buffer.append", "audio": b64(audio)},
        {"type": "input_audio_buffer.commit"},
        {"type": "response.create"},
    ]
    until = time.monotonic() + (rng.uniform(0, STAY_S) if rng.random() < 0.8 else LONG_S)
    try:
        for event in events[: rng.choice((1, 2, 3, 4, 4, 4, 4))]:
            websocket.send(json.dumps(event))
        while (left := until - time.monotonic()) > 0:
            kind = json.loads(websocket.recv(timeout=min(left, 30)))["type"]
            if kind == "response.done":
                return "over"
    except (ConnectionClosed, TimeoutError):
        pass
    finally:
        if rng.random() < 0.5:
            with contextlib.suppress(OSError):  # the server was first
                websocket.socket.shutdown(socket.SHUT_RDWR)  # without a word; its thread reads, so close() would wait
        websocket.close()
    return "101"


def crowd(port: int, clients: int, seconds: float, seed: int, most: float = float("inf")) -> Counter[str]:
    """How many visits ended how: `clients` at a time for some seconds, or until `most` have been there."""
    seen: Counter[str] = Counter()
    audio, requests = bytes(48_000), bodies()
    end, left, lock = time.monotonic() + seconds, [most], threading.Lock()

    def client(rng: random.Random) -> None:
        while True:
            time.sleep(rng.uniform(0, 2 * clients / VISITS_PER_S))
            if time.monotonic() >= end:
                return
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    return
            try:
                found = talk(port, rng, audio) if rng.random() < 0.3 else ask(port, rng, rng.choice(requests))
            except (ConnectionError, ConnectionClosed):
                found = "gone"
            except Exception as error:  # noqa: BLE001 - not among what is expected: counted, and the verdict is bad
                found = type(error).__name__
            with lock:
                seen[found] += 1

    threads = [threading.Thread(target=client, args=(random.Random(seed * 10_000 + n),)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def main() -> int:
    """Return the exit code: 0 if the server came through."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # it logs every refusal during a handshake
    options = ("--device", "cpu", "--max-context", "2600", "--parked-mib", "16", "--sessions", "300", "--quiet")
    with Path("build/soak.log").open("w") as log, program("--ckpt", given.ckpt, *options, stderr=log) as (process, url):
        seen: Counter[str] = Counter()
        resident: list[int] = []
        rounds = 20
        for n in range(rounds):
            seen += crowd(int(url.rpartition(":")[2]), given.clients, given.seconds / rounds, given.seed * rounds + n)
            resident.append(resident_bytes(process.pid))
            line = {"round": n + 1, "resident_mb": resident[-1] // 10**6, "visits": dict(seen)}
            print(json.dumps(line), flush=True)
        taken = places_taken(url)
        process.terminate()
        code = process.wait(120)
    faults = Path("build/soak.log").read_text("utf-8").count("Traceback")
    grown = max(resident[rounds // 2 :]) - max(resident[: rounds // 2])
    verdict = {"places_taken": taken, "exit_code": code, "faults_logged": faults, "grown_mb": grown // 10**6}
    print(json.dumps(verdict))
    return int(bool(taken or code or faults or grown > SPARE_BYTES or set(seen) - EXPECTED))


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]


def places_taken(url: str, seconds: float = 60) -> float:
    """Places that are still taken after a while."""
    end = time.monotonic() + seconds
    while True:
        text = urllib.request.urlopen(f"{url}/metrics").read().decode()
        taken = float(re.search(r"^covo_places_taken (\S+)$", text, re.M)[1])  # type: ignore[index]
        if not taken or time.monotonic() > end:
            return taken
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
