"""covo-serve on two ranks, processes over gloo: it answers as on one, and it ends when one of them is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serve.harness import CHINESE, ENGLISH, MODEL, program, serving, spoken

from covo_npu.runtime import CovoAudio, Session
from covo_npu.runtime.ranks import RankError

ON_RANKS = ("--device", "cpu", "--dtype", "float32", "--max-context", "2600", "--tp", "2", "--text-only")
END_S = 30.0  # what is promised: until then the server is not ready, and all ranks have ended
TOKENS = 60
# The tiny model repeats itself here until it is stopped.
ENDLESS: dict[str, Any] = {
    "messages": [spoken(CHINESE)],
    "extra_body": {"repetition_penalty": 1.0, "window_penalty": 1.0},
}


@pytest.fixture(scope="module")
def two_ranks(convert_tiny: Callable[..., Path]) -> Path:
    return convert_tiny("float32", 2)


@pytest.fixture
def server(two_ranks: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with two slots in a process group of its own, and its address."""
    options = ("--ckpt", two_ranks, *ON_RANKS, "--slots", "2")
    with program(*options, stderr=subprocess.PIPE, start_new_session=True) as (process, url):
        yield process, url
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def follower(process: subprocess.Popen[str]) -> int:
    """Return the process of rank 1."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def reply(url: str, **asked: Any) -> str:
    """Return the text of a reply, or the code of the error in its place."""
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
            return client.chat.completions.create(model=MODEL, **asked).choices[0].message.content or ""
    except openai.APIStatusError as error:
        return str(error.code)


def two_under_way(clients: ThreadPoolExecutor, url: str, **asked: Any) -> list[Future[str]]:
    """Return replies of which none is complete when this returns."""
    replies = [clients.submit(reply, url, **asked) for _ in range(2)]
    with httpx2.Client(timeout=60) as asking:
        while "covo_num_requests_running 2.0" not in asking.get(f"{url}/metrics").text:
            time.sleep(0.02)
    return replies


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/ready", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


def test_dialogues_side_by_side_are_those_of_one_rank(
    server: tuple[subprocess.Popen[str], str], clients: ThreadPoolExecutor, convert_tiny: Callable[..., Path]
) -> None:
    _, url = server
    one = CovoAudio.load(convert_tiny("float32"), device="cpu", max_context=2600, speech=False)
    paths = (ENGLISH, CHINESE, ENGLISH)
    asked = [clients.submit(reply, url, messages=[spoken(path)], max_completion_tokens=TOKENS) for path in paths]
    expected = [Session(one, mode="a2t", max_new_tokens=TOKENS).say(path).text for path in paths]
    assert [found.result() for found in asked] == expected and expected[0] != expected[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "why"),
    [(signal.SIGKILL, "has ended (signal 9)"), (signal.SIGSTOP, "gives no sign of life")],
)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "answering"])
def test_it_ends_when_a_rank_is_gone(
    server: tuple[subprocess.Popen[str], str], clients: ThreadPoolExecutor, number: int, why: str, busy: bool
) -> None:
    process, url = server
    replies = two_under_way(clients, url, **ENDLESS) if busy else []
    end = time.monotonic() + END_S
    os.kill(follower(process), number)
    while is_ready(url):
        assert time.monotonic() < end, "it is still ready"
        time.sleep(0.02)
    assert process.wait(end - time.monotonic()) == 1
    assert process.stderr is not None
    told = [line for line in process.stderr.read().splitlines() if "rank" in line]
    assert len(told) == 1 and told[0].partition(": ")[2] == f"rank 1 of 2 {why}: all ranks are ended"
    for found in replies:
        with contextlib.suppress(openai.APIConnectionError):  # of a process that could not wait for it
            assert found.result() == "failed"


def test_what_clients_leave_behind_needs_no_ranks(model: CovoAudio) -> None:
    """Their replies are cancelled, which moves rows of the cache, where that can still be done."""

    def needs_ranks() -> None:
        raise RankError("gone")

    with serving(model) as running:
        worker, done = running.service.worker, threading.Event()
        worker.post(needs_ranks)
        worker.lose(RankError("gone"))
        worker.post(needs_ranks)
        worker.post(done.set)
        assert done.wait(30) and not is_ready(running.url)


def test_a_signal_to_all_processes_lets_replies_end(
    server: tuple[subprocess.Popen[str], str], clients: ThreadPoolExecutor
) -> None:
    """As a service manager sends it: the other rank is needed until the last reply is complete."""
    process, url = server
    replies = two_under_way(clients, url, **ENDLESS, max_completion_tokens=200)
    os.killpg(process.pid, signal.SIGTERM)
    assert replies[0].result() == replies[1].result() and len(replies[0].result()) > 100
    assert process.wait(60) == 0


@pytest.mark.slow
def test_torchrun_starts_the_ranks_as_well(two_ranks: Path) -> None:
    """Only rank 0 listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "covo_npu.serve.cli", "--ckpt", str(two_ranks), *ON_RANKS, "--port", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None and f"http://127.0.0.1:{port}/" in process.stdout.readline()
            assert [process.stdout.readline()[:14] for _ in range(2)] == ["  rank 0, cpu:", "  rank 1, cpu:"]
            assert reply(f"http://127.0.0.1:{port}", messages=[spoken(ENGLISH)], max_completion_tokens=5)
        finally:
            process.terminate()
            process.wait(60)
