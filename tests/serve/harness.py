"""A server over real sockets: in this process, with its insides at hand, or as the program that users start."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from covo_npu.runtime import CovoAudio, Engine
from covo_npu.serve.server import Server, address, bind
from covo_npu.serve.service import Service
from covo_npu.serve.settings import Settings
from covo_npu.serve.worker import STARTING

AUDIO = Path(__file__).parents[1] / "data" / "audio"
ENGLISH, CHINESE, LONG = (
    AUDIO / f"{name}.wav" for name in ("question_en_48k_24bit", "question_zh_44k_stereo", "long_16k_over30s")
)
MODEL = "covo-audio-chat"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def spoken(*paths: Path, form: str = "wav") -> dict[str, Any]:
    """A user's message that holds audio files."""
    parts = [{"type": "input_audio", "input_audio": {"data": b64(path.read_bytes()), "format": form}} for path in paths]
    return {"role": "user", "content": parts}


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service
    server: Server
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        """The official client; it tries once unless told otherwise."""
        options = {"max_retries": 0, "timeout": 60.0, **options}
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, **options))
        return self.clients[-1]

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"covo_{name}", labels) or 0.0

    def idle(self, seconds: float = 30.0) -> bool:
        """Whether everything is given back, now or soon."""
        worker, engine = self.service.worker, self.service.worker.engine
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not (worker.busy or worker._streams or engine.speaking) and engine.free_slots == engine.num_slots:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(model: CovoAudio, **settings: Any) -> Iterator[Running]:
    """A server in this process that is ready."""
    service = Service(Engine(model, settings.get("slots", 4)), Settings(**{"slots": 4, **settings}))
    server = Server(service, None, lambda: None)
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started or service.worker.state == STARTING:
                time.sleep(0.005)
            running = Running(address(listener, "127.0.0.1", None), service, server)
            yield running
            for client in running.clients:
                client.close()
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
            service.close()


@contextlib.contextmanager
def program(*arguments: str | Path, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """covo-serve as a process that is ready, and its address; it is killed in the end if it still runs."""
    command = [Path(sys.executable).with_name("covo-serve"), *arguments, "--port", "0", "--json", "-", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        report = ""
        while not report.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, "covo-serve ended before it was ready"
            report += line
        yield process, json.loads(report)["url"]
    finally:
        process.kill()
        process.communicate()
