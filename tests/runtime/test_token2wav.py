"""Codes to waveform against what upstream computed, stage by stage, and the options of its speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from covo_npu.kernels.select import fast_dtype
from covo_npu.runtime import CovoAudio
from covo_npu.tools.stock_token2wav import StockToken2Wav

Golden = Callable[[str], dict[str, np.ndarray]]
COUNTS = (1, 15, 60)


@pytest.fixture(scope="module")
def folder(convert_tiny: Callable[[str], Path]) -> Path:
    return convert_tiny("float32")


@pytest.fixture(scope="module")
def model(folder: Path, device: str) -> CovoAudio:
    return CovoAudio.load(folder, device=device, token2wav_dtype="float32")


def snr_db(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("count", COUNTS)
def test_stages_as_upstream(model: CovoAudio, golden: Golden, count: int) -> None:
    expected = golden(f"token2wav_{count}")
    networks = model.networks.token2wav
    codes = torch.tensor(expected["tokens"], device=model.device)
    with torch.inference_mode():
        latents = networks.normalised_latents(codes, torch.tensor(expected["noise"][0], device=model.device))
        waveform = networks.vocoder(torch.tensor(expected["vocoder_in"], device=model.device))[0]
    start = networks.config.voice.num_frames
    assert relative(latents[start:], torch.tensor(expected["latents_normalised"][0, start:])) <= 1e-4
    assert snr_db(waveform.cpu().numpy(), expected["wav"]) >= 80


@pytest.mark.parametrize("count", COUNTS)
def test_the_stock_formulation_is_upstreams(model: CovoAudio, golden: Golden, count: int) -> None:
    """What the bench compares with computes what upstream computes."""
    expected = golden(f"token2wav_{count}")
    stock = StockToken2Wav(model.networks.token2wav)
    with torch.inference_mode():
        noise = torch.tensor(expected["noise"][0], device=model.device)
        latents = stock.normalised_latents(torch.tensor(expected["tokens"], device=model.device), noise)
        waveform = stock.vocoder(torch.tensor(expected["vocoder_in"], device=model.device))[0]
    start = model.networks.token2wav.config.voice.num_frames
    assert relative(latents[start:], torch.tensor(expected["latents_normalised"][0, start:])) <= 1e-4
    assert snr_db(waveform.cpu().numpy(), expected["wav"]) >= 80


def test_dtypes(folder: Path, model: CovoAudio, golden: Golden, device: str) -> None:
    expected = golden("token2wav_60")
    codes, noise = expected["tokens"].tolist(), expected["noise"]
    half = CovoAudio.load(folder, device=device, token2wav_dtype="bfloat16").token2wav(codes, noise)
    assert 25 < snr_db(half, expected["wav"]) < 80
    auto = CovoAudio.load(folder, device=device)
    assert auto.report.token2wav_dtype == str(fast_dtype(auto.device)).removeprefix("torch.")
    if auto.report.token2wav_dtype == "bfloat16":
        assert np.array_equal(auto.token2wav(codes, noise), half)


def test_nothing_is_cast_before_speech(folder: Path, device: str) -> None:
    model = CovoAudio.load(folder, device=device, token2wav_dtype="bfloat16")
    weight = model.networks.token2wav.dit.blocks[0].fc1.weight
    assert weight.dtype == torch.float32
    model.token2wav([1])
    assert model.networks.token2wav.dit.blocks[0].fc1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("steps", "solver", "evaluations"),
    [(None, "midpoint", 18), (9, "midpoint", 18), (4, "midpoint", 8), (9, "euler", 9)],
)
def test_steps_and_solver(
    folder: Path, model: CovoAudio, golden: Golden, device: str, steps: int | None, solver: str, evaluations: int
) -> None:
    expected = golden("token2wav_1")
    codes, noise = expected["tokens"].tolist(), expected["noise"]
    chosen = CovoAudio.load(folder, device=device, token2wav_dtype="float32", flow_steps=steps, flow_solver=solver)
    done: list[tuple[str, int, int]] = []
    waveform = chosen.token2wav(codes, noise, on_progress=lambda *step: done.append(step))
    assert [step for step in done if step[0] == "flow matching"] == [
        ("flow matching", evaluation + 1, evaluations) for evaluation in range(evaluations)
    ]
    assert np.array_equal(waveform, model.token2wav(codes, noise)) == (evaluations == 18)


def test_no_steps_are_refused(folder: Path, device: str) -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        CovoAudio.load(folder, device=device, flow_steps=0)


def test_same_seed_same_samples(model: CovoAudio) -> None:
    first, again, other = (model.token2wav([3, 1, 2], seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert model.token2wav([]).shape == (0,)
