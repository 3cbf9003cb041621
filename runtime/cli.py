"""covo-run: spoken questions in, text and speech out."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import batch_cli, console

if TYPE_CHECKING:
    from covo_npu.runtime.model import CovoAudio

PROG = "covo-run"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "window_penalty", "window")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of covo-run."""
    return console.run(command, PROG, argv)


def _system_text(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Return the text of --system TEXT or --system @FILE."""
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{value[1:]}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None


POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command(context_settings={"max_content_width": 120})
@click.version_option(version("covo-npu"), prog_name=PROG)
@click.option("--ckpt", required=True, type=click.Path(path_type=Path), help="Folder of a converted checkpoint.")
@click.argument("wav", nargs=-1)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:N or npu:N.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Default: the checkpoint's.")
@click.option("--backend", help="native, reference or npu. Default: the fastest of the device.")
@click.option(
    "--mode",
    type=click.Choice(["a2ta", "a2t"]),
    default="a2ta",
    show_default=True,
    help="Answer in text and speech, or in text only.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Of one reply. Default: the checkpoint's, 2048.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 takes the likeliest token (the usual default).")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Default: the checkpoint's, 0.9.")
@click.option("--top-k", type=click.IntRange(min=0), help="0 switches it off. Default: the checkpoint's, 50.")
@click.option("--repetition-penalty", type=POSITIVE, help="Default: the checkpoint's, 1.05.")
@click.option("--window-penalty", type=POSITIVE, help="On top, for the last tokens. Default: the checkpoint's, 1.05.")
@click.option("--window", type=click.IntRange(min=0), help="How many last tokens. Default: the checkpoint's, 8.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling and of the speech's noise.")
@click.option("--system", metavar="TEXT|@FILE", callback=_system_text, help="Another system prompt.")
@click.option(
    "--voice",
    type=click.Path(path_type=Path),
    help="Folder with prompt_token, prompt_latent and speaker_embed (.npy). Default: the checkpoint's voice.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="replies",
    show_default=True,
    help="Folder for the WAV files of the replies.",
)
@click.option("--json", "json_file", metavar="FILE|-", help="Write all results as one JSON object.")
@click.option("--max-context", type=click.IntRange(min=1), help="Tokens that a dialogue may hold. Default: 8192.")
@click.option(
    "--batch",
    type=click.Path(path_type=Path),
    help='Answer the dialogues of this file: {"id": "q1", "audio": "q1.wav"} a line, or a list of WAVs. Results go to '
    "results.jsonl in --output as they are complete; started again, it goes on with what is missing.",
)
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="With --batch: dialogues at a time."
)
@click.option(
    "--graph",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Replay decode steps as captured graphs. auto: on CUDA.",
)
@click.option(
    "--token2wav-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the matrix products of flow matching. auto: bfloat16 where the device is faster in it.",
)
@click.option(
    "--flow-steps",
    type=click.IntRange(min=1),
    help="Steps of the ODE of speech; midpoint runs the network twice a step. Default: the checkpoint's, 9.",
)
@click.option(
    "--flow-solver",
    type=click.Choice(["midpoint", "euler"]),
    default="midpoint",
    show_default=True,
    help="euler runs the network once a step: half the time, a little another sound.",
)
@click.option(
    "--nz", is_flag=True, help="On an NPU: hold 16-bit weights in its format FRACTAL_NZ. Nobody has measured it yet."
)
@click.option(
    "--load",
    type=click.Choice(["mmap", "eager"]),
    default="mmap",
    show_default=True,
    help="On the CPU: map the weights, or read them into memory first.",
)
@click.option("--check/--no-check", default=True, show_default=True, help="Compare weights with their checksums.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all cores.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Log the stages with times; show tracebacks.")
def command(ckpt: Path, wav: tuple[str, ...], json_file: str | None, **options: Any) -> int:
    """Ask a converted Covo-Audio-Chat spoken questions.

    Each WAV is one round of one dialogue: any format that libsndfile reads, any rate, any length that fits into the
    context. Without a WAV, paths are read from the terminal or from a pipe, one a line; Ctrl-D ends. With nothing to
    read the model is loaded, and how that went is printed.
    """
    screen = console.Screen(PROG, quiet=options["quiet"], err=json_file == "-")
    if options["batch"] and wav:
        raise click.UsageError("--batch takes its questions from its file: leave out the WAVs")
    speaks = options["mode"] == "a2ta"
    for folder in ([options["output"]] if speaks or options["batch"] else []) + (
        [Path(json_file).parent] if json_file else []
    ):
        _require_writable(folder)

    if options["batch"]:
        batch_cli.read_dialogues(options["batch"])  # a fault in the file is told before the weights are loaded
    model = _load(ckpt, speaks, options)
    report = _report(model)
    screen.line(_ready_line(report))
    chosen = {name: options[name] for name in SAMPLING if options[name] is not None}
    dialogue = {
        "mode": options["mode"],
        "sampling": dataclasses.replace(model.generation.sampling, **chosen),
        "max_new_tokens": options["max_new_tokens"],
        "seed": options["seed"],
        "system": options["system"],
    }
    if options["batch"]:
        failed = _batch(model, dialogue, report, screen, options)
    else:
        from covo_npu.runtime.dialogue_cli import converse

        failed = converse(model.session(**dialogue), wav, options["output"], screen, report)
    if model.capture and model.capture.report.graphs:
        graphs = report["graphs"] = dataclasses.asdict(model.capture.report)
        screen.line(f"{graphs['graphs']} graphs captured in {graphs['seconds']:.2f} s, {graphs['bytes'] / 1e6:.0f} MB")
    if json_file:
        _write_json(json_file, report)
    return console.FAULT if failed else console.OK


def _load(ckpt: Path, speaks: bool, options: dict[str, Any]) -> CovoAudio:
    import torch  # here, so that --help and wrong arguments are answered at once

    from covo_npu.runtime import CovoAudio

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    limits = {"max_context": options["max_context"]} if options["max_context"] else {}
    model = CovoAudio.load(
        ckpt,
        device=options["device"],
        dtype=options["dtype"],
        backend=options["backend"],
        mode=options["load"],
        check=options["check"],
        speech=speaks,
        graph=options["graph"],
        token2wav_dtype=options["token2wav_dtype"],
        flow_steps=options["flow_steps"],
        flow_solver=options["flow_solver"],
        nz=options["nz"],
        **limits,
    )
    if options["voice"]:
        model.use_voice(options["voice"])
    return model


def _report(model: CovoAudio) -> dict[str, Any]:
    """Return the JSON object of --json, still without rounds."""
    load = {"process_to_ready_s": _process_age_s(), "load_s": model.report.load_s, "bytes": model.report.bytes}
    return {
        "version": version("covo-npu"),
        "device": model.report.device,
        "dtype": model.report.dtype,
        "backend": model.report.backend,
        "load": load,
        "rounds": [],
        "errors": [],
    }


def _ready_line(report: dict[str, Any]) -> str:
    load = report["load"]
    return (
        f"{PROG} {report['version']}: {report['device']}, backend {report['backend']}, {report['dtype']}; ready in "
        f"{load['process_to_ready_s']:.2f} s ({load['bytes'] / 1e9:.2f} GB loaded in {load['load_s']:.2f} s)"
    )


def _batch(
    model: CovoAudio, dialogue: dict[str, Any], report: dict[str, Any], screen: console.Screen, options: dict[str, Any]
) -> bool:
    """Return whether a dialogue of --batch failed. Fills the report's totals and errors."""
    from covo_npu.runtime.engine import Answer, Engine

    def show(answer: Answer) -> None:
        if answer.error is not None:
            screen.error(f"{answer.dialogue.name}: {answer.error}")
            report["errors"].append({"id": answer.dialogue.name, "message": str(answer.error)})
        tokens = sum(len(reply.tokens) for reply in answer.replies)
        screen.line(f"{answer.dialogue.name}: {len(answer.replies)} rounds, {tokens} tokens")

    engine = Engine(model, options["max_batch"], **dialogue)
    totals = batch_cli.run(engine, options["batch"], options["output"], show)
    report["totals"] = dataclasses.asdict(totals)
    skipped = f", {totals.skipped} answered before" if totals.skipped else ""
    screen.line(
        f"{totals.dialogues} dialogues{skipped}: {totals.tokens} tokens in {totals.seconds:.2f} s, "
        f"{totals.tokens_per_s:.2f}/s, {totals.mean_batch:.1f} side by side"
    )
    return bool(totals.failed)


def _process_age_s() -> float:
    """Return the seconds since this process started, from the kernel; since Python's clock started elsewhere."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.process_time()


def _require_writable(folder: Path) -> None:
    """Raise CovoError unless files can be made in the folder, or the folder itself can be made. Makes nothing."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CovoError(f"{folder}: cannot be written ({existing} is not a writable folder); choose another place")


def _write_json(target: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    if target == "-":
        click.echo(text, nl=False)
        return
    path = Path(target)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
