"""The question that is asked where none is given: a voice-like tone, made up, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

RATE = 16_000  # Hz
SECONDS = 8
MAX_SECONDS = 3600  # of a file: its header is not believed further
PITCH_HZ, HARMONICS = 140.0, 20
SYLLABLE_HZ = 3.0
NOISE = 10 ** (-40 / 20)  # a quiet room, 40 dB under full scale


def read_question(wav: Path | None) -> tuple[Tensor, int, str]:
    """Return (samples [N] float32, rate in Hz, what it is) of a file, or of the question that is made up."""
    import torch

    from covo_npu.runtime.audio import read_audio

    if wav is None:
        return torch.from_numpy(made_up()), RATE, f"a made-up question of {SECONDS} s"
    samples, rate = read_audio(wav, MAX_SECONDS)
    return samples, rate, f"{wav.name}, {samples.shape[0] / rate:.1f} s"


def write_made_up(path: Path) -> Path:
    """Return the path, after writing the made-up question there as a WAV file."""
    from covo_npu.runtime.wav import write_wav

    write_wav(path, made_up(), RATE)
    return path


def made_up(seconds: float = SECONDS) -> np.ndarray:
    """Return samples [N] float32 at RATE: harmonics of a moving pitch in syllables with pauses, over room noise."""
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = PITCH_HZ * (1 + 0.15 * np.sin(2 * np.pi * 0.4 * t) + 0.02 * np.sin(2 * np.pi * 5.5 * t))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, HARMONICS + 1))
    syllables = np.clip(np.sin(2 * np.pi * SYLLABLE_HZ * t), 0, None) * (np.sin(2 * np.pi * 0.25 * t) > -0.7)
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal(t.shape[0])
    return (0.25 * voice * syllables + NOISE * noise).astype(np.float32)
