"""covo-run and covo-bench as programs on the emulated device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

LAUNCH = Path(__file__).with_name("launch.py")
QUESTION = Path(__file__).parents[1] / "data" / "audio" / "question_en_48k_24bit.wav"


def program(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, LAUNCH, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_covo_run_answers_as_upstream_does(
    convert_tiny: Callable[[str], Path], golden: Callable[[str], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    expected = golden("dialogue_fp32_two_rounds_a2ta")
    options = ("--device", "npu:0", "--ckpt", convert_tiny("float32"), "--max-new-tokens", "48", "--json", "run.json")
    done = program("covo-run", *options, QUESTION, folder=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    report = json.loads((tmp_path / "run.json").read_text("utf-8"))
    [answer] = report["rounds"]
    assert report["device"] == "npu:0" and report["backend"].startswith("npu (")
    assert answer["tokens"] == expected["r0_tokens"].tolist()
    samples, rate = soundfile.read(tmp_path / answer["wav"])
    assert rate == 24_000 and np.abs(samples).max() > 0


def test_covo_bench_launches_counts_a_checkpoint(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--ckpt", convert_tiny("bfloat16"), "--no-stock", "--json")
    done = program("covo-bench", "launches", *options, folder=tmp_path)
    rows = {row["stage"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0 and rows["decode"]["waits"] == 1
    assert 0 < rows["decode"]["launches"] <= rows["decode"]["budget"] == 12 * 3 + 20


def test_covo_check_ops_finds_nothing_that_falls_back(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--device", "npu:0", "--ckpt", convert_tiny("bfloat16"), "--json", "ops.json")
    done = program("covo-check", "ops", *options, folder=tmp_path)
    assert done.returncode == 0 and "nothing falls back, nothing is refused" in done.stdout
    states = {row["state"] for row in json.loads((tmp_path / "ops.json").read_text("utf-8"))}
    assert states <= {"fused", "kernel", "composed"} and "fused" in states
