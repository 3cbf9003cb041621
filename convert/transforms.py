"""What conversion computes: pure functions of tensors, each with an inverse or an equality that the tests hold it to.

Sums and powers run in float64 and are rounded once, so that the result does not depend on the machine's vector units.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SNAKE_EPS = 1e-9  # upstream's guard against a division by zero


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another dtype, rounded to nearest even. Raises OverflowError if a value becomes infinite."""
    result = tensor.to(dtype)
    if bool((result.isinf() & ~tensor.isinf()).any()):
        raise OverflowError(f"values up to {float(tensor.abs().max()):g} do not fit into {dtype}")
    return result


def flat(tensor: Tensor) -> Tensor:
    """Return the tensor without its leading axis of size 1."""
    return tensor.squeeze(0)


def fold_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """Return v * g / ||v|| like v, the norm over all axes but the first. g: [n, 1, 1]; v: [n, ...].

    Inverse: g is the norm of the result. Source: arXiv 1602.07868.
    """
    norm = torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True, dtype=torch.float64)
    return (v.double() * (g.double() / norm)).to(v.dtype)


def exp(tensor: Tensor) -> Tensor:
    """Return e^x. Inverse: log."""
    return tensor.double().exp().to(tensor.dtype)


def inverse_beta(log_beta: Tensor) -> Tensor:
    """Return 1 / (e^x + 1e-9), the factor of SnakeBeta. Inverse: log(1 / y - 1e-9)."""
    return (log_beta.double().exp() + SNAKE_EPS).reciprocal().to(log_beta.dtype)


def mean(statistics: Tensor) -> Tensor:
    """Return the first half: the latents' mean [Z]. statistics: [2 Z], mean then variance."""
    return statistics[: statistics.numel() // 2]


def std(statistics: Tensor) -> Tensor:
    """Return the square root of the second half: the latents' standard deviation [Z]. Inverse: the square."""
    return statistics[statistics.numel() // 2 :].double().sqrt().to(statistics.dtype)


def equal(*tensors: Tensor) -> Tensor:
    """Return the tensor that all are equal to, flat. Raises ValueError if one differs."""
    first = tensors[0]
    for position, other in enumerate(tensors):
        if not torch.equal(first, other):
            raise ValueError(
                f"copy {position} of {len(tensors)} differs from the first by up to {_gap(first, other):g}"
            )
    return first.flatten()


def mel_filters(num_mels: int, rate: int = 16_000, n_fft: int = 400) -> Tensor:
    """Return Slaney's mel filter bank [M, n_fft / 2 + 1] float32: triangles of equal area from 0 Hz to rate / 2.

    Equal to librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=128) bit for bit.
    Source: Slaney, Auditory Toolbox, Technical Report 1998-010.
    """
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (rate / n_fft)
    top = _hertz_to_mel(rate / 2)
    edges = torch.tensor([_mel_to_hertz(mel) for mel in _steps(0.0, top, num_mels + 2)], dtype=torch.float64)
    ramps = edges[:, None] - frequencies[None, :]
    width = edges.diff()[:, None]
    triangles = torch.minimum(-ramps[:-2] / width[:-1], ramps[2:] / width[1:]).clamp(min=0).float()
    return (triangles.double() * (2.0 / (edges[2:] - edges[:-2]))[:, None]).float()


_LINEAR_HZ, _BREAK_HZ, _BREAK_MEL = 200.0 / 3, 1000.0, 15.0  # Slaney's scale: linear below 1 kHz, then logarithmic
_LOG_STEP = math.log(6.4) / 27.0


def _hertz_to_mel(hertz: float) -> float:
    return hertz / _LINEAR_HZ if hertz < _BREAK_HZ else _BREAK_MEL + math.log(hertz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hertz(mel: float) -> float:
    return mel * _LINEAR_HZ if mel < _BREAK_MEL else _BREAK_HZ * math.exp(_LOG_STEP * (mel - _BREAK_MEL))


def _steps(first: float, last: float, count: int) -> Sequence[float]:
    return [first + (last - first) / (count - 1) * i for i in range(count)]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else math.inf
