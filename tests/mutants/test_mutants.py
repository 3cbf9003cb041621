"""The suite notices faults of the numerical core: see mutants.py."""

import subprocess
import sys
from pathlib import Path

import pytest

MUTANTS = Path(__file__).with_name("mutants.py")


@pytest.mark.slow
def test_every_mutant_is_caught(convert_tiny):
    command = [sys.executable, MUTANTS, "--converted", convert_tiny("float32").parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" caught in ") >= 20


def test_a_mutant_that_no_test_can_notice_survives(convert_tiny):
    """The check can fail: a change of a comment is no fault, so its tests pass, and that is reported."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import mutants as m\n"
        "m.MUTANTS = (m.Mutant('comment', 'runtime/flow.py', 'not written.', 'not  written.', m.FLOW),)\n"
        "sys.exit(m.main())"
    )
    command = [sys.executable, "-c", code, MUTANTS.parent, "--converted", convert_tiny("float32").parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "FAIL  comment" in done.stdout and "survived tests/runtime/test_flow.py" in done.stdout
