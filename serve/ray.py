"""Replicas of the server on Ray Serve: each has the whole application, a model and its HTTP interface.

covo-serve --ray starts them; so does `serve run covo_npu.serve.ray:app ckpt=DIR device=npu`, and a configuration of Ray
Serve with that import_path and the same args.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import click
import ray
import torch
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from starlette.types import ASGIApp

from covo_npu.kernels.device import DEVICE_NAME
from covo_npu.kernels.errors import BackendError, CovoError
from covo_npu.runtime.checkpoint.format import read_manifest
from covo_npu.runtime.options import LoadOptions
from covo_npu.serve.app import build
from covo_npu.serve.cli import PROG, command
from covo_npu.serve.launch import Launch
from covo_npu.serve.router import SessionRouter
from covo_npu.serve.server import CLOSING_S, Tls
from covo_npu.serve.settings import MIB, Fleet
from covo_npu.serve.worker import FAILED

APP = "covo"
SESSION_HEADER = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id")  # as Ray reads it
CARDS = {"npu": "NPU", "cuda": "GPU"}  # kind of device: Ray's name of the resource
SHORT_REQUESTS = 16  # a replica takes beside questions and sessions: /health, /metrics, files of the page
LISTEN_S = 0.5  # how often Ray is asked why a replica has failed
HEALTH_S = 5.0  # how often Ray asks a replica for its health
UNWATCHED_S = 15.0  # without such a question: Ray has taken it off its list
OBJECT_STORE_BYTES = 256 * MIB  # of a Ray of our own: requests pass through it
RETRY_S = 5
OUR_ERROR = re.compile(r"^\s*(?:covo_npu\.[\w.]+|\w*Error): (.+)$", re.M)  # the last line of its traceback
ADDRESS = {"--host", "--port", "--tls-cert", "--tls-key"}  # options that have no meaning where Ray listens


class Replica:
    """One server. It exists when it would answer a question at once: Ray sends nothing before."""

    def __init__(self, launch: Launch) -> None:
        """Load and warm up. Raises what Launch.service and the warm-up raise: Ray tries again, and says so."""
        if launch.threads:
            torch.set_num_threads(launch.threads)
        self._service = launch.service()
        started, worker = threading.Event(), self._service.worker
        worker.start(started.set)
        self._service.model.when_lost(worker.lose)
        started.wait()
        if worker.fault is not None:
            self._close()
            raise worker.fault
        self._asked = time.monotonic()
        self._watch = asyncio.create_task(self._end_sessions_unwatched())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, which Ray asks for."""
        return build(self._service)

    async def check_health(self) -> None:
        """Raise if the engine has failed, as /health and /ready say: Ray puts another replica in its place.

        /ready is 503 also while all places are taken. That is no fault: who comes then is told to come later.
        """
        self._asked = time.monotonic()
        if self._service.worker.state == FAILED:
            raise RuntimeError(str(self._service.worker.not_ready()))  # which other processes can read

    async def _end_sessions_unwatched(self) -> None:
        """End realtime sessions, when what is under way has, once Ray lets the replica go.

        Ray waits for open connections then, tells the replica nothing, and stops to ask for its health. Should that
        have another reason, clients connect again.
        """
        while True:
            await asyncio.sleep(1)
            if time.monotonic() - self._asked > UNWATCHED_S:
                for session in list(self._service.sessions):
                    session.end()

    async def __del__(self) -> None:
        """End, when Ray has waited for the replies under way."""
        if watch := getattr(self, "_watch", None):  # else it never started
            watch.cancel()
            await self._service.drain()
            self._close()

    def _close(self) -> None:
        self._service.close()
        self._service.model.close()


def application(launch: Launch, fleet: Fleet) -> serve.Application:
    """Return the application for Ray Serve. Raises BackendError for a device that replicas cannot have."""
    settings = dataclasses.replace(launch.settings, session_header=SESSION_HEADER)
    kind = _kind(launch.options.device)
    options = dataclasses.replace(launch.options, device=f"{kind}:0" if kind in CARDS else kind)
    launch = dataclasses.replace(launch.anywhere(), options=options, settings=settings)
    scaling: dict[str, Any] = {"num_replicas": fleet.replicas}
    if fleet.max_replicas not in (None, fleet.replicas):
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=fleet.replicas,
                max_replicas=fleet.max_replicas,
                target_ongoing_requests=settings.slots,
                upscale_delay_s=fleet.upscale_s,
                downscale_delay_s=fleet.downscale_s,
            )
        }
    deployment = serve.deployment(
        name=APP,
        **scaling,
        ray_actor_options=needs(kind, launch.threads, cards(launch.options)),
        # The replica itself refuses questions that find no place, with the time to wait; Ray holds back what is beyond.
        max_ongoing_requests=settings.places + settings.sessions + SHORT_REQUESTS,
        max_queued_requests=settings.places,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_S),
        graceful_shutdown_timeout_s=UNWATCHED_S + settings.drain_s + CLOSING_S,
        graceful_shutdown_wait_loop_s=1.0,
        health_check_period_s=HEALTH_S,
        logging_config={"enable_access_log": False},  # the server has its own
        request_router_config={
            "request_router_class": f"{SessionRouter.__module__}.{SessionRouter.__name__}",
            "request_router_kwargs": {"num_fallback_replicas": 0},  # a dialogue is at one replica, or nowhere
        },
    )
    return deployment(serve.ingress()(Replica)).bind(launch)


def needs(kind: str, threads: int | None, cards: int = 1) -> dict[str, Any]:
    """Return the resources of a replica, in Ray's words: cards of this kind, or CPUs for its threads.

    Ray hides the other cards from the replica; it is left to Ray alone which ones it sees.
    """
    if kind == "cpu":
        return {"num_cpus": threads or torch.get_num_threads()}
    held = {"num_gpus": cards} if kind == "cuda" else {"resources": {CARDS[kind]: cards}}
    return {"num_cpus": threads or 1, **held}


