"""What conversion computes: pure functions of tensors, each with an inverse or an equality that the tests hold it to.

Sums and powers run in float64 and are rounded once, so that the result does not depend on the machine's vector units.
"""

import math

import numpy as np
import torch
from torch import Tensor

LARGEST = 127  # of an 8-bit weight: symmetric, so that no number needs an offset
SNAKE_EPS = 1e-9  # upstream's guard against a division by zero


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


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return (whole numbers int8 [n, K], scales float32 [n]): rows to within half a scale. rows: [n, K] float32.

    scale = largest magnitude / 127, rounded to nearest even; numbers likewise. A row of zeros, or of numbers so small
    that the scale would be below float32's normal range, becomes zeros with the scale 0. Inverse: numbers * scale.
    """
    scale = rows.abs().amax(1) / LARGEST
    scale[scale < torch.finfo(torch.float32).smallest_normal] = 0
    numbers = rows / torch.where(scale > 0, scale, torch.inf)[:, None]  # rounding leaves none above 127.0001
    np.rint(numbers.numpy(), out=numbers.numpy())  # as round_(), which PyTorch spreads over cores from 2048 values on
    return numbers.to(torch.int8), scale


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


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else math.inf
