"""Audio of clients as it arrives: decoded to samples, brought to another rate piece by piece.

The resampler is the front end's own (`runtime/resampling.resample`) on overlapping pieces, not soxr's stream:
a question that arrives in pieces gives the model the samples that the same question in a file gives it, and a
millisecond is held back instead of the 40 to 120 of soxr's longer filters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from covo_npu.runtime.resampling import SINC_ROLLOFF, SINC_ZEROS, resample

Array = NDArray[np.float32]


class Resampler:
    """One stream of samples from one rate to another, both in Hz. For one thread at a time."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        divisor = math.gcd(from_rate, to_rate)
        self._rates = from_rate, to_rate
        self._up, self._down = to_rate // divisor, from_rate // divisor
        reach = math.ceil(SINC_ZEROS * from_rate / (min(from_rate, to_rate) * SINC_ROLLOFF))  # samples to each side
        self._reach_periods = -(-reach // self._down)  # in periods of `down` input and `up` output samples
        self._held = np.zeros(0, np.float32)  # begins with a whole period, at most reach_periods before the next output
        self._done_periods = 0  # of the held samples: their output is out already

    def push(self, samples: Array) -> Array:
        """Return the samples at to_rate that more samples [n] at from_rate decide. n may be anything.

        All pieces and flush() together are what the whole gives at once: sums may round differently, by a few 1e-7
        of full scale.
        """
        if self._up == self._down:
            return samples
        self._held = np.concatenate([self._held, samples])
        decided = self._held.size // self._down - self._reach_periods  # the window of a later one reaches further
        if decided <= self._done_periods:
            return np.zeros(0, np.float32)
        out = self._resampled()[self._done_periods * self._up : decided * self._up]
        keep = max(0, decided - self._reach_periods)  # first period that a window to come touches
        self._held = self._held[keep * self._down :]
        self._done_periods = decided - keep
        return out

    def flush(self) -> Array:
        """Return the rest, as if silence followed, and begin anew."""
        out = self._resampled()[self._done_periods * self._up :] if self._held.size else self._held
        self._held, self._done_periods = np.zeros(0, np.float32), 0
        return out

    def _resampled(self) -> Array:
        return resample(torch.from_numpy(self._held), *self._rates, torch.float32).numpy()


def pcm16(data: bytes) -> Array:
    """Return samples [n] in [-1, 1) of 16-bit little-endian PCM. Raises ValueError if a byte is left over."""
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0


def g711(data: bytes, law: str) -> Array:
    """Return samples [n] in [-1, 1] of G.711 bytes. law: "pcmu" (mu-law) or "pcma" (A-law). Source: ITU-T G.711."""
    return G711[law][np.frombuffer(data, np.uint8)]


def _mu_law() -> NDArray[np.int32]:
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4 & 7).astype(np.int32), (code & 15).astype(np.int32)
    magnitude = ((2 * mantissa + 33) << exponent + 2) - 132  # 14 bits, left-aligned in 16
    return np.where(code & 128, -magnitude, magnitude)


def _a_law() -> NDArray[np.int32]:
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = (code >> 4 & 7).astype(np.int32), (code & 15).astype(np.int32)
    step = 2 * mantissa + 1 + 32 * (exponent > 0)
    magnitude = step << np.maximum(exponent - 1, 0) + 3  # 13 bits, left-aligned in 16
    return np.where(code & 128, magnitude, -magnitude)


G711 = {law: (table() / 32768.0).astype(np.float32) for law, table in (("pcmu", _mu_law), ("pcma", _a_law))}
