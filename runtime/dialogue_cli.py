"""The dialogue of covo-run: questions from arguments, a pipe or a terminal; what a person sees of each round."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from covo_npu.runtime import console
from covo_npu.runtime.audio import AudioError
from covo_npu.runtime.console import Screen
from covo_npu.runtime.record import round_record, write_speech
from covo_npu.runtime.session import ContextError, Reply, Session

PROMPT = "audio file> "
LIMITS = {"length": "--max-new-tokens reached", "context": "the context is full"}


def converse(session: Session, wav: tuple[str, ...], output: Path, screen: Screen, report: dict[str, Any]) -> bool:
    """Return whether a round failed. Fills the report's rounds and errors.

    A question that cannot be used ends the dialogue if it was an argument; if it was typed or piped, only its round.
    """
    for question in wav or _typed(screen):
        try:
            report["rounds"].append(_round(session, question, output, screen))
        except (AudioError, ContextError) as error:
            screen.error(str(error))
            report["errors"].append({"input": question, "message": str(error)})
            if wav:
                break
    at_terminal = not wav and sys.stdin.isatty()  # who typed has seen the message
    return bool(report["errors"]) and not at_terminal


def _typed(screen: Screen) -> Iterator[str]:
    """Yield the paths typed or piped, without the quotes that a terminal puts around a dropped file."""
    for line in _ask(screen) if sys.stdin.isatty() else sys.stdin:
        if path := line.strip().strip("'\""):
            yield str(Path(path).expanduser())


def _ask(screen: Screen) -> Iterator[str]:
    """Yield lines from the terminal until Ctrl-D, with editing, and completion of paths where Python has it."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims("")  # a path may hold spaces
    while True:
        screen.text("" if screen.live else PROMPT)
        try:
            line = input(PROMPT if screen.live else "")
        except EOFError:
            screen.line()
            return
        yield line


def _round(session: Session, question: str, output: Path, screen: Screen) -> dict[str, Any]:
    """Return the JSON object of one round, after showing it and writing its WAV."""
    name = f"{session.rounds + 1:02d}-{Path(question).stem}.wav"
    screen.line(f"\n> {question}")
    with _Speech(enabled=not screen.quiet) as speech:
        reply = session.say(question, on_text=screen.text if screen.live else None, on_progress=speech)
    screen.line("" if screen.live else reply.text)
    wav = str(output / name) if write_speech(reply, output / name) else None
    screen.line(_round_line(reply, wav))
    return round_record(question, reply, wav)


def _round_line(reply: Reply, wav: str | None) -> str:
    timing, seconds = reply.timing, reply.waveform.size / reply.sample_rate
    parts = [
        f"encode {timing.encode_s:.2f} s",
        f"first token {timing.ttft_s:.2f} s",
        f"{len(reply.tokens)} tokens at {timing.tokens_per_s:.1f}/s",
    ]
    if wav:
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
