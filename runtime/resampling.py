"""Resampling by windowed-sinc interpolation, with the same samples on every machine. N samples."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

SINC_ZEROS = 6  # zero crossings of the sinc on each side ("lowpass filter width")
SINC_ROLLOFF = 0.99  # cut-off as a fraction of the lower Nyquist frequency
MAX_DENSE_TAPS = 1 << 20  # phases times inputs of a period, up to which all taps are kept (4 MiB)
RESAMPLE_BLOCK = 1 << 20  # products at a time, bounds the working memory


def resample(samples: Tensor, from_rate: int, to_rate: int, kernel_dtype: torch.dtype) -> Tensor:
    """Return samples [ceil(N * to_rate / from_rate)] at to_rate. samples: [N] float32 at from_rate Hz.

    Windowed-sinc interpolation: Hann window, 6 zero crossings, roll-off 0.99; the signal counts as zero outside.
    kernel_dtype: what the kernel is evaluated in before it is rounded to float32. Sums run in float64 and are rounded
    once: every machine gets the same samples.
    Source: Smith, "Digital Audio Resampling", https://ccrma.stanford.edu/~jos/resample.
    """
    if from_rate == to_rate:
        return samples
    divisor = math.gcd(from_rate, to_rate)
    up, down = to_rate // divisor, from_rate // divisor  # `up` output samples for every `down` input samples
    length = -(-up * samples.shape[0] // down)
    # The usual rates have few phases: a product with all taps of a period. Odd pairs would make that kernel gigabytes:
    # there only the taps inside the window are kept and gathered.
    apply = _convolve if up * down <= MAX_DENSE_TAPS else _gather
    return apply(samples, up, down, length, kernel_dtype)


def _convolve(samples: Tensor, up: int, down: int, length: int, dtype: torch.dtype) -> Tensor:
    kernel, margin = _dense_kernel(up, down, dtype)  # [up, margin + down + margin]
    taps = kernel.T.double()
    windows = F.pad(samples, (margin, margin + down)).double().unfold(0, taps.shape[0], down)  # [periods, taps], a view
    out = samples.new_empty(-(-length // up), up)
    block = max(1, RESAMPLE_BLOCK // taps.shape[0])
    for begin in range(0, out.shape[0], block):
        piece = out[begin : begin + block]
        piece.copy_(windows[begin : begin + piece.shape[0]] @ taps)
    return out.view(-1)[:length]


def _gather(samples: Tensor, up: int, down: int, length: int, dtype: torch.dtype) -> Tensor:
    kernel, starts, margin = _sparse_kernel(up, down, min(up, length), dtype)  # [phases, taps], [phases]
    taps = kernel.shape[1]
    windows = F.pad(samples, (margin, taps)).unfold(0, taps, 1)  # [N + margin + 1, taps], a view
    out = samples.new_empty(length)
    block = max(1, RESAMPLE_BLOCK // taps)
    for begin in range(0, length, block):
        index = torch.arange(begin, min(begin + block, length))
        phase = index % up
        position = index // up * down + starts[phase] + margin
        out[begin : begin + block] = (windows[position] * kernel[phase]).sum(1, dtype=torch.float64)
    return out


def _half_width(up: int, down: int) -> int:
    """Return how many input samples the window reaches to each side, rounded up."""
    return math.ceil(SINC_ZEROS * down / (min(up, down) * SINC_ROLLOFF))


def _sinc(phase: Tensor, position: Tensor, up: int, down: int, dtype: torch.dtype) -> Tensor:
    """Return the kernel, float32, at input positions [..., taps] around output phases [up, 1] of a period.

    Sine and cosine run in float64 whatever the dtype: those of float32 differ between vector units.
    """
    cutoff = min(up, down) * SINC_ROLLOFF
    t = -phase.to(dtype) / up + position.to(dtype) / down  # in periods
    t = (t * cutoff).clamp(-SINC_ZEROS, SINC_ZEROS)  # in zero crossings
    window = (t * math.pi / SINC_ZEROS / 2).double().cos().to(dtype).square()
    t = t * math.pi
    sinc = torch.where(t == 0, torch.ones_like(t), t.double().sin().to(dtype) / t)
    return (sinc * (window * (cutoff / down))).float()


@lru_cache(maxsize=8)
def _dense_kernel(up: int, down: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return (kernel [up, margin + down + margin], margin): every phase over all inputs that its period may touch."""
    margin = _half_width(up, down)
    return _sinc(torch.arange(up)[:, None], torch.arange(-margin, margin + down), up, down, dtype), margin


@lru_cache(maxsize=2)
def _sparse_kernel(up: int, down: int, phases: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Return (kernel [phases, taps], starts [phases], margin) of the first phases of `up`.

    Output n reads from input n // up * down + starts[n % up] on.
    """
    margin = _half_width(up, down)
    phase = torch.arange(phases)
    starts = phase * down // up - margin
    return _sinc(phase[:, None], starts[:, None] + torch.arange(2 * margin + 2), up, down, dtype), starts, margin
