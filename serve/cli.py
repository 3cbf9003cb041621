"""covo-serve: a converted checkpoint over HTTP and WebSocket, with a page to talk to it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import ssl
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covo_npu.kernels import kept_for_good
from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.cli import console
from covo_npu.runtime.cli.options import (
    ASKING,
    PATH,
    SpeechOptions,
    asking,
    chosen_threads,
    ckpt,
    common,
    cutting,
    loading,
    speaking,
)
from covo_npu.serve.launch import Launch
from covo_npu.serve.settings import MIB, Fleet, Settings

if TYPE_CHECKING:
    from covo_npu.runtime.model import LoadReport
    from covo_npu.runtime.options import Ask, LoadOptions, SpeechBlocks
    from covo_npu.serve.server import Tls

PROG = "covo-serve"
HOST, PORT = "127.0.0.1", 8000
LOG_FORMS = ("text", "json")
USUAL, FLEET = Settings(), Fleet()


def seconds(name: str, default: float, help: str) -> Callable[..., Any]:
    """Return the decorator of an option of seconds."""
    return click.option(name, type=float, default=default, show_default=True, help=help)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-serve."""
    return console.run(command, PROG, argv)


@click.command(context_settings={"max_content_width": 120})
@ckpt()
@click.option("--host", default=HOST, show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="COVO_API_KEY",
    metavar="KEY",
    help="What clients have to send as bearer token; may be given several times, or as COVO_API_KEY, where blanks "
    "separate them.",
)
@click.option(
    "--insecure",
    "trusted",
    is_flag=True,
    help="Let anybody who reaches the server use it, from other machines and under any host name.",
)
@click.option("--tls-cert", type=PATH, help="Certificate in PEM, with its chain: https instead of http.")
@click.option("--tls-key", type=PATH, help="Its private key in PEM.")
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin, https://example.org, use the server; may be given several times, * for all.",
)
@click.option(
    "--model-name",
    "model_names",
    multiple=True,
    default=USUAL.model_names,
    show_default=True,
    help="What clients may call the model; may be given several times.",
)
@click.option("--voices", type=PATH, help="Folder of voices: clients name them by their sub-folders' names.")
@click.option("--slots", type=int, default=USUAL.slots, show_default=True, help="Dialogues answered side by side.")
@click.option(
    "--queue",
    type=int,
    default=USUAL.queue,
    show_default=True,
    help="Questions that wait for a slot; who comes then is told to come later.",
)
@click.option("--sessions", type=int, default=USUAL.sessions, show_default=True, help="Realtime connections.")
@click.option("--max-body-mib", type=int, default=USUAL.max_body_bytes // MIB, show_default=True, help="Of a request.")
@click.option(
    "--parked-mib",
    type=int,
    default=USUAL.parked_bytes // MIB,
    show_default=True,
    help="Host memory for dialogues between two questions; the longest unused are forgotten.",
)
@seconds("--keep-s", USUAL.keep_s, "How long a dialogue is kept unused.")
@seconds("--idle-s", USUAL.idle_s, "How long a session may send nothing.")
@seconds("--session-s", USUAL.session_s, "How long a session may last.")
@seconds("--drain-s", USUAL.drain_s, "How long replies under way may take after SIGTERM.")
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Run replicas on Ray Serve; on the cluster that RAY_ADDRESS names, else on a Ray of this machine.",
)
@click.option("--replicas", type=int, default=FLEET.replicas, show_default=True, help="With --ray: models, one a card.")
@click.option("--max-replicas", type=int, help="With --ray: as many under load. Default: never more than --replicas.")
@seconds("--upscale-s", FLEET.upscale_s, "With --ray: how long there must be too few replicas before one is added.")
@seconds("--downscale-s", FLEET.downscale_s, "With --ray: how long there must be too many before one goes.")
@click.option("--text-only", is_flag=True, help="Do not load what speaks.")
@click.option("--log", "log_form", type=click.Choice(LOG_FORMS), default="text", show_default=True)
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the log.")
@asking(*(name for name in ASKING if name != "mode"))
@speaking()
@cutting()
@loading()
@common
def command(
    ckpt: Path,
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    voices: Path | None,
    max_body_mib: int,
    parked_mib: int,
    on_ray: bool,
    replicas: int,
    max_replicas: int | None,
    upscale_s: float,
    downscale_s: float,
    text_only: bool,
    log_form: str,
    quiet: bool,
    ask: Ask,
    speech: SpeechOptions,
    blocks: SpeechBlocks,
    options: LoadOptions,
    json_file: str | None,
    **limits: Any,
) -> Any:
    """Serve a converted Covo-Audio-Chat: OpenAI's chat completions and realtime interface, and a page to talk to it.

    What --temperature and its like say is how questions are answered that say nothing of it. With --json, the address
    is written when the first question would be answered.
    """
    screen = console.Screen(PROG, quiet=quiet, err=json_file == "-")
    settings = _built(
        Settings, ask=ask, blocks=blocks, max_body_bytes=max_body_mib * MIB, parked_bytes=parked_mib * MIB, **limits
    )
    fleet = _built(Fleet, replicas=replicas, max_replicas=max_replicas, upscale_s=upscale_s, downscale_s=downscale_s)
    if fleet != FLEET and not on_ray:
        raise click.UsageError("--replicas and what is said of them need --ray")
    tls = _tls(tls_cert, tls_key)
    options = dataclasses.replace(options, speech=not text_only)
    launch = Launch(ckpt, options, settings, speech, voices, log_form, chosen_threads())
    build = click.get_current_context().obj  # of serve/ray.py: the command line is read for an application
    if build is not None:
        return build(launch, fleet)
    if on_ray and importlib.util.find_spec("ray") is None:
        raise CovoError("--ray needs Ray Serve, which is not installed: pip install 'covo-npu[ray]'")
    with kept_for_good():
        from covo_npu.runtime.ranks import follows
        from covo_npu.serve import server  # here, so that --help and wrong arguments are answered at once

    def tell(what: str, details: dict[str, Any], places: str = "") -> None:
        report = {"url": address, "version": version("covo-npu"), "ready_s": console.process_age_s(), **details}
        if json_file:
            console.write_json(json_file, report)
        line = f"{PROG} {report['version']}: {what}; ready in {report['ready_s']:.2f} s"
        screen.line(f"{line}; talk to it at {address}/{places}")

    if not on_ray and follows(options.tp):
        launch.service()  # and does what rank 0 does, to its end: this process listens nowhere
    with server.bind(host, port) as listener:
        if not (settings.api_keys or settings.trusted or server.is_local(listener)):
            raise click.UsageError(
                f"--host {host} is reached from other machines, and anybody there could use the model: give --api-key "
                "KEY, or --insecure if something else keeps them out"
            )
        address = server.address(listener, host, tls)
        if not on_ray:
            service = launch.service()
            with service.model as model:
                loaded = model.report
                held = "" if loaded.weights == loaded.dtype else f", weights {loaded.weights}"
                what = f"{loaded.device}, backend {loaded.backend}, {loaded.dtype}{held}"
                server.run(service, listener, tls, lambda: tell(what, _details(loaded), loaded.places))
            return console.OK
        port = listener.getsockname()[1]
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # each line is of another request
    from covo_npu.serve import ray

    out = sys.stdout
    with ray.running(launch, fleet, host, port, tls):
        with contextlib.redirect_stdout(out):
            tell(f"{fleet.replicas} replicas on Ray, {options.device}", {"replicas": fleet.replicas})
        with contextlib.suppress(console.Terminated, KeyboardInterrupt):
            threading.Event().wait()
    return console.OK


def _built(record: Callable[..., Any], **values: Any) -> Any:
    try:
        return record(**values)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _tls(certificate: Path | None, key: Path | None) -> Tls | None:
    """Return the files of TLS, after a look whether they belong together."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise click.UsageError("--tls-cert and --tls-key go together")
    from covo_npu.serve.server import Tls

    for path in (certificate, key):
        path.open("rb").close()  # the error below does not say which of them is missing
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise CovoError(f"{certificate} and {key}: are no certificate and its key in PEM ({error.reason})") from None
    return Tls(certificate, key)


def _details(loaded: LoadReport) -> dict[str, Any]:
    names = ("device", "dtype", "weights", "backend", "load_s", "bytes")
    placed = [dataclasses.asdict(place) for place in loaded.placed]
    return {**{name: getattr(loaded, name) for name in names}, "placed": placed}


if __name__ == "__main__":
    sys.exit(main())
