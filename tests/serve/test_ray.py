"""Replicas on a local Ray: they answer as one server does, and go on when one of them is killed, added or replaced."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import ray
from click.testing import CliRunner
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from serve.harness import CHINESE, ENGLISH, MODEL, program, spoken
from serve.talk import Talk, transcript

from covo_npu.kernels.errors import BackendError, CovoError
from covo_npu.runtime import CovoAudio, Session, audio
from covo_npu.serve import cli
from covo_npu.serve import ray as replicas
from covo_npu.serve.ray import APP, SESSION_HEADER, Replica, app, needs
from covo_npu.serve.worker import FAILED

pytestmark = pytest.mark.slow

KEY = "key-1"
SPEECH: dict[str, Any] = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
# The tiny model repeats itself here until it is stopped.
ENDLESS: dict[str, Any] = {
    "messages": [spoken(CHINESE)],
    "extra_body": {"repetition_penalty": 1.0, "window_penalty": 1.0},
}
WAIT_S = 60.0
NAMES = re.compile(r"SERVE_REPLICA::covo#covo#\w+")


def said(ckpt: Path, **options: Any) -> dict[str, Any]:
    """What the replicas are told, as `serve run` is."""
    return {
        "ckpt": str(ckpt),
        "device": "cpu",
        "dtype": "float32",
        "products": "pytorch",  # measured in each process, it may end otherwise
        "max_context": 2600,
        "threads": 1,
        "api_key": [KEY],
        "slots": 2,
        "replicas": 2,
        **options,
    }


@dataclass
class Running:
    """Replicas that answer."""

    url: str
    process: subprocess.Popen[str]

    def client(self, session: str | None = None, **options: Any) -> openai.OpenAI:
        """The official client; it tries once unless told otherwise. session: all of its requests have this id."""
        headers = {SESSION_HEADER: session} if session else {}
        options = {"max_retries": 0, "timeout": WAIT_S, "api_key": KEY, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", default_headers=headers, **options)

    def answered(self, session: str) -> int:
        """How many questions the replica of a session has answered."""
        request = urllib.request.Request(f"{self.url}/metrics", headers={SESSION_HEADER: session})
        text = urllib.request.urlopen(request).read().decode()
        return int(sum(map(float, re.findall(r"^covo_requests_success_total\{.*\} (\S+)$", text, re.M))))

    def two_sessions(self) -> tuple[str, str]:
        """Ids of sessions that live in different replicas."""
        first = f"first-{time.monotonic()}"
        ask(self.client(first))
        before = self.answered(first)
        for n in range(64):
            other = f"other-{n}-{time.monotonic()}"
            ask(self.client(other))
            if self.answered(first) == before:
                return first, other
            before = self.answered(first)
        raise AssertionError("all sessions are at one replica")


def ask(client: openai.OpenAI, **options: Any) -> Any:
    asked = {"model": MODEL, "messages": [spoken(ENGLISH)], "max_completion_tokens": 5, **options}
    return client.chat.completions.create(**asked)


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def states() -> dict[str, int]:
    """How many replicas are in which state; none while Ray reads what it is told."""
    deployments = serve.status().applications[APP].deployments
    found = deployments[APP].replica_states if deployments else {}
    return {str(getattr(state, "value", state)): count for state, count in found.items()}


def names() -> set[str]:
    """The actors of the replicas."""
    return {
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if NAMES.fullmatch(actor["name"])
    }


@pytest.fixture(scope="module")
def ckpt(convert_tiny: Callable[[str], Path]) -> Path:
    return convert_tiny("float32")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray on this machine, to which the tests are connected, too."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patched:
        for who in ("HANDLE", "REPLICA"):  # tell the autoscaler more often than every ten seconds
            patched.setenv(f"RAY_SERVE_{who}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = ray.init(
            "local", num_cpus=4, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False
        )
        signal.signal(signal.SIGTERM, handler)  # which Ray has replaced
        yield started.address_info["gcs_address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def running(cluster: str, ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two replicas, started by covo-serve on the Ray of the tests. It ends well after all that was done to them."""
    words = [word for name, value in said(ckpt).items() for word in replicas._spelled(replicas._option(name), value)]
    log = tmp_path_factory.mktemp("ray") / "stderr"
    with log.open("w") as stderr:
        environment = {**os.environ, "RAY_ADDRESS": cluster}
        with program("--ray", *words, stderr=stderr, env=environment) as (process, url):
            yield Running(url, process)
            process.terminate()
            assert process.wait(WAIT_S) == 0
    assert APP not in serve.status().applications
    assert "Traceback" not in log.read_text()


# --- they answer


def test_replies_are_those_of_one_server_and_spread_over_both(running: Running, model: CovoAudio) -> None:
    expected = Session(model, max_new_tokens=40).say(ENGLISH)
    sessions = running.two_sessions()
    before = [running.answered(session) for session in sessions]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: ask(running.client(), max_completion_tokens=40, **SPEECH), range(16)))
    assert {completion.choices[0].message.audio.transcript for completion in found} == {expected.text}
    assert {completion.usage.completion_tokens for completion in found} == {len(expected.tokens)}
    answered = [running.answered(session) - n for session, n in zip(sessions, before, strict=True)]
    assert sum(answered) == 16 and min(answered) >= 4


def test_a_stream_comes_in_pieces(running: Running, model: CovoAudio) -> None:
    client, text, times = running.client(), "", []
    stream = ask(client, max_completion_tokens=40, stream=True)
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        times.append(time.monotonic())
    assert text == Session(model, mode="a2t", max_new_tokens=40).say(ENGLISH).text and len(times) > 4


def test_a_dialogue_stays_where_its_session_is(running: Running) -> None:
    """By its id it goes on at one replica; at the other one the error says where it may be."""
    here, there = running.two_sessions()
    first = ask(running.client(here), **SPEECH)
    messages = [
        spoken(ENGLISH),
        {"role": "assistant", "audio": {"id": first.choices[0].message.audio.id}},
        spoken(CHINESE),
    ]
    for _ in range(4):
        assert ask(running.client(here), messages=messages).usage.prompt_tokens_details.cached_tokens > 200
    with pytest.raises(openai.NotFoundError, match="another replica") as caught:
        ask(running.client(there), messages=messages)
    assert caught.value.code == "dialogue_not_found" and SESSION_HEADER in str(caught.value)


def test_realtime_the_page_and_their_secrets(running: Running, model: CovoAudio) -> None:
    """A secret of one replica opens a session at any; sockets stay at theirs; the page comes with its headers."""
    secret = running.client().realtime.client_secrets.create().value
    for _ in range(6):
        with running.client(api_key=secret).realtime.connect(model=MODEL) as connection:
            Talk(connection)
    with running.client(api_key=secret).realtime.connect(model=MODEL) as connection:
        talk = Talk(connection)
        talk.update(type="realtime", turn_detection=None, max_output_tokens=30)
        english = audio.to_pcm16(model.waveform(ENGLISH))
        chat = Session(model, max_new_tokens=30)
        for _ in range(2):  # two rounds of one dialogue
            expected = chat.say(np.frombuffer(english, "<i2") / np.float32(32768), sample_rate=24_000)
            assert transcript(talk.ask(english)) == expected.text
    with pytest.raises(Exception, match="401"), running.client(api_key="ek_x").realtime.connect(model=MODEL):
        pass
    with httpx2.Client() as browser:
        page = browser.get(f"{running.url}/")
        assert page.status_code == 200 and "<html" in page.text and "frame-ancestors 'none'" in str(page.headers)
        assert "javascript" in browser.get(f"{running.url}/app.js").headers["content-type"]
        assert browser.get(f"{running.url}/ready").json() == {"status": "ready"}
        assert browser.get(f"{running.url}/v1/models").status_code == 401


# --- they change


class Load:
    """Questions, one after the other from each of some clients, until it is left."""

    def __init__(self, running: Running, clients: int, **options: Any) -> None:
        self._running, self._options, self._stop = running, options, threading.Event()
        self.texts: list[str] = []
        self.errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        with self._running.client(**self._options) as client:
            while not self._stop.is_set():
                try:
                    self.texts.append(ask(client, max_completion_tokens=30).choices[0].message.content)
                except openai.APIError as error:
                    self.errors.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.texts) >= len(self._threads), "the first answers")
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_killed_replica_takes_only_its_own_with_it_and_comes_back(running: Running, model: CovoAudio) -> None:
    """Streams at the other one end as they would have; who retries is answered; then there are two again."""
    sessions, long = running.two_sessions(), {**ENDLESS, "max_completion_tokens": 1500}
    whole = heard(ask(running.client(), stream=True, **long))
    found: dict[str, list[str | None]] = {session: [] for session in sessions}
    begun = threading.Barrier(5)

    def listen(session: str) -> None:
        with running.client(session) as client:
            try:
                found[session].append(heard(ask(client, stream=True, **long), begun))
            except (openai.APIError, httpx2.TransportError):
                found[session].append(None)

    threads = [threading.Thread(target=listen, args=(session,)) for session in sessions * 2]
    victim = sorted(names())[0]
    with Load(running, 2, max_retries=8) as load:
        for thread in threads:
            thread.start()
        begun.wait(WAIT_S)
        ray.kill(ray.get_actor(victim, namespace="serve"))
        for thread in threads:
            thread.join()
        until(lambda: victim not in names() and states() == {"RUNNING": 2}, "a new replica")
    lost, other = sorted(sessions, key=lambda session: found[session] != [None, None])
    assert found[lost] == [None, None]
    assert all(text == whole for text in found[other]) and len(whole) > 1000
    assert not load.errors and set(load.texts) == {Session(model, mode="a2t", max_new_tokens=30).say(ENGLISH).text}
    ask(running.client(lost))


