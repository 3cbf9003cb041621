"""Codes to waveform against what upstream computed, stage by stage, and the options of its speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from covo_npu.kernels.device import fast_dtype
from covo_npu.runtime import CovoAudio
from covo_npu.runtime.flow import Flow
from covo_npu.tools.bench.stock_token2wav import StockToken2Wav

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
    expected, speech, voice = golden(f"token2wav_{count}"), model.speech, model.voice.to(model.device)
    codes = torch.cat((voice.prompt_codes, torch.tensor(expected["tokens"], device=model.device)))
    with torch.inference_mode():
        noise = torch.tensor(expected["noise"][0], device=model.device)
        *_, latents = speech.solve(codes, voice.prompt_latents, noise, voice)
        waveform = speech.vocoder(torch.tensor(expected["vocoder_in"], device=model.device))[0]
    assert relative(latents, torch.tensor(expected["latents_normalised"][0, voice.num_frames :])) <= 1e-4
    assert snr_db(waveform.cpu().numpy(), expected["wav"]) >= 80


@pytest.mark.parametrize("count", COUNTS)
def test_the_stock_formulation_is_upstreams(model: CovoAudio, golden: Golden, count: int) -> None:
    """What the bench compares with computes what upstream computes."""
    expected = golden(f"token2wav_{count}")
    stock = StockToken2Wav(model.speech, model.voice.to(model.device))
    with torch.inference_mode():
        noise = torch.tensor(expected["noise"][0], device=model.device)
        latents = stock.normalised_latents(torch.tensor(expected["tokens"], device=model.device), noise)
        waveform = stock.vocoder(torch.tensor(expected["vocoder_in"], device=model.device))[0]
    start = model.voice.num_frames
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


def test_auto_follows_a_dtype_that_was_chosen(folder: Path, golden: Golden, device: str) -> None:
    """Whoever asks for float32 gets it in flow matching, too, on a machine that is faster in bfloat16 as well."""
    expected = golden("token2wav_60")
    model = CovoAudio.load(folder, device=device, dtype="float32")
    assert model.report.token2wav_dtype == "float32"
    assert snr_db(model.token2wav(expected["tokens"].tolist(), expected["noise"]), expected["wav"]) >= 80
    assert CovoAudio.load(folder, device=device, dtype="bfloat16").report.token2wav_dtype == "bfloat16"
    assert CovoAudio.load(folder, device=device, dtype="float32", speech=False).report.token2wav_dtype == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_vocoder_of_another_dtype(folder: Path, model: CovoAudio, golden: Golden, device: str, dtype: str) -> None:
    """The products of its residual blocks, where this backend has that dtype, and nothing else."""
    expected = golden("token2wav_60")
    narrow = CovoAudio.load(folder, device=device, token2wav_dtype="float32", vocoder_dtype=dtype)
    assert (narrow.report.token2wav_dtype, narrow.report.vocoder_dtype) == ("float32", dtype)
    waveform = narrow.token2wav(expected["tokens"].tolist(), expected["noise"])
    held = narrow.kernels.conv_weight(torch.zeros(1, device=device), getattr(torch, dtype)).dtype
    found = {name: each.dtype for name, each in narrow.speech.named_parameters() if each.dtype != torch.float32}
    if held == torch.float32:
        assert not found
        assert np.array_equal(waveform, model.token2wav(expected["tokens"].tolist(), expected["noise"]))
    else:
        assert set(found.values()) == {held} and all(".blocks." in name and ".conv" in name for name in found)
        assert 25 < snr_db(waveform, expected["wav"]) < 80


def test_a_start_does_not_wait_for_the_networks_of_speech(folder: Path, device: str) -> None:
    model = CovoAudio.load(folder, device=device, token2wav_dtype="bfloat16")
    assert {parameter.device.type for parameter in model.networks.token2wav.parameters()} == {"meta"}
    assert model.token2wav([]).shape == (0,)
    assert {parameter.device.type for parameter in model.networks.token2wav.parameters()} == {"meta"}
    model.token2wav([1])
    assert model.speech is model.networks.token2wav
    assert model.speech.dit.blocks[0].fc1.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("steps", "solver", "evaluations"),
    [(None, "midpoint", 18), (9, "midpoint", 18), (4, "midpoint", 8), (9, "euler", 9)],
)
def test_steps_and_solver(model: CovoAudio, golden: Golden, steps: int | None, solver: str, evaluations: int) -> None:
    expected = golden("token2wav_1")
    codes, noise = expected["tokens"].tolist(), expected["noise"]
    flow = Flow(steps or 9, solver) if steps else None
    done: list[tuple[str, int, int]] = []
    waveform = model.token2wav(codes, noise, flow=flow, on_progress=lambda *step: done.append(step))
    assert [step for step in done if step[0] == "flow matching"] == [
        ("flow matching", evaluation + 1, evaluations) for evaluation in range(evaluations)
    ]
    usual = model.token2wav(codes, noise)
    assert np.array_equal(waveform, usual) == (evaluations == 18)
    assert np.array_equal(model.token2wav(codes, noise), usual)


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        Flow(0)


def test_same_seed_same_samples(model: CovoAudio) -> None:
    first, again, other = (model.token2wav([3, 1, 2], seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert model.token2wav([]).shape == (0,)
