"""The count of operations against PyTorch's own counter, and the bench on a small checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runtime.speech_sizes import SMALL, small_token2wav, small_voice
from torch.utils.flop_counter import FlopCounterMode

from covo_npu.kernels import native
from covo_npu.runtime.options import WHOLE, SpeechBlocks
from covo_npu.tools.bench import stream
from covo_npu.tools.bench.token2wav import evaluation_flops, vocoder_flops


def test_operations_of_the_vocoder() -> None:
    networks, frames = small_token2wav(), 200
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        networks.vocoder(torch.randn(1, 8, frames))
    assert vocoder_flops(SMALL.vocoder, frames) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FUSED_DTYPES", ())  # PyTorch's counter does not know oneDNN's fused product
    networks, voice, frames = small_token2wav(), small_voice(), 80
    conditions = networks.dit.conditions(torch.zeros(20, dtype=torch.int64), voice.prompt_latents)
    (parts,) = networks.dit.modulations([0.0], voice.speaker_embedding)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        networks.dit(torch.randn(frames, 8), conditions, parts)
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if "attention" not in name)
    attention = SMALL.dit.num_layers * 2 * 2 * 2 * frames**2 * SMALL.dit.hidden_size
    # The counter has the noisy latents' projection, of one row, and the output's, of two: ours counts two of both.
    assert evaluation_flops(SMALL.dit, frames) - attention == pytest.approx(products, rel=0.02)


@pytest.mark.slow
def test_bench(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [Path(sys.executable).with_name("covo-bench"), "token2wav", "--ckpt", convert_tiny("float32")]
    options = ["--codes", "2", "--codes", "3", "--runs", "1", "--device", "cpu", "--json", report]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {(row["stage"], row["codes"]) for row in rows if row["path"] == "ours float32"} == {
        (stage, codes) for stage in ("flow matching", "vocoder") for codes in (2, 3)
    }
    assert {row["stage"] for row in rows if row["path"] == "fixed context float32"} == {"flow matching"}
    assert all(row["seconds"] > 0 and row["rtf"] > 0 for row in rows)
    assert "| stock float32 " in done.stdout


def test_bench_of_streams(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [Path(sys.executable).with_name("covo-bench"), "token2wav", "--ckpt", convert_tiny("float32")]
    plans = ["default", "3 s of prompt and past"]
    options = ["--codes", "40", "--runs", "1", "--device", "cpu", "--json", report, "--stream"]
    options += [part for name in plans for part in ("--plan", name)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert [row["plan"] for row in rows] == ["whole reply", *plans]
    assert rows[0]["of_whole"] == 1 and all(0 < row["first_s"] < row["seconds"] for row in rows)
    assert "| 3 s of prompt and past | " in done.stdout


def test_streams_are_measured_as_they_would_run(convert_tiny: Callable[[str], Path]) -> None:
    """--graph counts with --stream, too."""
    command = [Path(sys.executable).with_name("covo-bench"), "token2wav", "--ckpt", convert_tiny("float32"), "--stream"]
    done = subprocess.run([*command, "--device", "cpu", "--graph", "on"], capture_output=True, text=True)
    assert done.returncode == 1 and "device cpu has no graphs to capture" in done.stderr


@pytest.mark.parametrize("blocks", [WHOLE, SpeechBlocks(), SpeechBlocks((7,), look_ahead=2, past_s=0.5)])
def test_the_cost_of_a_stream_counts_every_evaluation(blocks: SpeechBlocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 1 s an evaluation and by 1000 s a piece of the vocoder."""
    networks, now = small_token2wav(), [0.0]
    solved: list[int] = []

    class Ticking:
        def __init__(self, work: Callable[..., object], seconds: float) -> None:
            self.work, self.seconds = work, seconds

        def __call__(self, *args: object) -> object:
            now[0] += self.seconds
            return self.work(*args)

    conditions, step = networks.dit.conditions, networks.vocoder.step
    monkeypatch.setattr(networks.dit, "forward", Ticking(networks.dit.forward, 1.0))
    monkeypatch.setattr(networks.dit, "conditions", lambda *args: solved.append(1) or conditions(*args))
    monkeypatch.setattr(networks.vocoder, "step", Ticking(step, 1000.0))
    monkeypatch.setattr(stream.time, "perf_counter", lambda: now[0])
    with torch.inference_mode():
        found = stream.cost(networks, small_voice(), blocks, 60, 2)
    pieces = round((found.seconds - 18 * len(solved)) / 1000)
    assert found.seconds == 18 * len(solved) + 1000 * pieces and pieces >= len(solved)
    assert found.first_s == 18 + 1000 and found.samples == 240 * (4 * 60 - 3)
    assert (len(solved) == 1) == (blocks == WHOLE)