def heard(stream: Any, begun: threading.Barrier | None = None) -> str:
    """The text of a stream; when three pieces have come, others are waited for."""
    text = ""
    for n, chunk in enumerate(stream):
        text += chunk.choices[0].delta.content or ""
        if n == 3 and begun:
            begun.wait(WAIT_S)
    return text


def deploy(replicas: int | None, args: dict[str, Any]) -> None:
    """Tell Ray Serve what a RayService or `serve deploy` tells it."""
    application = {"name": APP, "import_path": "covo_npu.serve.ray:app", "route_prefix": "/", "args": args,
                   "deployments": [{"name": APP, "num_replicas": replicas}] if replicas else []}  # fmt: skip
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))


def test_a_redeploy_loses_no_request(running: Running, ckpt: Path) -> None:
    """Other options: all replicas are replaced, one after the other."""
    old = names()
    with Load(running, 4) as load:
        deploy(2, said(ckpt, slots=3))
        until(lambda: states() == {"RUNNING": 2} and not old & names(), "new replicas")
        done = len(load.texts)
        until(lambda: len(load.texts) > done + 4, "answers of the new ones")
    assert not load.errors


def test_more_and_fewer_replicas(running: Running, ckpt: Path) -> None:
    """Those that stay are not started anew, and nothing is lost of the one that goes."""
    two = names()
    with Load(running, 4) as load:
        deploy(3, said(ckpt, slots=3))
        until(lambda: states() == {"RUNNING": 3}, "one replica more")
        three = names()
        deploy(2, said(ckpt, slots=3))
        until(lambda: states() == {"RUNNING": 2}, "one replica less")
    assert two < three and names() < three
    assert not load.errors and load.texts


def test_load_brings_a_replica(running: Running, ckpt: Path) -> None:
    deploy(None, said(ckpt, slots=1, max_replicas=3, upscale_s=0.5, downscale_s=600))
    until(lambda: states() == {"RUNNING": 2}, "two replicas")
    with Load(running, 6) as load:
        until(lambda: states() == {"RUNNING": 3}, "a third replica")
    assert not load.errors


# --- what is said of them, without a Ray


def test_options_become_a_deployment(ckpt: Path) -> None:
    built = app(said(ckpt, queue=5, sessions=7, drain_s="90", text_only="true", check=False, model_name=["a", "b"]))
    deployment = built._bound_deployment
    assert (deployment.name, deployment.num_replicas, deployment.ray_actor_options) == (APP, 2, {"num_cpus": 1})
    assert deployment.max_ongoing_requests == 2 + 5 + 7 + replicas.SHORT_REQUESTS
    [launch] = deployment.init_args
    assert (launch.ckpt, launch.threads, launch.options.speech, launch.options.check) == (ckpt, 1, False, False)
    assert launch.settings.model_names == ("a", "b") and launch.settings.session_header == SESSION_HEADER
    # Ray kills a replica that takes longer: the time to notice, the replies under way, and their connections' end.
    config = deployment._deployment_config
    assert config.graceful_shutdown_timeout_s > launch.settings.drain_s + replicas.UNWATCHED_S == 90 + 15
    assert pickle.loads(pickle.dumps(launch)) == launch


def test_options_without_a_value_are_not_given(ckpt: Path) -> None:
    """As YAML has them, and templates of it: null was a key and a system prompt of four letters."""
    nothing = dict.fromkeys(("api_key", "system", "voices", "max_replicas", "insecure"))
    [launch] = app(said(ckpt, **nothing))._bound_deployment.init_args
    assert (launch.settings.api_keys, launch.settings.ask.system, launch.voices) == ((), None, None)


def test_autoscaling_by_slots(ckpt: Path) -> None:
    deployment = app(said(ckpt, slots=6, max_replicas=9, upscale_s=3, downscale_s=40))._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 9, 6)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (3, 40)
    assert app(said(ckpt, max_replicas=2))._bound_deployment._deployment_config.autoscaling_config is None


