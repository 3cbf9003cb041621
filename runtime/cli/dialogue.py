"""The dialogue of covo-run: questions from arguments, a pipe or a terminal; what a person sees of each round."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
from numpy.typing import NDArray

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.audio import AudioError, to_pcm16
from covo_npu.runtime.cli import console
from covo_npu.runtime.cli.console import Screen
from covo_npu.runtime.cli.record import GrowingSpeech, round_record, write_speech
from covo_npu.runtime.engine import ContextError
from covo_npu.runtime.events import Reply
from covo_npu.runtime.session import Session

PROMPT = "audio file> "
LEAVING = ("exit", "quit")
STDIN = "-"
AUDIO_BEGINS = ("RIFF", "OggS", "fLaC", "ID3", "FORM", "caff", ".snd", "\x1aE")
LIMITS = {"length": "--max-new-tokens reached", "context": "the context is full"}


def converse(
    session: Session, wav: tuple[str, ...], output: Path | None, screen: Screen, report: dict[str, Any]
) -> bool:
    """Return whether the dialogue failed. Fills the report's rounds and errors.

    output: the folder of the replies' WAV files, None: raw samples to stdout. A question that cannot be used ends the
    dialogue if it was an argument; if it was typed or piped, only its round. Who typed it has seen the message: that
    is no failure. Any other error ends the dialogue.
    """
    failed = False
    for question in wav or _typed(screen):
        try:
            _round(session, question, output, screen, report)
        except CovoError as error:
            screen.error(str(error))
            report["errors"].append({"input": question, "message": str(error)})
            if failed := bool(wav) or not isinstance(error, AudioError | ContextError):
                break
    at_terminal = not wav and console.is_terminal(sys.stdin)
    return failed or (bool(report["errors"]) and not at_terminal)


def _typed(screen: Screen) -> Iterator[str]:
    """Yield the paths typed or piped: as they stand, or without the quotes that a terminal puts around a dropped file.

    Raises UsageError if it is audio that comes.
    """
    if sys.stdin is None:  # it was closed
        return
    for line in _ask(screen) if console.is_terminal(sys.stdin) else sys.stdin:
        whole = line.removesuffix("\n").removesuffix("\r")
        if whole.startswith(AUDIO_BEGINS) and "\0" in whole:
            raise click.UsageError("stdin holds audio, expected one path a line; audio from stdin is named -")
        if os.path.lexists(whole) if "\0" not in whole else False:
            yield whole
        elif path := whole.strip().strip("'\""):
            yield os.path.expanduser(path)  # noqa: PTH111 - Path's raises if there is no such user


def _ask(screen: Screen) -> Iterator[str]:
    """Yield lines from the terminal until Ctrl-D, exit or quit; with editing, and completion of paths where there is.

    The prompt goes where the screen is: input() would put it on stdout.
    """
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims("")  # a path may hold spaces
    edited = screen.live and not screen.err
    while True:
        screen.text("" if edited else PROMPT)
        try:
            line = input(PROMPT if edited else "")
        except EOFError:
            screen.line()
            return
        if line.strip() in LEAVING and not os.path.lexists(line.strip()):
            return
        yield line


def _round(session: Session, question: str, output: Path | None, screen: Screen, report: dict[str, Any]) -> None:
    """Let a question be answered and its speech be written: while it is made, if in blocks. Report it and show it.

    A place that cannot be written is an error of the report, and the reply is kept elsewhere.
    """
    from_stdin = question == STDIN
    stem = f"{session.dialogue.rounds + 1:02d}-{'stdin' if from_stdin else Path(question).stem}"
    screen.line(f"\n> {question}")
    streams = session.ask.blocks is not None
    growing = GrowingSpeech(output, stem) if output and streams else None
    hear = growing.write if growing else None if output else _to_stdout
    with _Speech(enabled=not (screen.quiet or streams)) as progress, growing or contextlib.nullcontext():
        source = _stdin() if from_stdin else question
        on_text = screen.text if screen.live else None
        reply = session.say(source, on_text=on_text, on_progress=progress, on_audio=hear)
    wav, fault = write_speech(reply, output, stem, growing=growing) if output else (None, "")
    report["rounds"].append(round_record(question, reply, str(wav) if wav else None))
    screen.line("" if screen.live else reply.text)
    for warning in reply.warnings:
        screen.warning(warning)
    if fault:
        screen.error(fault)
        report["errors"].append({"input": question, "message": fault})
    screen.line(_round_line(reply, str(wav) if wav else None))


def _stdin() -> BinaryIO:
    """Return stdin as audio."""
    if sys.stdin is None or console.is_terminal(sys.stdin):
        raise AudioError("-: stdin is closed or a terminal, expected audio from a pipe or a file")
    return sys.stdin.buffer


def _to_stdout(samples: NDArray[np.float32]) -> None:
    sys.stdout.buffer.write(to_pcm16(samples))
    sys.stdout.buffer.flush()


def _round_line(reply: Reply, wav: str | None) -> str:
    timing, seconds = reply.timing, reply.waveform.size / reply.sample_rate
    parts = [
        f"encode {timing.encode_s:.2f} s",
        f"first token {timing.ttft_s:.2f} s",
        f"{len(reply.tokens)} tokens at {timing.tokens_per_s:.1f}/s",
    ]
    if reply.waveform.size:
        parts.append(f"first sound {timing.ttfa_s:.2f} s")
        parts.append(f"speech {timing.token2wav_s:.2f} s (RTF {timing.rtf:.2f})")
    if reply.stop_reason != "stop":
        parts.append(LIMITS[reply.stop_reason])
    place = f"{wav} ({seconds:.2f} s of speech)\n" if wav else ""
    return f"{place}{', '.join(parts)}"


class _Speech:
    """A progress bar for each stage of making speech; called with (stage, done, total)."""

    def __init__(self, enabled: bool) -> None:
        self._enabled, self._stage = enabled, ""
        self._bar: Any = None

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self._show

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.__exit__()
            self._stage, self._bar = stage, console.progress(total, "step", stage, self._enabled)
        self._bar.update(done - self._bar.n)