def cards(options: LoadOptions) -> int:
    """Return how many cards a replica has: its ranks', from 0 on, and those of encoder and speech by their numbers."""
    others = [DEVICE_NAME.fullmatch(name) for name in (options.encoder_device, options.speech_device) if name]
    return max(options.tp, *(int(match[3] or 0) + 1 for match in others if match), 1)


def _kind(device: str) -> str:
    """Return cpu, cuda or npu. auto: the first kind of card that the cluster has. Raises BackendError."""
    if device == "auto":
        there = ray.cluster_resources() if ray.is_initialized() else {}
        return next((kind for kind, name in CARDS.items() if there.get(name)), "cpu")
    match = DEVICE_NAME.fullmatch(device)
    if not match:
        raise BackendError(f"unknown device {device!r}; expected auto, cpu, cuda or npu")
    if int(match[3] or 0):
        raise BackendError(f"device {device}: Ray chooses the card of each replica; say --device {match[2]}")
    return match[1] or match[2]


def app(args: dict[str, Any]) -> serve.Application:
    """Return the application for `serve run` and Ray's configurations.

    args: the options of covo-serve without their dashes: ckpt, device, replicas, slots and so on, but for the address,
    which is Ray's. An option that may be given several times takes a list, a flag true or false; None is not given.
    Raises ValueError and CovoError.
    """
    if given := sorted(ADDRESS & {_option(name) for name in args}):
        raise ValueError(f"{', '.join(given)}: Ray Serve listens, where its http_options say")
    arguments = [word for name, value in args.items() for word in _spelled(_option(name), value)]
    try:
        built: serve.Application = command.main(
            ["--ray", *arguments], prog_name=PROG, standalone_mode=False, obj=application
        )
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    return built


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _spelled(option: str, value: Any) -> list[str]:
    """Return the words of an option on a command line; none for None, which is YAML's null."""
    if value is None:
        return []
    if isinstance(value, list):
        return [word for one in value for word in _spelled(option, one)]
    value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if value is True:
        return [option]
    if value is False:
        return [no for param in command.params if option in param.opts for no in param.secondary_opts]
    return [f"{option}={value}"]


@contextlib.contextmanager
def running(launch: Launch, fleet: Fleet, host: str, port: int, tls: Tls | None) -> Iterator[None]:
    """Run replicas while the context lasts; it is entered when all of them would answer. Raises CovoError.

    RAY_ADDRESS names the Ray cluster to use; without it one is started on this machine, and ended. What Ray prints goes
    to stderr.
    """
    own = "RAY_ADDRESS" not in os.environ
    if own:
        read_manifest(launch.ckpt)  # told before all else
    with contextlib.redirect_stdout(sys.stderr), _connected(own):
        target = application(launch, fleet)
        if own:
            kind = _kind(launch.options.device)
            _require_resources(needs(kind, launch.threads, cards(launch.options)), fleet.replicas)
        files = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)} if tls else {}
        serve.start(http_options={"host": host, "port": port, **files}, logging_config={"log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            _run(target)
            yield
        finally:
            _end(own, UNWATCHED_S + launch.settings.drain_s + 2 * CLOSING_S)


@contextlib.contextmanager
def _connected(own: bool) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells nobody who did not ask
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, logging_level=logging.ERROR)
    else:
        ray.init(logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # which Ray has replaced
    try:
        yield
    finally:
        ray.shutdown()


def _require_resources(each: dict[str, Any], replicas: int) -> None:
    """Raise CovoError if this machine has too little for the replicas: Ray would wait for more for ever."""
    wanted = {"CPU": each["num_cpus"], "GPU": each.get("num_gpus", 0), **each.get("resources", {})}
    there = ray.cluster_resources()
    short = [
        f"{replicas * amount:g} {name}, found {there.get(name, 0):g}"
        for name, amount in wanted.items()
        if replicas * amount > there.get(name, 0)
    ]
    if short:
        needed = "; ".join(short)
        raise CovoError(f"{replicas} replicas need {needed}: take fewer --replicas, or of CPUs fewer --threads each")


def _run(target: serve.Application) -> None:
    """Return when all replicas would answer. Raises CovoError with the last error of ours that one of them failed by.

    Ray tells of the last replica alone, and that may be one which it cancelled before it ran: so all are listened to.
    """
    reasons: deque[str] = deque(maxlen=1)
    over = threading.Event()

    def listen() -> None:
        while not over.wait(LISTEN_S):
            reasons.extend(_errors())

    threading.Thread(target=listen, daemon=True).start()  # as in _end
    try:
        serve.run(target, name=APP)
    except RuntimeError as error:
        reasons.extend(_errors())
        raise CovoError(f"the replicas do not start: {reasons[0] if reasons else error}") from None
    finally:
        over.set()


def _errors() -> list[str]:
    """Return the errors of ours in what Ray tells of the replicas now, which are tracebacks."""
    running = serve.status().applications.get(APP)
    deployments = running.deployments.values() if running else ()
    return [error for deployment in deployments for error in OUR_ERROR.findall(deployment.message)]


def _end(own: bool, seconds: float) -> None:
    """Take the application off, let its replies end for as long as they may, and end Serve if it is ours."""

    def work() -> None:
        serve.delete(APP, _blocking=False)
        while APP in serve.status().applications:
            time.sleep(0.2)
        if own:
            serve.shutdown()

    ending = threading.Thread(target=work, daemon=True)  # Ray does not answer, and never says so, if its processes died
    ending.start()
    ending.join(seconds)