@pytest.mark.parametrize(
    ("device", "kind", "resources"),
    [
        ("npu", "npu:0", {"num_cpus": 4, "resources": {"NPU": 1}}),
        ("npu:0", "npu:0", {"num_cpus": 4, "resources": {"NPU": 1}}),
        ("cuda", "cuda:0", {"num_cpus": 4, "num_gpus": 1}),
        ("cpu", "cpu", {"num_cpus": 4}),
    ],
)
def test_one_card_a_replica(ckpt: Path, device: str, kind: str, resources: dict[str, Any]) -> None:
    """Ray hides the other cards, so it is always the first that is there."""
    deployment = app(said(ckpt, device=device, threads=4))._bound_deployment
    assert deployment.ray_actor_options == resources
    assert deployment.init_args[0].options.device == kind
    assert needs("npu", None)["num_cpus"] == 1


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"tp": 2}, 2),
        ({"speech_device": "npu:1"}, 2),
        ({"tp": 4, "encoder_device": "npu:4"}, 5),
        ({"tp": 2, "speech_device": "npu"}, 2),
        ({"speech_device": "cpu"}, 1),
    ],
)
def test_as_many_cards_as_ranks_and_stages_have(ckpt: Path, options: dict[str, Any], count: int) -> None:
    deployment = app(said(ckpt, device="npu", **options))._bound_deployment
    assert deployment.ray_actor_options["resources"] == {"NPU": count}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"host": "0.0.0.0"}, "--host: Ray Serve listens"),
        ({"slots": 0}, "slots must be positive"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas must be at least"),
        ({"no_such_option": 1}, "--no-such-option"),
        ({"device": "npu:3"}, "Ray chooses the card"),
        ({"device": "tpu"}, "unknown device"),
    ],
)
def test_wrong_arguments_are_told(ckpt: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, BackendError), match=says):
        app(said(ckpt, **options))


def test_starts_that_fail_before_ray(
    ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = CliRunner().invoke(cli.command, ["--ckpt", str(ckpt), "--replicas", "2"])
    assert done.exit_code == 2 and "need --ray" in done.output
    assert cli.main(["--ckpt", str(tmp_path / "none"), "--ray", "--port", "0"]) == 1
    assert str(tmp_path / "none") in capfd.readouterr().err
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["--ckpt", str(ckpt), "--ray"]) == 1
    assert "covo-npu[ray]" in capfd.readouterr().err


def test_too_little_of_a_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "NPU": 2.0})
    replicas._require_resources(needs("npu", 4), 2)
    for kind, threads, count, says in (("npu", 1, 3, "3 NPU, found 2"), ("cpu", 3, 3, "9 CPU, found 8"),
                                       ("cuda", 1, 1, "1 GPU, found 0")):  # fmt: skip
        with pytest.raises(CovoError, match=says):
            replicas._require_resources(needs(kind, threads), count)


def test_paths_are_those_of_who_started(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ckpt.parent)
    [launch] = app(said(Path(ckpt.name), voices="voices", voice="mine"))._bound_deployment.init_args
    assert (launch.ckpt, launch.voices, launch.speech.voice) == (ckpt, ckpt.parent / "voices", ckpt.parent / "mine")


def test_a_replica_alone(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is unhealthy when its engine has failed; its sessions end when nobody asks any more; damage is told."""
    monkeypatch.setattr(replicas, "UNWATCHED_S", 1.5)
    [launch] = app(said(ckpt))._bound_deployment.init_args

    class Open:
        ended = 0

        def end(self) -> None:
            self.ended += 1

    async def live() -> None:
        replica, session = Replica(launch), Open()
        replica._service.sessions.add(session)
        for _ in range(5):
            await replica.check_health()
            await asyncio.sleep(0.5)
        assert not session.ended
        await asyncio.sleep(3)
        assert session.ended
        replica._service.sessions.clear()
        replica._service.worker.state = FAILED
        with pytest.raises(RuntimeError, match="has failed"):
            await replica.check_health()
        await replica.__del__()
        monkeypatch.delattr(Replica, "__del__")  # which Python would call once more, and not await
        assert replica._watch.cancelled() or replica._watch.cancelling()

    asyncio.run(live())
    gc.collect()


# --- a Ray of its own


def test_replicas_that_do_not_start(ckpt: Path, tmp_path: Path) -> None:
    """On a Ray that covo-serve starts: damaged weights are one message, and Ray is gone afterwards."""
    for path in ckpt.iterdir():
        data = bytearray(path.read_bytes())
        if path.name.startswith("llm"):
            data[-1000] ^= 1
        (tmp_path / path.name).write_bytes(data)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [Path(os.sys.executable).with_name("covo-serve"), "--ray", "--ckpt", tmp_path, "--device", "cpu",
         "--threads", "1", "--port", "0"], env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("covo-serve: the replicas do not start: ") and "checksum" in last and "llm" in last
