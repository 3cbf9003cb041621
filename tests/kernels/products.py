"""Inputs of products of few rows, with what they give and how far from it a backend may be.

The bound is the house's: at most twice the error of plain PyTorch float32 arithmetic rounded once, plus one rounding.
For x of float32, where the sums decide, it is what float32 sums of K products may be off by: twice sqrt(K) roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from covo_npu.kernels import reference


def unaligned(values: Tensor) -> Tensor:
    """Return the values where no vector could start: one element past the beginning of their memory."""
    memory = torch.empty(values.numel() + 1, dtype=values.dtype)
    memory[1:] = values.reshape(-1)
    return memory[1:].view(values.shape)


class Product:
    """Inputs with one tiny and one huge row, a row and a column of zeros; what they give, within which bound."""

    def __init__(self, x_type: torch.dtype, weight_type: torch.dtype, M: int, N: int, K: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(M, K, generator=generator)
        x[0] *= 1e-3
        x[1 % M] *= 50
        if M > 3:
            x[3] = 0
        self.x = unaligned(x.to(x_type))
        weight = torch.randn(N, K, generator=generator)
        weight[N // 2] *= 30
        if N > 2:
            weight[2] = 0
        if weight_type == torch.int8:
            weight = weight.mul(40).round().clamp(-128, 127)
        self.weight = unaligned(weight.to(weight_type))
        self.scale = torch.rand(N, generator=generator) / 64 if weight_type == torch.int8 else None
        self.bias = unaligned(torch.randn(N, generator=generator).to(x_type))

    def exact(self, weight: Tensor | None = None, bias: bool = True) -> Tensor:
        y = self.x.double() @ (self.weight if weight is None else weight).double().T
        y = y if self.scale is None else y * self.scale.double()
        return y + self.bias.double() if bias else y

    def bound(self) -> Tensor:
        """Return the allowed error, of each row or of each element: [M, 1] or [M, N]."""
        if self.x.dtype == torch.float32:
            assert self.scale is not None
            sizes = self.x.double().abs() @ self.weight.double().abs().T * self.scale.double()
            return 2**-24 * (2 * (self.x.shape[1] ** 0.5 + 4) * sizes + 2 * self.exact().abs() + self.bias.abs())
        if self.scale is None:
            plain = reference.linear(self.x, self.weight, self.bias)
        else:
            plain = ((self.x.float() @ self.weight.float().T) * self.scale + self.bias.float()).to(self.x.dtype)
        error = (plain.double() - self.exact()).abs().amax(-1, keepdim=True)
        return 2 * error + torch.finfo(self.x.dtype).eps * self.exact().abs().amax(-1, keepdim=True)

    def judge(self, found: Tensor) -> None:
        """Assert that `found` is the product, in x's dtype, and that what is wrong in one place would be refused."""
        (M, K), N = self.x.shape, len(self.weight)
        assert found.dtype == self.x.dtype and found.shape == (M, N)
        bound = self.bound()

        def right(expected: Tensor) -> bool:
            return bool(((found.double() - expected).abs() <= bound).all())

        assert right(self.exact())
        if N > 8:
            assert not right(self.exact(bias=False))
            assert not right(self.exact(self.weight.roll(1, 0)))
        if 8 < K < 2000:  # a column at the end that is forgotten, or taken from the next row
            for column in (0, 1):
                wrong = self.weight.clone()
                wrong[:, -1] = 0 if column == 0 else self.weight.roll(-1, 0)[:, 0]
                assert not right(self.exact(wrong))
