"""How every command line of this project starts, reports and ends."""

import contextlib
import errno
import io
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime import output

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)  # CUDA and NPU; the CPU
NO_CONTROLS = dict.fromkeys(set(range(32)) - {9, 10} | {127})
SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no text, and JSON of half a character
VERBOSE = {"--verbose", "-v"}
OK, FAULT, USAGE = 0, 1, 2
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
IMPORTED_S = time.monotonic()


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, so that finally-blocks run and no `except Exception` keeps it."""


def run(command: click.Command, prog: str, argv: list[str] | None = None) -> int:
    """Return the exit code of a command line: 0 ok, 1 fault, 2 usage, 130 SIGINT, 143 SIGTERM.

    A CovoError, a ClickException, an OSError (no such file, no permission, no space), a loop of links or a lack of
    memory becomes one message on stderr; with --verbose among the arguments its traceback stands before it, and the
    stages are logged with their times. Any other exception is a fault of ours and keeps its traceback. A reader that
    closes our stdout ends the program quietly.
    """
    arguments = sys.argv[1:] if argv is None else argv
    verbose = bool(VERBOSE & set(arguments))
    try:
        _prepare_streams()
        with _termination_raises(), _stages_logged(prog, verbose):
            result = command.main(args=list(arguments), prog_name=prog, standalone_mode=False)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result if isinstance(result, int) else OK
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.Abort as abort:  # click's name for Ctrl-C and for EOFError
        if isinstance(abort.__cause__, EOFError):
            raise abort.__cause__ from None
        return _interrupted(prog)
    except KeyboardInterrupt:
        return _interrupted(prog)
    except Terminated:
        return _ended(prog, "terminated", TERMINATED)
    except (CovoError, click.ClickException, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            return _reader_gone()
        message = _message(error)
        if message is None:
            raise
        if verbose:
            traceback.print_exc()
        code = _ended(prog, message, FAULT)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # it was stdout that could not be written
            _reader_gone()
        return code
    except SystemExit as leave:  # click ends so when the reader of stdout is gone
        return _reader_gone() if leave.code == FAULT else int(leave.code or OK)


class Screen:
    """What a person reads: stdout, or stderr where stdout carries JSON. Control characters are left out."""

    def __init__(self, prog: str, quiet: bool = False, err: bool = False) -> None:
        self.prog, self.quiet, self.err = prog, quiet, err
        self.live = not quiet and is_terminal(sys.stderr if err else sys.stdout)  # text is shown as it is generated

    def line(self, text: str = "") -> None:
        """Show a line."""
        self.text(f"{text}\n")

    def text(self, text: str) -> None:
        """Show a piece of text."""
        if not self.quiet:
            click.echo(legible(text), nl=False, err=self.err)

    def warning(self, message: str) -> None:
        """Show on stderr what is odd."""
        if not self.quiet:
            click.echo(f"{self.prog}: warning: {legible(message)}", err=True)

    def error(self, message: str) -> None:
        """Show a fault on stderr, also if quiet."""
        click.echo(f"{self.prog}: {legible(message)}", err=True)


def show(text: str, report: Mapping[str, Any], json_file: str | None) -> None:
    """Show a result: the text on stdout and, with --json, the report as a JSON object. On stdout JSON stands alone."""
    click.echo(legible(text), err=json_file == "-")
    if json_file is not None:
        write_json(json_file, report)


def write_json(target: str, report: Mapping[str, Any]) -> None:
    """Write a JSON object to stdout ("-") or to a file, as output.write does; "command" in it says which one made it.

    Raises OutputError if it cannot be written, or if a file came there meanwhile that no command made.
    """
    if target == "-":
        if sys.stdout is None:
            raise output.OutputError("--json -: stdout is closed")
        escape = "utf" not in (sys.stdout.encoding or "utf").lower()  # JSON is UTF-8, or escaped
        click.echo(as_json(report, escape), nl=False)
        return
    output.require_writable(target, is_report)
    output.write(target, as_json(report).encode())


def keep_json(target: str | None, report: Mapping[str, Any], screen: Screen) -> bool:
    """Return whether the report is where it should be; if it cannot be written there, it is kept elsewhere, and said.

    target None: nobody wants it.
    """
    try:
        if target is not None:
            write_json(target, report)
        return True
    except output.OutputError as error:
        place = output.aside("report", ".json")
        output.write(place, as_json(report).encode())
        screen.error(f"{error}; the results are in {place}")
        return False


def as_json(report: Mapping[str, Any], escape: bool = False) -> str:
    """Return a report as JSON text that any encoding of Unicode takes; names in other encodings are shown legibly."""
    context = click.get_current_context(silent=True)
    report = {"command": context.command_path, **report} if context else report
    text = json.dumps(report, ensure_ascii=escape, indent=1)
    return SURROGATE.sub(lambda found: "\\" + _escaped(found), text) + "\n"


def is_report(content: bytes) -> bool:
    """Whether this is what write_json wrote."""
    try:
        report = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(report, dict) and str(report.get("command", "")).startswith("covo-")


def legible(text: str) -> str:
    """Return a text that every Unicode stream takes: bytes of a name that are no UTF-8 as \\xNN, no control characters.

    So neither a reply nor a name steers the terminal.
    """
    return SURROGATE.sub(_escaped, text).translate(NO_CONTROLS)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def process_age_s() -> float:
    """Return the seconds since this process started, from the kernel; elsewhere since this module was imported."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.monotonic() - IMPORTED_S


