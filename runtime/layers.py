"""The parameter holders that all networks share. Built empty: values arrive from the checkpoint by assignment."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels

M = TypeVar("M", bound=nn.Module)


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return a parameter of a shape with no values. Networks are built on the meta device, so nothing is allocated."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Weight(nn.Module):
    """One tensor named `weight`: a table, or the weight of a norm that is fused with what stands around it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = parameter(*shape)


class Stack(nn.ModuleList, Generic[M]):
    """Layers of one type, numbered in the checkpoint."""

    def __init__(self, layers: Iterable[M]) -> None:
        super().__init__(layers)

    def __iter__(self) -> Iterator[M]:
        return cast(Iterator[M], super().__iter__())


class Linear(nn.Module):
    """x @ weight.T + bias. weight: [C_out, C_in]; bias: [C_out] or None."""

    def __init__(self, kernels: Kernels, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias, both [C]."""

    def __init__(self, kernels: Kernels, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.kernels, self.eps = kernels, eps
        self.weight = parameter(size)
        self.bias = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Conv1d(nn.Module):
    """The parameters and strides of a 1-D convolution. weight: [C_out, C_in // groups, kernel]."""

    def __init__(
        self, kernels: Kernels, in_channels: int, out_channels: int, kernel_size: int,
        stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernels = kernels
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = parameter(out_channels, in_channels // groups, kernel_size)
        self.bias = parameter(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose1d(nn.Module):
    """The parameters of a transposed 1-D convolution. weight: [C_in, C_out, kernel]."""

    def __init__(
        self, kernels: Kernels, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__()
        self.kernels, self.stride, self.padding = kernels, stride, padding
        self.weight = parameter(in_channels, out_channels, kernel_size)
        self.bias = parameter(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.conv_transpose1d(x, self.weight, self.bias, self.stride, self.padding)
