"""How every command line of this project starts, reports and ends."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from covo_npu.kernels.errors import CovoError

OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)  # CUDA and NPU; the CPU
NO_CONTROLS = dict.fromkeys(set(range(32)) - {9, 10} | {127})  # neither a reply nor a name steers the terminal
VERBOSE = {"--verbose", "-v"}
OK, FAULT, USAGE = 0, 1, 2
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, so that finally-blocks run and no `except Exception` keeps it."""


def run(command: click.Command, prog: str, argv: list[str] | None = None) -> int:
    """Return the exit code of a command line: 0 ok, 1 fault, 2 usage, 130 SIGINT, 143 SIGTERM.

    A CovoError, a ClickException, an OSError (no such file, no permission, no space) or a lack of memory becomes one
    message on stderr; with --verbose among the arguments its traceback stands before it, and the stages are logged
    with their times. Any other exception is a fault of ours and keeps its traceback. A reader that closes our stdout
    ends the program quietly.
    """
    arguments = sys.argv[1:] if argv is None else argv
    verbose = bool(VERBOSE & set(arguments))
    try:
        with _termination_raises(), _stages_logged(prog, verbose):
            result = command.main(args=list(arguments), prog_name=prog, standalone_mode=False)
            sys.stdout.flush()
            return result if isinstance(result, int) else OK
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.Abort as abort:  # click's name for Ctrl-C and for EOFError
        if isinstance(abort.__cause__, EOFError):
            raise abort.__cause__ from None
        return _ended(prog, "interrupted", INTERRUPTED)
    except KeyboardInterrupt:
        return _ended(prog, "interrupted", INTERRUPTED)
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
        return _ended(prog, message, FAULT)
    except SystemExit as leave:  # click ends so when the reader of stdout is gone
        return _reader_gone() if leave.code == FAULT else int(leave.code or OK)


class Screen:
    """What a person reads: stdout, or stderr where stdout carries JSON. Control characters are left out."""

    def __init__(self, prog: str, quiet: bool = False, err: bool = False) -> None:
        self.prog, self.quiet, self.err = prog, quiet, err
        self.live = not quiet and (sys.stderr if err else sys.stdout).isatty()  # text is shown as it is generated

    def line(self, text: str = "") -> None:
        """Show a line."""
        self.text(f"{text}\n")

    def text(self, text: str) -> None:
        """Show a piece of text."""
        if not self.quiet:
            click.echo(text.translate(NO_CONTROLS), nl=False, err=self.err)

    def error(self, message: str) -> None:
        """Show a fault on stderr, also if quiet."""
        click.echo(f"{self.prog}: {message.translate(NO_CONTROLS)}", err=True)


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
        disable=not (enabled and sys.stderr.isatty()),
        dynamic_ncols=True,
        leave=False,
    )


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
    if isinstance(error, (CovoError, OSError)):
        return str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):  # torch's allocators raise RuntimeErrors
        return f"out of memory: {str(error).partition(chr(10))[0] or 'no more to have'}"
    return None


def _ended(prog: str, message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        Screen(prog).error(message)
    return code


def _reader_gone() -> int:
    """Return 1 after pointing stdout at nothing, so that the flush at exit does not fail a second time."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAULT
