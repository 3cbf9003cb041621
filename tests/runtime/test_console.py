"""How command lines end: exit codes, messages, signals. Each case is a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, time
import click
from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.cli import console

@click.command()
@click.argument("case", type=click.Choice(["ok", "code", "covo", "missing", "memory", "bug", "wait", "flood"]))
@click.option("--verbose", is_flag=True)
def command(case, verbose):
    if case == "code":
        return 1
    if case == "covo":
        raise CovoError("the cable is cut")
    if case == "missing":
        open("/nonexistent/file")
    if case == "memory":
        import torch
        torch.empty(1 << 60)
    if case == "bug":
        raise ValueError("ours")
    if case == "wait":
        try:
            print("waiting", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    while case == "flood":
        print("x" * 1000)
    return None

sys.exit(console.run(command, "covo-test"))
"""


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ok_and_a_returned_code():
    assert outcome("ok") == (0, "", "")
    assert outcome("code") == (1, "", "")


def test_a_fault_is_one_line_with_the_program_in_front():
    assert outcome("covo") == (1, "", "covo-test: the cable is cut\n")
    code, _, err = outcome("missing")
    assert code == 1 and err.startswith("covo-test: ") and "/nonexistent/file" in err and err.count("\n") == 1


def test_a_lack_of_memory_is_a_fault_of_one_line():
    code, _, err = outcome("memory")
    assert code == 1 and err.startswith("covo-test: out of memory: ") and err.count("\n") == 1


def test_verbose_shows_the_traceback_too():
    code, _, err = outcome("covo", "--verbose")
    assert code == 1 and "Traceback" in err and err.endswith("covo-test: the cable is cut\n")


def test_usage_errors_are_2():
    code, _, err = outcome("nonsense")
    assert code == 2 and "Usage: covo-test" in err and "Traceback" not in err
    assert outcome("ok", "--unknown")[0] == 2
    assert outcome("--help")[0] == 0


def test_a_bug_keeps_its_traceback():
    code, _, err = outcome("bug")
    assert code == 1 and "Traceback" in err and "ValueError: ours" in err


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_run_finally_blocks_and_have_their_codes(number, code, word):
    process = start("wait")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == "cleaned up\n"
    assert err.strip() == f"covo-test: {word}"


def test_a_reader_that_leaves_ends_it_quietly():
    process = start("flood")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""


def test_progress_is_silent_without_a_terminal():
    program = "from covo_npu.runtime.cli.console import progress\nwith progress(3, 'B', 'read') as bar: bar.update(3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_argument_errors_do_not_wait_for_torch():
    program = PROGRAM.replace("sys.exit(console.run(", "print(console.run(").replace(
        '"covo-test"', '"covo-test", ["oops"]'
    )
    program += "\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2\nFalse\n"


def test_ctrl_c_in_the_middle_of_an_import_is_130_too(tmp_path: Path) -> None:
    """As when dataclasses execute source of theirs: python -m would end by the signal instead."""
    (tmp_path / "interrupted.py").write_text(
        "import os, signal, sys, click\n"
        "from covo_npu.runtime.cli import console\n"
        "source = 'os.kill(os.getpid(), signal.SIGINT)\\nsignal.pause()'\n"
        "command = click.Command('interrupted', callback=lambda: exec(source))\n"
        "sys.exit(console.run(command, 'interrupted', []))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted: interrupted")
