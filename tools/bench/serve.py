"""covo-bench serve: what those hear who talk to covo-serve at the same time.

Closed loop: some dialogues side by side, each asks again when its reply is over. Open loop: questions come at a rate
whatever the server does, at random moments. The same questions through covo-run --batch, which sends nothing over
sockets and waits for nobody, are what the server's tokens a second are compared with.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click

from covo_npu.runtime.checkpoint.format import read_manifest
from covo_npu.runtime.cli import console, options
from covo_npu.runtime.process import module_command
from covo_npu.tools.bench.listener import Heard, ask, question
from covo_npu.tools.bench.measure import MeasurementError
from covo_npu.tools.report import machine_line, machine_report, table

PAUSE_S = 0.1  # a stream whose longest pause is below sounds continuous
END_S = 60.0  # that the server may take to end


@dataclass(frozen=True, slots=True)
class Row:
    """One load. Of times the median, the 95th percentile and the worst, seconds."""

    load: str
    questions: int
    answered: int
    refused: int  # by 429 or 503
    seconds: float
    tokens_per_s: float
    ttft_s: tuple[float, float, float]
    itl_s: tuple[float, float, float]
    ttfa_s: tuple[float, float, float]
    rtf: tuple[float, float, float]
    pauses: int
    continuous: float  # share of replies without a pause of PAUSE_S


def summary(load: str, heard: Sequence[Heard], seconds: float) -> Row:
    """Return the row of what was heard. seconds: from the first question to the last reply."""
    whole = [one for one in heard if one.ok]
    spoken = [one for one in whole if one.audio_s]
    busy = (http.client.TOO_MANY_REQUESTS, http.client.SERVICE_UNAVAILABLE)
    return Row(
        load,
        questions=len(heard),
        answered=len(whole),
        refused=sum(one.status in busy for one in heard),
        seconds=seconds,
        tokens_per_s=sum(one.tokens for one in whole) / seconds,
        ttft_s=percentiles([one.ttft_s for one in whole if one.ttft_s]),
        itl_s=percentiles([gap for one in whole for gap in one.itl_s]),
        ttfa_s=percentiles([one.ttfa_s for one in spoken]),
        rtf=percentiles([one.rtf for one in spoken]),
        pauses=sum(len(one.pauses_s) for one in spoken),
        continuous=sum(max(one.pauses_s, default=0.0) < PAUSE_S for one in spoken) / len(spoken) if spoken else 0.0,
    )


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the 95th percentile (the smallest value that 95 % do not exceed) and the maximum."""
    if not values:
        return 0.0, 0.0, 0.0
    found = sorted(values)
    return statistics.median(found), found[-(-95 * len(found) // 100) - 1], found[-1]


def closed(listen: Callable[[int], Heard], dialogues: int, questions: int) -> tuple[list[Heard], float]:
    """Return what was heard, and how long it took: so many dialogues at a time until all questions are answered."""
    started = time.perf_counter()
    with ThreadPoolExecutor(dialogues) as pool:
        heard = list(pool.map(listen, range(questions)))
    return heard, time.perf_counter() - started


def open_loop(listen: Callable[[int], Heard], rate: float, questions: int, seed: int = 0) -> tuple[list[Heard], float]:
    """Return what was heard, and how long it took: questions at random moments, `rate` a second (Poisson)."""
    rng, due, started = random.Random(seed), 0.0, time.perf_counter()
    with ThreadPoolExecutor(questions) as pool:
        coming = []
        for number in range(questions):
            time.sleep(max(0.0, started + due - time.perf_counter()))
            coming.append(pool.submit(listen, number))
            due += rng.expovariate(rate)
        heard = [one.result() for one in coming]
    return heard, time.perf_counter() - started


def batch(ckpt: Path, wav: bytes, side_by_side: int, questions: int, max_new_tokens: int, given: Sequence[str]) -> Row:
    """Return the row of covo-run --batch."""
    with tempfile.TemporaryDirectory(prefix="covo-bench-") as name:
        folder = Path(name)
        (folder / "question.wav").write_bytes(wav)
        items = [json.dumps({"id": f"q{number}", "audio": "question.wav"}) for number in range(questions)]
        (folder / "batch.jsonl").write_text("\n".join(items) + "\n", "utf-8")
        command = module_command(
            "covo_npu.runtime.cli.run", "--ckpt", str(ckpt), "--batch", str(folder / "batch.jsonl"), "--max-batch",
            str(side_by_side), "--max-new-tokens", str(max_new_tokens), "--output", str(folder / "replies"), "--json",
            str(folder / "report.json"), "--quiet", *given,
        )  # fmt: skip
        if code := subprocess.run(command, check=False).returncode:
            raise MeasurementError(f"covo-run --batch failed with exit code {code}")
        totals = json.loads((folder / "report.json").read_text("utf-8"))["totals"]
    none = (0.0, 0.0, 0.0)
    return Row(
        f"--batch, {side_by_side} side by side", questions, totals["dialogues"], 0, totals["seconds"],
        totals["tokens_per_s"], none, none, none, none, 0, 0.0,
    )  # fmt: skip


@contextlib.contextmanager
def server(ckpt: Path, slots: int, given: Sequence[str]) -> Iterator[str]:
    """Yield the address of a covo-serve that is ready. Raises MeasurementError if it does not get so far."""
    command = module_command(
        "covo_npu.serve.cli", "--ckpt", str(ckpt), "--port", "0", "--slots", str(slots), "--json", "-", "--quiet",
        *given,
    )  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        report = ""
        line = ""
        while line != "}\n":  # the end of its report
            if not (line := process.stdout.readline()):
                raise MeasurementError(f"covo-serve ended with exit code {process.wait()} before it was ready")
            report += line
        yield json.loads(report)["url"]
        process.send_signal(signal.SIGTERM)
        if code := process.wait(END_S):
            raise MeasurementError(f"covo-serve ended with exit code {code}")
    finally:
        process.kill()
        process.communicate()


# --- what is shown


def report_table(rows: Sequence[Row]) -> str:
    """Return the rows as a table."""

    def times(values: tuple[float, float, float], digits: int = 2) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in values) if values[2] else "-"

    lines = [
        (
            row.load, f"{row.answered} of {row.questions}", f"{row.answered / row.seconds:.2f}",
            f"{row.tokens_per_s:.1f}", times(row.ttft_s), times(row.itl_s, 3), times(row.ttfa_s), times(row.rtf),
            str(row.pauses) if row.rtf[2] else "-", f"{row.continuous:.0%}" if row.rtf[2] else "-",
        )
        for row in rows
    ]  # fmt: skip
    columns = (
        "load", "answered", "replies/s", "tokens/s", "first text, s", "text to text, s", "first sound, s", "RTF",
        "pauses", "continuous",
    )  # fmt: skip
    return table(columns, lines)


def verdicts(rows: Sequence[tuple[Row, Row]], found: Sequence[Row]) -> list[str]:
    """Return sentences. rows: each closed row with the row of --batch beside it."""
    said = [
        f"{ours.load}: {ours.tokens_per_s / floor.tokens_per_s:.2f} of the tokens/s of {floor.load}"
        for ours, floor in rows
        if floor.tokens_per_s
    ]
    for row in found:
        lost = row.questions - row.answered - row.refused
        if row.refused or lost:
            said.append(f"{row.load}: {row.refused} questions refused, {lost} lost")
    said.append("times: median / 95th percentile / worst; a dialogue each question, one warm-up before all")
    return said


@click.command("serve")
@options.ckpt(required=False)
@click.option("--url", help="Measure this server, http://HOST:PORT, instead of starting one.")
@click.option(
    "--api-key", "api_keys", multiple=True, default=("none",), envvar="COVO_API_KEY", metavar="KEY",
    help="For --url: of several, as COVO_API_KEY may have for covo-serve, the first one is sent.",
)  # fmt: skip
@click.option(
    "--dialogues", multiple=True, type=click.IntRange(1), default=(1, 2, 4, 8), show_default=True,
    help="Closed loop: so many at a time. May be given several times.",
)  # fmt: skip
@click.option(
    "--rate", "rates", multiple=True, type=click.FloatRange(0, min_open=True),
    help="Open loop: so many questions a second. May be given several times.",
)  # fmt: skip
@click.option(
    "--questions", default=16, show_default=True, type=click.IntRange(1), help="Of each row, at least one a dialogue."
)
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Of a reply at most.")
@click.option("--wav", type=options.PATH, help="The question; by default one of 8 s that is made up.")
@click.argument("given", nargs=-1, metavar="[-- OPTIONS]")
@options.common
def command(
    ckpt: Path | None,
    url: str | None,
    api_keys: tuple[str, ...],
    dialogues: tuple[int, ...],
    rates: tuple[float, ...],
    questions: int,
    max_new_tokens: int,
    wav: Path | None,
    given: tuple[str, ...],
    json_file: str | None,
) -> None:
    """Ask covo-serve streamed questions, many at a time, and tell what the clients hear.

    OPTIONS after -- go to covo-serve and to covo-run --batch, which answers the same questions for comparison:
    `covo-bench serve --ckpt npu_ckpt -- --device npu:0 --sizes 15,30`. With --url the server is somebody else's, and
    nothing is compared.
    """
    if (ckpt is None) == (url is None):
        raise click.UsageError("expected --ckpt to start a server, or --url to measure one")
    if url is not None and (given or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc):
        raise click.UsageError("--url is http://HOST:PORT, and OPTIONS are for a server that is started")
    if ckpt is not None:
        read_manifest(ckpt)
    sound = _wav(wav)
    floors: dict[int, Row] = {}
    with contextlib.ExitStack() as stack:
        if ckpt is not None:
            for side_by_side in dict.fromkeys(dialogues):
                click.echo(f"--batch, {side_by_side} side by side", err=True)
                count = max(questions, side_by_side)
                floors[side_by_side] = batch(ckpt, sound, side_by_side, count, max_new_tokens, given)
            click.echo("covo-serve starts", err=True)
            url = stack.enter_context(server(ckpt, max(dialogues), given))
        address = str(url)
        heard: dict[str, list[Heard]] = {}

        def listen(number: int) -> Heard:
            return ask(address, question(sound, max_new_tokens, number), api_keys[0])

        if not (first := listen(0)).ok:
            raise MeasurementError(f"{address}: a first question was answered with status {first.status or 'none'}")
        found: list[Row] = []
        pairs: list[tuple[Row, Row]] = []
        for side_by_side in dialogues:
            load = f"{side_by_side} at a time"
            click.echo(load, err=True)
            heard[load], seconds = closed(listen, side_by_side, max(questions, side_by_side))
            found.append(summary(load, heard[load], seconds))
            if side_by_side in floors:
                pairs.append((found[-1], floors[side_by_side]))
        for rate in rates:
            load = f"{rate:g} a second"
            click.echo(load, err=True)
            heard[load], seconds = open_loop(listen, rate, questions)
            found.append(summary(load, heard[load], seconds))
    said, machine = verdicts(pairs, found), machine_report()
    rows = [*found, *floors.values()]
    report = {
        "bench": "serve",
        "machine": machine,
        "options": list(given),
        "max_new_tokens": max_new_tokens,
        "rows": [asdict(row) for row in rows],
        "questions": {load: [asdict(one) for one in ones] for load, ones in heard.items()},
        "said": said,
    }
    console.show("\n".join([report_table(rows), "", *said, machine_line(machine)]), report, json_file)


def _wav(path: Path | None) -> bytes:
    """Return the question as the bytes of a WAV file."""
    if path is not None:
        return path.read_bytes()
    from covo_npu.runtime.wav import wav_bytes
    from covo_npu.tools.question import RATE, made_up

    return wav_bytes(made_up(), RATE)
