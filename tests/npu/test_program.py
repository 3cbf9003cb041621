"""covo-run and covo-check as programs on the emulated device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from covo_npu.kernels import npu
from covo_npu.runtime.options import LoadOptions
from covo_npu.tools.check import ops
from covo_npu.tools.check.result import Subject

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
    assert report["graphs"]["graphs"] == 2 and report["speech_graphs"]["graphs"] == 1
    samples, rate = soundfile.read(tmp_path / answer["wav"])
    assert rate == 24_000 and np.abs(samples).max() > 0


@pytest.mark.parametrize(
    ("llm", "stages", "how"),
    [("npu:0", "cpu", "--no-stream"), ("npu:0", "cpu", "--stream"), ("cpu", "npu:0", "--stream")],
)
def test_encoder_and_speech_on_a_device_of_their_own(
    convert_tiny: Callable[[str], Path],
    golden: Callable[[str], dict[str, np.ndarray]],
    tmp_path: Path,
    llm: str,
    stages: str,
    how: str,
) -> None:
    expected, ckpt = golden("dialogue_fp32_two_rounds_a2ta"), convert_tiny("float32")
    options = ("--device", llm, "--encoder-device", stages, "--speech-device", stages, "--ckpt", ckpt, how)
    done = program("covo-run", *options, "--max-new-tokens", "48", "--json", "run.json", QUESTION, folder=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    report = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert report["rounds"][0]["tokens"] == expected["r0_tokens"].tolist()
    assert np.abs(soundfile.read(tmp_path / report["rounds"][0]["wav"])[0]).max() > 0
    sizes = {name: (ckpt / f"{name}.safetensors").stat().st_size for name in ("llm-rank0of1", "encoder", "token2wav")}
    placed = {row["device"]: row["bytes"] for row in report["load"]["placed"]}
    assert placed == {llm: sizes["llm-rank0of1"], stages: sizes["encoder"] + sizes["token2wav"]}
    assert f"rank 0, {stages}:" in done.stdout + done.stderr
    captured = {"graphs": llm, "speech_graphs": stages}  # each where its own device has them
    assert report.keys() & captured.keys() == {name for name, device in captured.items() if device == "npu:0"}
    assert ("graphs of speech captured" in done.stdout + done.stderr) == (stages == "npu:0")


def test_covo_check_ops_runs_every_stage_on_the_device_that_is_there(
    convert_tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--ckpt", convert_tiny("bfloat16"), "--json", "ops.json")  # --device auto
    done = program("covo-check", "ops", *options, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "ops.json").read_text("utf-8"))
    assert result["subject"].startswith("npu:0, npu (") and result["subject"].endswith("; bfloat16")
    assert len(result["findings"]) == 5 and all(finding["holds"] for finding in result["findings"])


def test_the_command_for_a_card_runs_all_of_it(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--device", "npu:0", "--ckpt", convert_tiny("bfloat16"), "--output", "report", "--json", "all.json")
    done = program("covo-check", "all", *options, folder=tmp_path)
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    found = {result["check"]: result for result in report["results"]}
    # doctor and repeat look at the machine and start processes of their own, in which no device is emulated
    failed = {name: [f["name"] for f in r["findings"] if f["holds"] is False] for name, r in found.items()}
    assert {name for name, faults in failed.items() if faults} == {"doctor", "repeat"}, failed
    rows = {finding["name"]: finding["measured"] for r in found.values() for finding in r["findings"]}
    assert {"kernels", "launches", "graphs", "transfer", "ops", "stages"} <= found.keys()
    assert "kernels" in rows["prefill and decoding"] and "%" in rows["load"]
    assert rows["tokens"] == "64 of 64 equal" and "masked_decode_attention, 8192 rows" in rows
    assert "Traceback" not in done.stderr


def test_covo_check_ops_finds_what_the_device_refuses_and_what_falls_back(
    convert_tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu, "swiglu", lambda gate_up: gate_up.cumsum(-1).chunk(2, -1)[0])  # not in bfloat16
    monkeypatch.setattr(npu, "anti_aliased_snake", lambda x, *_: torch.special.bessel_j0(x))
    result = ops.examine(Subject(convert_tiny("bfloat16"), None, LoadOptions("npu:0")))
    found = {finding.name: finding.measured for finding in result.findings if not finding.holds}
    assert set(found) == {"prefill and decoding", "sampling", "flow matching and vocoder"}
    assert "aten::cumsum on npu" in found["prefill and decoding"]
    assert "aten::special_bessel_j0" in found["flow matching and vocoder"]
