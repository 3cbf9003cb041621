"""A few seconds of each fuzzer, always the same cases; `make fuzz` runs them for as long as one likes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
SECONDS = {
    "audio": 5,
    "tokenizer": 4,
    "stages": 2,
    "batch": 2,
    "header": 6,
    "source": 8,
    "manifest": 8,
    "values": 6,
    "arrival": 5,
}
FEWEST_CASES = 8  # also where that takes longer


@pytest.mark.slow
@pytest.mark.parametrize("target", SECONDS)
def test_files_from_outside_are_used_or_refused(target, tiny_source, convert_tiny, tmp_path):
    command = [sys.executable, FUZZ, target, "--source", tiny_source, "--ckpt", convert_tiny("float32")]
    command += ["--seconds", str(SECONDS[target]), "--cases", str(FEWEST_CASES), "--keep", tmp_path / "kept"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["cases"] >= FEWEST_CASES
    assert report["faults"] == 0
    assert report.get("refused", 0) > 0


def test_the_fuzzer_notices_a_fault(tiny_source, convert_tiny, tmp_path):
    """With a reader that forgets one kind of damage, the same cases fail, and the input is kept."""
    code = (
        "import sys; from covo_npu.kernels.errors import CovoError\n"
        "sys.path.insert(0, sys.argv.pop(1)); import fuzz\n"
        "class Forgotten(Exception): pass\n"
        "fuzz.CovoError = Forgotten\n"
        "sys.exit(fuzz.main())"
    )
    command = [sys.executable, "-c", code, FUZZ.parent, "stages", "--source", tiny_source, "--ckpt", tiny_source]
    done = subprocess.run([*command, "--seconds", "1", "--keep", tmp_path / "kept"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["faults"] > 0
    assert any((tmp_path / "kept").rglob("*"))
