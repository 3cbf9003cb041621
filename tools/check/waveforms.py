"""How far two waveforms are from each other, and the spectra that measures of speech look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from covo_npu.runtime.audio import SAMPLE_RATE

FLOOR = 1e-5  # of magnitudes before their logarithm: -100 dB of full scale
WINDOWS = (512, 1024, 2048)  # samples, of the multi-resolution distance
NUM_MELS, MEL_WINDOW = 80, 1024


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a waveform is from another. The last two are zero for equal ones and have no upper bound."""

    snr_db: float
    log_mel: float  # mean difference of the mel spectrum, in dB
    stft: float  # spectral convergence plus mean difference of log magnitudes, mean over WINDOWS

    def __str__(self) -> str:
        return f"SNR {self.snr_db:.1f} dB, log-mel {self.log_mel:.3f} dB, multi-resolution STFT {self.stft:.4f}"


def distance(found: Tensor, expected: Tensor) -> Distance:
    """Return the distance of two waveforms [N] of equal length."""
    found, expected = (torch.nn.functional.pad(x.double(), (0, max(0, 2048 - len(x)))) for x in (found, expected))
    filters = mel_filters(MEL_WINDOW, NUM_MELS, SAMPLE_RATE)
    mels = [20 * (filters @ spectrum(x, MEL_WINDOW)).clamp(min=FLOOR).log10() for x in (found, expected)]
    parts = []
    for window in WINDOWS:
        ours, theirs = (spectrum(x, window) for x in (found, expected))
        convergence = (ours - theirs).norm() / theirs.norm().clamp(min=FLOOR)
        logs = (ours.clamp(min=FLOOR).log() - theirs.clamp(min=FLOOR).log()).abs().mean()
        parts.append(float(convergence + logs))
    return Distance(snr_db(found, expected), float((mels[0] - mels[1]).abs().mean()), sum(parts) / len(parts))


def snr_db(found: Tensor, expected: Tensor) -> float:
    """Return how much smaller the difference is than what is expected, in dB; infinity for equal tensors."""
    noise = (found - expected).double().square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise)) if noise else float("inf")


def spectrum(x: Tensor, window: int) -> Tensor:
    """Return magnitudes [window // 2 + 1, frames] of a waveform [N], hop a quarter window."""
    shape = torch.hann_window(window, dtype=x.dtype)
    return torch.stft(x, window, window // 4, window=shape, return_complex=True, pad_mode="constant").abs()


def mel_filters(window: int, count: int, rate: int) -> Tensor:
    """Return triangles [count, window // 2 + 1] evenly spaced in mel, 2595 log10(1 + f / 700)."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, count + 2, dtype=torch.float64) * top / 2595) - 1)
    bins = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    left, centre, right = (edges[i : i + count, None] for i in range(3))
    return torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp(min=0)
