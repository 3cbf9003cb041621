"""covo-serve as users start it: what it answers is what covo-run answers, how it starts, and how it ends under load."""

from __future__ import annotations

import base64
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serve.harness import CHINESE, ENGLISH, MODEL, program, spoken
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from covo_npu.runtime.cli.run import main as covo_run_main
from covo_npu.serve.cli import main

BIN = Path(sys.executable).parent
# Who multiplies is measured in each process, and may end otherwise, and so may the number of threads: other bits.
FLOAT32 = ("--device", "cpu", "--dtype", "float32", "--products", "pytorch", "--threads", "2", "--max-context", "2600")
SPEECH: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
WAV_HEADER_BYTES = 44
# A penalty below 1 rewards the last id: the model repeats it until it is stopped.
ENDLESS: dict[str, Any] = {
    "messages": [spoken(CHINESE)],
    "extra_body": {"repetition_penalty": 1.0, "window_penalty": 0.1, "window": 1},
}
STREAM: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}


@pytest.fixture(scope="module")
def ckpt(convert_tiny: Callable[[str], Path]) -> Path:
    return convert_tiny("float32")


@pytest.fixture(scope="module")
def url(ckpt: Path) -> Iterator[str]:
    with program("--ckpt", ckpt, *FLOAT32, stderr=subprocess.DEVNULL) as (_, found):
        yield found


def client_of(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", **{"max_retries": 0, "timeout": 60.0, **options})


def covo_run(ckpt: Path, folder: Path, *options: str, questions: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The rounds of a dialogue as covo-run writes them; `wav` is what the file holds, None without speech."""
    arguments = ["--ckpt", ckpt, *FLOAT32, *options, "--json", folder / "report.json", "--output", folder, *questions]
    assert covo_run_main([*map(str, arguments), "--quiet"]) == 0
    rounds = json.loads((folder / "report.json").read_text("utf-8"))["rounds"]
    return [{**found, "wav": found["wav"] and Path(found["wav"]).read_bytes()} for found in rounds]


# --- the same replies

# What covo-run is told, and the same in OpenAI's words.
ASKED: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("--max-new-tokens", "120"), {"max_completion_tokens": 120}),
    (("--max-new-tokens", "60", "--seed", "11", "--temperature", "0.9"),
     {"max_completion_tokens": 60, "seed": 11, "temperature": 0.9}),
    (("--max-new-tokens", "70", "--seed", "12", "--temperature", "1.3", "--top-p", "0.7", "--top-k", "30",
      "--repetition-penalty", "1.2", "--window-penalty", "1.1", "--window", "5"),
     {"max_completion_tokens": 70, "seed": 12, "temperature": 1.3, "top_p": 0.7,
      "extra_body": {"top_k": 30, "repetition_penalty": 1.2, "window_penalty": 1.1, "window": 5}}),
)  # fmt: skip


def test_every_reply_is_that_of_covo_run(ckpt: Path, url: str, tmp_path: Path) -> None:
    """Dialogues of two rounds, each with settings of its own, side by side: text, tokens and the WAV byte for byte."""
    found: dict[int, list[Any]] = {n: [] for n in range(len(ASKED))}

    def talk(n: int) -> None:
        with client_of(url) as client:
            messages: list[Any] = []
            for path in (ENGLISH, CHINESE):
                messages.append(spoken(path))
                completion = client.chat.completions.create(model=MODEL, messages=messages, **SPEECH, **ASKED[n][1])
                found[n].append(completion)
                messages.append({"role": "assistant", "audio": {"id": completion.choices[0].message.audio.id}})

    threads = [threading.Thread(target=talk, args=(n,)) for n in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts, spoken_rounds = set(), 0
    for n, (options, _) in enumerate(ASKED):
        rounds = covo_run(ckpt, tmp_path / str(n), *options, questions=(ENGLISH, CHINESE))
        assert len(rounds) == len(found[n]) == 2
        for round_, completion in zip(rounds, found[n], strict=True):
            [choice] = completion.choices
            assert choice.message.audio.transcript == round_["text"]
            wav = base64.b64decode(choice.message.audio.data)
            assert wav == round_["wav"] if round_["samples"] else len(wav) == WAV_HEADER_BYTES
            spoken_rounds += round_["samples"] > 0
            assert completion.usage.completion_tokens == len(round_["tokens"])
            assert completion.covo["stop_reason"] == round_["stop_reason"]
            texts.add(round_["text"])
    assert len(texts) == 2 * len(ASKED) and spoken_rounds >= 4  # the settings made a difference


def test_it_says_where_it_is_and_does_as_its_command_line_says(ckpt: Path, tmp_path: Path) -> None:
    """What the command line says holds where a request says nothing. Ctrl-C ends it."""
    options = (
        "--max-new-tokens",
        "40",
        "--seed",
        "5",
        "--temperature",
        "0.8",
        "--system",
        "Sing.",
        "--flow-steps",
        "3",
    )
    [expected] = covo_run(ckpt, tmp_path, *options, questions=(ENGLISH,))
    command = [BIN / "covo-serve", "--ckpt", ckpt, *FLOAT32, *options, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        found = re.search(r"ready in \d+\.\d\d s; talk to it at (http://127\.0\.0\.1:\d+)/$", line)
        assert found and "cpu" in line and "float32" in line, line
        with client_of(found[1]) as client:
            message = (
                client.chat.completions.create(model=MODEL, messages=[spoken(ENGLISH)], **SPEECH).choices[0].message
            )
            assert message.audio.transcript == expected["text"]
            assert base64.b64decode(message.audio.data) == expected["wav"]
    finally:
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0 and "POST /v1/chat/completions 200" in log and "Traceback" not in log
    assert expected["text"][:8] not in log


# --- starts that fail


@pytest.fixture
def start(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function: arguments -> exit code of covo-serve, and what it said on stderr."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, said = capfd.readouterr()
        assert "Traceback" not in said and out == ""
        return code, said

    return run


def test_wrong_starts_are_told(start: Callable[..., tuple[int, str]], ckpt: Path, tmp_path: Path) -> None:
    use = ("--ckpt", ckpt, *FLOAT32)
    code, said = start(*use, "--host", "0.0.0.0")
    assert code == 2 and "--api-key" in said and "--insecure" in said
    code, said = start(*use, "--slots", "0")
    assert code == 2 and "slots" in said
    code, said = start(*use, "--tls-cert", tmp_path / "cert.pem")
    assert code == 2 and "--tls-key" in said
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("no PEM")
    code, said = start(*use, "--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem")
    assert code == 1 and "PEM" in said
    code, said = start(*use, "--tls-cert", tmp_path / "none.pem", "--tls-key", tmp_path / "key.pem")
    assert code == 1 and "none.pem" in said
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = start(*use, "--port", str(taken.getsockname()[1]))
    assert code == 1 and "cannot listen at 127.0.0.1:" in said
    code, said = start("--ckpt", tmp_path / "none", "--port", "0")
    assert code == 1 and str(tmp_path / "none") in said
    code, said = start(*use, "--port", "0", "--voices", tmp_path / "voices")
    assert code == 1 and "voices" in said


def test_damaged_weights_never_answer(start: Callable[..., tuple[int, str]], ckpt: Path, tmp_path: Path) -> None:
    """The warm-up waits for the checksums: a server whose weights are damaged ends before it is ready."""
    for path in ckpt.iterdir():
        data = bytearray(path.read_bytes())
        if path.name.startswith("llm"):
            data[-1000] ^= 1
        (tmp_path / path.name).write_bytes(data)
    code, said = start("--ckpt", tmp_path, *FLOAT32, "--port", "0")
    assert code == 1 and "llm" in said and "checksum" in said


@pytest.mark.parametrize(
    ("options", "closed", "told"),
    [
        ((), "> >(:)", ""),  # as head ends: quietly, like all commands
        ((), "> /dev/full", "covo-serve: [Errno 28] No space left on device"),
        (("--json", "/dev/full"), "", "/dev/full"),
    ],
    ids=["closed pipe", "full disk", "full disk of the report"],
)
def test_a_server_that_cannot_say_where_it_is_ends(
    ckpt: Path, options: tuple[str, ...], closed: str, told: str
) -> None:
    """Nobody would know its address; and it must not say that it is ready when it answers nothing."""
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", BIN / "covo-serve", "--ckpt", ckpt, *FLOAT32, "--text-only"]
    done = subprocess.run([*command, "--port", "0", *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("covo-serve: ")]
    assert len(said) == bool(told) and told in "".join(said)


def test_text_only_and_the_log_as_json(ckpt: Path) -> None:
    options = ("--text-only", "--log", "json", "--api-key", "key-1", "--model-name", "a", "--model-name", "b")
    with program("--ckpt", ckpt, *FLOAT32, *options, stderr=subprocess.PIPE) as (process, url):
        with client_of(url) as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with client_of(url).with_options(api_key="key-1") as client:
            assert [model.id for model in client.models.list().data] == ["a", "b"]
            with pytest.raises(openai.BadRequestError, match="without speech"):
                client.chat.completions.create(model="a", messages=[spoken(ENGLISH)], **SPEECH)
            asked = {
                "messages": [spoken(ENGLISH)],
                "max_completion_tokens": 5,
                "extra_headers": {"x-request-id": "mine"},
            }
            assert client.chat.completions.create(model="b", **asked).choices[0].message.content
        process.terminate()
        _, log = process.communicate(timeout=60)
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "logger", "request_id", "message", "path", "status", "seconds"} <= set(lines[-1])
    [mine] = [line for line in lines if line["request_id"] == "mine"]
    assert (mine["status"], mine["path"], mine["method"]) == (200, "/v1/chat/completions", "POST")
    assert "key-1" not in log


def test_tls(ckpt: Path, tmp_path: Path) -> None:
    """A certificate of its own: clients that trust it talk and listen, by https and by wss."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key,
               "-out", cert]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    with program("--ckpt", ckpt, *FLOAT32, "--tls-cert", cert, "--tls-key", key, stderr=subprocess.DEVNULL) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=cert)
        with client_of(url, http_client=httpx2.Client(verify=trusting)) as client:
            asked = {"messages": [spoken(ENGLISH)], "max_completion_tokens": 5}
            assert client.chat.completions.create(model=MODEL, **asked).choices[0].message.content
        address = f"wss{url[5:]}/v1/realtime?model={MODEL}"
        with connect(address, ssl=trusting) as websocket:
            assert json.loads(websocket.recv())["type"] == "session.created"
        with pytest.raises(ssl.SSLCertVerificationError), connect(address):
            pass
        # No tickets of TLS 1.3: a client that reads and writes from two threads would lose its first request to them.
        plain = socket.create_connection(("127.0.0.1", httpx2.URL(url).port))
        with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            secure.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert secure.recv(12) == b"HTTP/1.1 200"
            assert secure.version() == "TLSv1.3"
            assert not secure.session.has_ticket


# --- its end


class Listener(threading.Thread):
    """A client that hears a streamed reply to its end, or to the error that ends it."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__()
        self._url, self._options = url, options
        self.begun = threading.Event()
        self.pcm, self.finish, self.error = b"", None, None
        self.start()

    def run(self) -> None:
        try:
            with client_of(self._url) as client:
                asked = {"model": MODEL, "messages": [spoken(ENGLISH)], **STREAM, **self._options}
                stream: Any = client.chat.completions.create(stream=True, **asked)
                for chunk in stream:
                    self.begun.set()
                    [choice] = chunk.choices
                    if choice.delta.audio and choice.delta.audio.data:
                        self.pcm += base64.b64decode(choice.delta.audio.data)
                    self.finish = choice.finish_reason or self.finish
        except openai.APIError as error:
            self.error = error
        finally:
            self.begun.set()


def test_sigterm_lets_replies_end_and_takes_no_more(ckpt: Path, url: str) -> None:
    whole = Listener(url, max_completion_tokens=200)
    whole.join()
    with program("--ckpt", ckpt, *FLOAT32, "--slots", "2", stderr=subprocess.PIPE) as (process, own):
        port = int(own.rpartition(":")[2])
        with connect(f"ws://127.0.0.1:{port}/v1/realtime?model={MODEL}") as websocket:
            listeners = [Listener(own, max_completion_tokens=200) for _ in range(6)]  # two are answered, four wait
            listeners[0].begun.wait(30)
            process.terminate()
            with httpx2.Client(timeout=60) as asking:
                while asking.get(f"{own}/ready").status_code != 503:
                    time.sleep(0.02)
            with client_of(own) as late, pytest.raises(openai.InternalServerError) as caught:
                late.chat.completions.create(model=MODEL, messages=[spoken(ENGLISH)])
            assert caught.value.code == "draining" and caught.value.response.headers["retry-after"]
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    websocket.recv(timeout=30)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
            for listener in listeners:
                listener.join()
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    assert [(listener.error, listener.finish, listener.pcm == whole.pcm) for listener in listeners] == [
        (None, whole.finish, True)
    ] * 6
    assert whole.pcm


def test_sigterm_does_not_wait_for_ever(ckpt: Path) -> None:
    """Replies that outlast --drain-s end with an error that the client can read."""
    options = ("--drain-s", "0", "--slots", "1")
    with program("--ckpt", ckpt, *FLOAT32, *options, stderr=subprocess.PIPE) as (process, url):
        listeners = [Listener(url, **ENDLESS) for _ in range(3)]
        with httpx2.Client(timeout=60) as asking:  # until all three have come
            end = time.monotonic() + 60
            while "covo_places_taken 3.0" not in asking.get(f"{url}/metrics").text:
                assert time.monotonic() < end
                time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 0
        for listener in listeners:
            listener.join()
        assert "Traceback" not in process.stderr.read()
    assert [getattr(listener.error, "code", None) for listener in listeners] == ["draining"] * 3


def test_clients_that_are_killed_give_their_places_back(url: str, tmp_path: Path) -> None:
    """kill -9 of a client in the middle of its reply, streamed and not: nothing of it stays."""
    for name, stream in (("stream", True), ("whole", False)):
        body = {"model": MODEL, "messages": ENDLESS["messages"], "stream": stream, **STREAM, **ENDLESS["extra_body"]}
        (tmp_path / name).write_text(json.dumps(body))

    asking = httpx2.Client(timeout=60)

    def metric(name: str) -> float:
        found = re.search(rf"^covo_{name} (\S+)$", asking.get(f"{url}/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    for name in ("stream", "whole"):
        command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
        clients = [
            subprocess.Popen([*command, "-d", f"@{tmp_path / name}"], stdout=subprocess.DEVNULL) for _ in range(10)
        ]
        end = time.monotonic() + 60
        while metric("num_requests_running") < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        for client in clients:
            client.kill()
            client.wait()
        end, gauges = time.monotonic() + 30, ("places_taken", "num_requests_running", "num_requests_waiting")
        while any(map(metric, gauges)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(metric, gauges))
    asking.close()
    with client_of(url) as client:
        asked = {"messages": [spoken(ENGLISH)], "max_completion_tokens": 5}
        assert client.chat.completions.create(model=MODEL, **asked).choices[0].message.content
