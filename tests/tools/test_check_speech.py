"""The distances of the speech report, and the report of a small checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch

from covo_npu.kernels import native
from covo_npu.tools.check.waveforms import distance, mel_filters
from covo_npu.tools.speech import PLANS


def noise(seed: int, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.randn(6000, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_nothing() -> None:
    x = noise(0)
    found = distance(x, x.clone())
    assert found.snr_db == float("inf") and found.log_mel == 0 and found.stft == 0


@pytest.mark.parametrize("decibels", [20.0, 60.0])
def test_noise_of_a_known_level(decibels: float) -> None:
    x, error = noise(0), noise(1)
    error *= x.norm() / error.norm() * 10 ** (-decibels / 20)
    assert distance(x + error, x).snr_db == pytest.approx(decibels, abs=1e-3)


def test_a_gain_is_its_decibels_in_every_band() -> None:
    """1 dB louder: the mel bands differ by 1 dB, log magnitudes by ln 10 / 20, spectra by their ratio less one."""
    x, gain = noise(0), 10 ** (1 / 20)
    found = distance(gain * x, x)
    assert found.log_mel == pytest.approx(1.0, abs=1e-6)
    assert found.stft == pytest.approx(np.log(10) / 20 + gain - 1, abs=1e-4)


def test_filters_as_librosas() -> None:
    expected = librosa.filters.mel(sr=24000, n_fft=1024, n_mels=80, htk=True, norm=None)
    assert np.allclose(mel_filters(1024, 80, 24000).numpy(), expected, atol=1e-5)


def test_report(convert_tiny: Callable[[str], Path]) -> None:
    command = [Path(sys.executable).with_name("covo-check"), "speech", "--ckpt", convert_tiny("float32")]
    done = subprocess.run(
        [*command, "--device", "cpu", "--codes", "40", "--stream", "--json", "-"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = [finding["name"] for finding in report["findings"]]
    assert names[1:4] == ["flow matching bfloat16", "vocoder bfloat16", "vocoder float16"] and report["holds"]
    assert names[7:] == ["fixed context", *(f"in blocks, {name}" for name in (*PLANS, "default, fixed context"))]
    assert all("seams: energy" in finding["measured"] for finding in report["findings"][8:])
    assert names[4:7] == [
        "12 evaluations (6 midpoint steps)", "8 evaluations (4 midpoint steps)", "9 evaluations (9 euler steps)"
    ]  # fmt: skip
    snr = {one["name"]: float(one["measured"].split()[1]) for one in report["findings"] if "SNR" in one["measured"]}
    threads, flow, *fewer = (snr[names[i]] for i in (0, 1, 4, 5, 6))
    assert threads > 80 > flow > max(fewer)
    for dtype in (torch.bfloat16, torch.float16):
        name = f"vocoder {str(dtype).removeprefix('torch.')}"
        rounded = native.product_dtype(dtype, torch.device("cpu")) == dtype
        assert 30 < snr[name] < 80 if rounded else name not in snr
