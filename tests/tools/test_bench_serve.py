"""The listener against a server that sends what a test chose, figures against NumPy's, the bench on a real server."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from covo_npu.tools.bench import listener, serve

COVO_BENCH = Path(sys.executable).with_name("covo-bench")


def delta(**audio: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"audio": audio}}]}).encode() + b"\n\n"


def sound(seconds: float) -> bytes:
    return delta(data=base64.b64encode(bytes(2 * round(24_000 * seconds))).decode())


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"


@contextmanager
def answering(status: int, pieces: Sequence[bytes | float]) -> Iterator[str]:
    """The address of a server whose every answer is these pieces; a number is a wait, in seconds."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.server.asked = json.loads(self.rfile.read(int(self.headers["content-length"])))  # type: ignore[attr-defined]
            assert self.path == "/v1/chat/completions" and self.headers["authorization"] == "Bearer key"
            self.send_response(status)
            self.end_headers()
            for piece in pieces:
                if isinstance(piece, bytes):
                    self.wfile.write(piece)
                    self.wfile.flush()
                else:
                    time.sleep(piece)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_what_is_heard_of_a_reply() -> None:
    pieces = [0.1, delta(transcript="a"), 0.1, delta(transcript="b"), 0.1, sound(0.1), 0.3, sound(0.4), USAGE, DONE]
    with answering(200, pieces) as url:
        heard = listener.ask(url, listener.question(b"RIFF", 5, seed=3), "key")
    assert heard.ok and heard.tokens == 7 and heard.audio_s == pytest.approx(0.5)
    # A busy machine makes all moments later and none earlier; what is between two of them it makes shorter, too.
    assert heard.ttft_s >= 0.1 and heard.ttft_s + heard.itl_s[0] >= 0.2 and heard.ttfa_s >= 0.3 and heard.ended_s >= 0.6
    assert heard.rtf >= 0.6 / 0.5 and len(heard.pauses_s) == 1 and heard.ttfa_s + 0.1 + heard.pauses_s[0] >= 0.6


@pytest.mark.parametrize(
    ("status", "pieces", "expected"),
    [
        (429, [b"{}"], 429),
        (200, [delta(transcript="a")], 0),  # it ends before it is over
        (200, [b"data: {\n\n", DONE], 0),
        (200, [b'data: {"error": {"message": "x"}}\n\n', DONE], 500),
    ],
)
def test_what_is_no_whole_reply(status: int, pieces: list[bytes], expected: int) -> None:
    with answering(status, pieces) as url:
        heard = listener.ask(url, listener.question(b"", 5, 0), "key")
    assert heard.status == expected and not heard.ok


def test_nobody_answers() -> None:
    with answering(200, []) as url:
        pass
    assert listener.ask(url, b"", "key").status == 0


def test_pauses_are_those_of_a_player() -> None:
    second = 2 * 24_000
    assert listener.pauses([]) == ()
    assert listener.pauses([(5.0, second), (5.9, second), (6.5, second)]) == ()
    assert listener.pauses([(5.0, second), (6.5, second), (7.5, second), (9.0, second)]) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    median, high, worst = serve.percentiles(values)
    assert median == pytest.approx(np.median(values)) and worst == max(values)
    assert high == np.percentile(values, 95, method="inverted_cdf")


def test_loops_ask_as_they_say() -> None:
    running, most, asked, lock = 0, 0, [], threading.Lock()

    def listen(number: int) -> listener.Heard:
        nonlocal running, most
        with lock:
            asked.append(time.perf_counter())
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return listener.Heard(200, 0.05, tokens=number)

    heard, seconds = serve.closed(listen, 3, 9)
    assert most == 3 and [one.tokens for one in heard] == list(range(9)) and seconds >= 0.15
    asked.clear()
    heard, _ = serve.open_loop(listen, 200.0, 60)
    assert [one.tokens for one in heard] == list(range(60)) and most > 3  # it does not wait for replies
    assert asked[-1] - asked[0] >= 59 / 200 / 2  # 59 waits of 1/200 s in the mean; their sum is Gamma(59) distributed


def test_a_row_counts_whole_replies_alone() -> None:
    heard = [
        listener.Heard(200, 2.0, 10, ttft_s=0.5, ttfa_s=1.0, audio_s=2.0, rtf=0.9, pauses_s=(0.2,)),
        listener.Heard(200, 2.0, 30, ttft_s=0.7, ttfa_s=1.2, audio_s=2.0, rtf=0.8, pauses_s=(0.01, 0.02)),
        listener.Heard(503, 0.1),
        listener.Heard(0, 0.1),
    ]
    row = serve.summary("x", heard, 4.0)
    assert (row.questions, row.answered, row.refused, row.tokens_per_s, row.pauses) == (4, 2, 1, 10.0, 3)
    assert row.continuous == 0.5 and row.ttft_s == pytest.approx((0.6, 0.7, 0.7))
    assert "x: 1 questions refused, 1 lost" in serve.verdicts([], [row])


@pytest.mark.slow
def test_bench(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    rows = ["--dialogues", "1", "--dialogues", "2", "--rate", "20", "--questions", "3", "--max-new-tokens", "30"]
    given = ["--", "--device", "cpu", "--max-context", "2600", "--repetition-penalty", "1", "--window-penalty", "1"]
    command = [COVO_BENCH, "serve", "--ckpt", convert_tiny("float32"), *rows, "--json", report, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    by_load = {row["load"]: row for row in found["rows"]}
    assert list(by_load) == [
        *("1 at a time", "2 at a time", "20 a second", "--batch, 1 side by side", "--batch, 2 side by side"),
    ]
    assert all(row["answered"] == row["questions"] == 3 and row["tokens_per_s"] > 0 for row in by_load.values())
    assert all(by_load[load]["ttfa_s"][0] >= by_load[load]["ttft_s"][0] > 0 for load in list(by_load)[:3])
    assert all(one["tokens"] <= 30 and one["audio_s"] > 0 for ones in found["questions"].values() for one in ones)
    assert "2 at a time: " in done.stdout and "of the tokens/s of --batch, 2 side by side" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "expected --ckpt to start a server, or --url"),
        (("--ckpt", "x", "--url", "http://x"), 2, "expected --ckpt"),
        (("--url", "localhost:8000"), 2, "--url is http://HOST:PORT"),
        (("--url", "http://127.0.0.1:9"), 1, "a first question was answered with status none"),
        (("--url", "http://HOST:PORT"), 1, "a first question was answered with status none"),
        (("--url", "http://127.0.0.1:9", "--api-key", "“key”"), 1, "a first question was answered with status none"),
        (("--ckpt", "nowhere", "--dialogues", "1"), 1, "nowhere: no such folder"),
        (("--url", "http://127.0.0.1:9", "--wav", "nowhere.wav"), 1, "nowhere.wav"),
    ],
)
def test_what_cannot_be_measured(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = subprocess.run([COVO_BENCH, "serve", *arguments], capture_output=True, text=True)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_of_several_keys_the_first_one_is_sent() -> None:
    """As covo-serve splits them."""
    sent: list[str | None] = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.headers["authorization"])
            self.send_error(401)

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        command = [COVO_BENCH, "serve", "--url", f"http://127.0.0.1:{server.server_port}"]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COVO_API_KEY": "first second"}
        )
        thread.join()
    assert (done.returncode, sent) == (1, ["Bearer first"]) and "status 401" in done.stderr
