"""covo-run: spoken questions in, text and speech out."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covo_npu.runtime.cli import batch as batches
from covo_npu.runtime.cli import console
from covo_npu.runtime.cli.options import PATH, SpeechOptions, asking, ckpt, common, cutting, loading, speaking
from covo_npu.runtime.output import require_writable_folder

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio
    from covo_npu.runtime.options import Ask, LoadOptions, SpeechBlocks

PROG = "covo-run"
STDOUT = Path("-")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-run."""
    return console.run(command, PROG, argv)


@click.command(context_settings={"max_content_width": 120})
@ckpt()
@click.argument("wav", nargs=-1)
@asking()
@speaking()
@click.option(
    "--output", type=PATH, default="replies", show_default=True,
    help="Folder for the WAV files of the replies; - writes their samples to stdout instead while they are made, "
    "16-bit mono at 24 kHz without a header: pipe them to `aplay -f S16_LE -r 24000 -c 1`.",
)  # fmt: skip
@click.option(
    "--stream/--no-stream", default=None,
    help="Speak while the reply is generated: the WAV file grows and can be played at any moment. Default: on a "
    "terminal, unless --quiet, and with --output -. Otherwise speech is made of the whole reply, which sounds a little "
    "different.",
)  # fmt: skip
@cutting()
@click.option(
    "--batch",
    type=PATH,
    help='Answer the dialogues of this file: {"id": "q1", "audio": "q1.wav"} a line, or a list of WAVs. Results go to '
    "results.jsonl in --output as they are complete; started again, it goes on with what is missing.",
)
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="With --batch: dialogues at a time."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@loading()
@common
def command(
    ckpt: Path,
    wav: tuple[str, ...],
    ask: Ask,
    speech: SpeechOptions,
    output: Path,
    stream: bool | None,
    blocks: SpeechBlocks,
    batch: Path | None,
    max_batch: int,
    quiet: bool,
    options: LoadOptions,
    json_file: str | None,
) -> int:
    """Ask a converted Covo-Audio-Chat spoken questions.

    Each WAV is one round of one dialogue: any format that libsndfile reads, any rate, any length that fits into the
    context. Without a WAV, paths are read from the terminal or from a pipe, one a line; Ctrl-D ends. With nothing to
    read the model is loaded and verified, and how that went is printed.
    """
    piped = output == STDOUT
    if batch and (wav or stream or piped):
        raise click.UsageError(
            "--batch takes its questions from its file and writes files: leave out WAVs, --stream, -"
        )
    if piped and (json_file == "-" or not ask.speaks or sys.stdout is None or console.is_terminal(sys.stdout)):
        raise click.UsageError("--output - writes samples to stdout: with --mode a2ta, no --json -, and into a pipe")
    screen = console.Screen(PROG, quiet=quiet, err=json_file == "-" or piped)
    if stream is None:
        stream = not batch and (screen.live or piped)
    if (batch or ask.speaks) and not piped:
        require_writable_folder(output)
    items = None
    if batch:  # what is wrong with its files is told before the weights are loaded; a pipe can be read once
        items = batches.read_items(batch)
        batches.require_apart(output, json_file)
    with _load(ckpt, dataclasses.replace(options, speech=ask.speaks)) as model:
        ask = speech.completed(ask, model) if ask.speaks else ask
        ask = dataclasses.replace(ask, blocks=blocks if stream else None)
        report = _report(model)
        try:
            screen.line(_ready_line(report) + model.report.places)
            failed = _answer(model, ask, wav, items, output, max_batch, report, screen)
        finally:  # whatever ends it, what was answered is not lost
            kept = console.keep_json(json_file, report, screen)
    return console.OK if kept and not failed else console.FAULT


def _answer(
    model: CovoAudio,
    ask: Ask,
    wav: tuple[str, ...],
    items: list[batches.Item] | None,
    output: Path,
    max_batch: int,
    report: dict[str, Any],
    screen: console.Screen,
) -> bool:
    """Return whether a round or a dialogue failed. Fills the report."""
    if items is not None:
        failed = _batch(model, ask, items, output, max_batch, report, screen)
    else:
        from covo_npu.runtime.cli.dialogue import converse
        from covo_npu.runtime.session import Session

        failed = converse(Session(model, ask), wav, None if output == STDOUT else output, screen, report)
        if not (report["rounds"] or report["errors"]):
            model.verify()
    for name, of, capture in (("graphs", "", model.capture), ("speech_graphs", " of speech", model.speech_capture)):
        if capture and capture.report.graphs:
            cost = capture.report
            report[name] = dataclasses.asdict(cost)
            screen.line(f"{cost.graphs} graphs{of} captured in {cost.seconds:.2f} s, {cost.bytes / 1e6:.0f} MB")
    return failed


def _load(ckpt: Path, options: LoadOptions) -> CovoAudio:
    from covo_npu.runtime import CovoAudio  # here, so that --help and wrong arguments are answered at once

    return CovoAudio.load(ckpt, options)


def _report(model: CovoAudio) -> dict[str, Any]:
    """Return the JSON object of --json, still without rounds."""
    load = {
        "process_to_ready_s": console.process_age_s(),
        "load_s": model.report.load_s,
        "bytes": model.report.bytes,
        "placed": [dataclasses.asdict(placed) for placed in model.report.placed],
    }
    return {
        "version": version("covo-npu"),
        "device": model.report.device,
        "dtype": model.report.dtype,
        "weights": model.report.weights,
        "token2wav_dtype": model.report.token2wav_dtype,
        "vocoder_dtype": model.report.vocoder_dtype,
        "backend": model.report.backend,
        "load": load,
        "rounds": [],
        "errors": [],
    }


def _ready_line(report: dict[str, Any]) -> str:
    load, dtypes = report["load"], report["dtype"]
    if report["weights"] != report["dtype"]:
        dtypes += f", weights {report['weights']}"
    if report["token2wav_dtype"]:
        dtypes += f", flow matching {report['token2wav_dtype']}, vocoder {report['vocoder_dtype']}"
    return (
        f"{PROG} {report['version']}: {report['device']}, backend {report['backend']}, {dtypes}; ready in "
        f"{load['process_to_ready_s']:.2f} s ({load['bytes'] / 1e9:.2f} GB loaded in {load['load_s']:.2f} s)"
    )


def _batch(
    model: CovoAudio,
    ask: Ask,
    items: list[batches.Item],
    output: Path,
    slots: int,
    report: dict[str, Any],
    screen: console.Screen,
) -> bool:
    """Return whether a dialogue of --batch failed. Fills the report's totals and errors."""
    from covo_npu.runtime.engine import Engine

    def show(answer: batches.Answer) -> None:
        if answer.error is not None:
            screen.error(f"{answer.item.id}: {answer.error}")
            report["errors"].append({"id": answer.item.id, "message": str(answer.error)})
        for warning in (*answer.warnings, *answer.faults):
            screen.warning(f"{answer.item.id}: {warning}")
        tokens = sum(len(reply.tokens) for reply in answer.replies)
        screen.line(f"{answer.item.id}: {len(answer.replies)} rounds, {tokens} tokens")

    totals = batches.run(Engine(model, slots), ask, items, output, show)
    report["totals"] = dataclasses.asdict(totals)
    skipped = f", {totals.skipped} answered before" if totals.skipped else ""
    screen.line(
        f"{totals.dialogues} dialogues{skipped}: {totals.tokens} tokens in {totals.seconds:.2f} s, "
        f"{totals.tokens_per_s:.2f}/s, {totals.mean_batch:.1f} side by side"
    )
    return bool(totals.failed)


if __name__ == "__main__":
    sys.exit(main())
