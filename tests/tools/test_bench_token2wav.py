"""The count of operations against PyTorch's own counter, and the bench on a small checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runtime.speech_sizes import SMALL, small_token2wav
from torch.utils.flop_counter import FlopCounterMode

from covo_npu.kernels import native
from covo_npu.tools.bench_token2wav import evaluation_flops, vocoder_flops


def test_operations_of_the_vocoder() -> None:
    networks, frames = small_token2wav(), 200
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        networks.vocoder(torch.randn(1, 8, frames))
    assert vocoder_flops(SMALL.vocoder, frames) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FUSED_DTYPES", ())  # PyTorch's counter does not know oneDNN's fused product
    networks, frames = small_token2wav(), 80
    conditions = networks.dit.conditions(torch.zeros(20, dtype=torch.int64), networks.voice.prompt_latents)
    parts = networks.dit.modulation(0.0, networks.voice.speaker_embedding)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        networks.dit(torch.randn(frames, 8), conditions, parts)
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if "attention" not in name)
    attention = SMALL.dit.num_layers * 2 * 2 * 2 * frames**2 * SMALL.dit.hidden_size
    # The counter has the noisy latents' projection, of one row, and the output's, of two: ours counts two of both.
    assert evaluation_flops(SMALL.dit, frames) - attention == pytest.approx(products, rel=0.02)


def test_bench(convert_tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [Path(sys.executable).with_name("covo-bench"), "token2wav", "--ckpt", convert_tiny("float32")]
    options = ["--codes", "2", "--codes", "3", "--runs", "1", "--processor-time", "--json", report]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {(row["stage"], row["codes"]) for row in rows if row["path"] == "ours float32"} == {
        (stage, codes) for stage in ("flow matching", "vocoder") for codes in (2, 3)
    }
    assert all(row["seconds"] > 0 and row["rtf"] > 0 for row in rows)
    assert "| stock float32 | " in done.stdout