def progress(total: int, unit: str, description: str, enabled: bool = True) -> Any:
    """Return a tqdm bar on stderr, a context manager with update(n); silent unless stderr is a terminal.

    unit: "B" counts bytes and is shown in powers of 1000.
    """
    from tqdm import tqdm  # here, so that covo-check doctor can say that it is missing

    return tqdm(
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        desc=description,
        file=sys.stderr,
        disable=not (enabled and is_terminal(sys.stderr)),
        dynamic_ncols=True,
        leave=False,
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is there. None: the stream is closed."""
    return stream is not None and stream.isatty()


def _prepare_streams() -> None:
    """Let streams take whatever comes, in and out, and no file become the descriptor of one that is closed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors=errors)


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: whoever called us there minds the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _stages_logged(prog: str, verbose: bool) -> Iterator[None]:
    """If verbose, log this project's stages to stderr, not other libraries', with the seconds since Python's start."""
    if not verbose:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{prog}: {{relative:9.3f}} s  {{name}}: {{message}}", style="{"))
    handler.addFilter(_with_seconds)
    logger = logging.getLogger("covo_npu")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _with_seconds(record: logging.LogRecord) -> bool:
    record.relative = record.relativeCreated / 1000
    return True


def _message(error: Exception) -> str | None:
    """Return what a user is told of a fault, None if it is ours."""
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, (CovoError, OSError)) or str(error).startswith("Symlink loop"):  # Path.resolve's RuntimeError
        return str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):  # torch's allocators raise RuntimeErrors
        return f"out of memory: {str(error).partition(chr(10))[0] or 'no more to have'}"
    return None


def _interrupted(prog: str) -> int:
    """Return 130 after saying so.

    Ctrl-C inside source that is executed, as dataclasses do when a module is imported, leaves CPython with a note by
    which `python -m` ends by the signal itself, whatever is returned. Whatever is executed next takes the note back.
    Source: unhandled_keyboard_interrupt in Python/pythonrun.c and Modules/main.c, 3.11.
    """
    exec("")
    return _ended(prog, "interrupted", INTERRUPTED)


def _ended(prog: str, message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody can be told
        Screen(prog).error(message)
    return code


def _reader_gone() -> int:
    """Return 1 after pointing stdout at nothing, so that the flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAULT
