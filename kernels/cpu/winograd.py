"""Convolutions by Winograd's way, F(4, 4): seven products for four results of four taps instead of sixteen.

Sources: S. Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, arXiv 1509.09308. csrc/winograd.h
transforms signals and results; the products between are oneDNN's. Results are two to four times as far from exact
sums as those of a plain convolution in float32. A sample that is not finite, or beyond 1e37, reaches some results more
than it has taps for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.kernels.cpu import library

TAPS = 4
# [7, 4]: the polynomial of four taps at 0, 1, -1, 1/2, -1/2, 2 and infinity. The factor of a row, 2/3 or 8/45, stands
# here, where it is rounded once, so that those of csrc/winograd.h are exact in binary.
VALUES = (
    (1, 0, 0, 0),
    (2 / 3, 2 / 3, 2 / 3, 2 / 3),
    (4 / 9, -4 / 9, 4 / 9, -4 / 9),
    (8 / 9, 4 / 9, 2 / 9, 1 / 9),
    (16 / 15, -8 / 15, 4 / 15, -2 / 15),
    (4 / 45, 8 / 45, 16 / 45, 32 / 45),
    (0, 0, 0, 1),
)
# Where it gains: below, the transforms and their calls take longer than products, or reading twice the weights does.
FEWEST_CHANNELS, FEWEST_RESULTS, FEWEST_PRODUCTS = 16, 128, 2**23
# Weights that are multiplied at once: oneDNN copies them in each call, and glibc gives blocks of more than 32 MiB back
# to the system, which has to clear the pages of the next one.
MOST_BYTES = 2**25


def transformed_weight(weight: Tensor, stride: int, groups: int) -> Tensor | None:
    """Return [parts, 7 * C_out / parts, C_in, taps / 4] of a weight [C_out, C_in, taps], None if it would not gain.

    A part is a convolution of 7 groups, one a point, for some of C_out.
    """
    size_out, size_in, taps = weight.shape
    plain = weight.dtype == torch.float32 and stride == groups == 1 and taps > 2
    if not plain or min(size_out, size_in) < FEWEST_CHANNELS:
        return None
    fours = F.pad(weight, (0, -taps % TAPS)).view(size_out, size_in, -1, TAPS)
    fewest = -(-len(VALUES) * fours.nbytes // (TAPS * MOST_BYTES))
    parts = next((count for count in range(fewest, size_out) if size_out % count == 0), size_out)
    fours = fours.view(parts, size_out // parts, *fours.shape[1:])
    by_tap = [tap.contiguous() for tap in fours.unbind(-1)]
    transformed = weight.new_zeros(parts, len(VALUES), *fours.shape[1:-1])
    for point, row in enumerate(VALUES):  # in a product of matrices bits would depend on the number of threads
        for value, tap in zip(row, by_tap, strict=True):
            if value:
                transformed[:, point].add_(tap, alpha=value)
    return transformed.flatten(1, 2)


def serves(x: Tensor, weight: Tensor, length: int, dilation: int) -> bool:
    """Return whether a convolution with a transformed weight gains. length: of the result."""
    return (
        x.dtype == torch.float32
        and length >= FEWEST_RESULTS
        and length * weight.numel() >= FEWEST_PRODUCTS
        and dilation <= library.MOST_DILATION
    )


def conv1d(best: str, x: Tensor, transformed: Tensor, bias: Tensor | None, length: int, dilation: int) -> Tensor:
    """Return the first `length` samples [B, C_out, length] of the convolution of x, [B, C_in, L]; then zeros follow."""
    tiles = -(-length // (TAPS * dilation)) * dilation
    fours = transformed.shape[-1]
    signal = library.winograd_signal(best, x, tiles + (fours - 1) * dilation, dilation).flatten(1, 2)
    # One four has no distance to a next one. Asked for a distance of 1, oneDNN takes its product of single taps, whose
    # sums depend on the number of threads.
    apart = dilation if fours > 1 else 2
    points, biases = len(VALUES), [None] * len(transformed) if bias is None else bias.chunk(len(transformed))
    products = (F.conv1d(signal, part, None, 1, 0, apart, points).unflatten(1, (points, -1)) for part in transformed)
    results = [
        library.winograd_results(best, product, of_part, length, dilation)
        for product, of_part in zip(products, biases, strict=True)
    ]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)
