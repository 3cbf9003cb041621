"""The parameter holders that all networks share. Built empty: values arrive from the checkpoint by assignment."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels, ProductWeights

M = TypeVar("M", bound=nn.Module)


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Return a parameter of a shape with no values. Networks are built on the meta device, so nothing is allocated."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Derived(nn.Module):
    """A module that keeps what is computed from its weights: once, after all of them are there."""

    def derive(self) -> None:
        """Compute it. `fill` calls this, nobody else."""
        raise NotImplementedError


class Weight(nn.Module):
    """One tensor named `weight`: a table."""

    def __init__(self, *shape: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = parameter(*shape, dtype=dtype)


class Stack(nn.ModuleList, Generic[M]):
    """Layers of one type, numbered in the checkpoint."""

    def __init__(self, layers: Iterable[M]) -> None:
        super().__init__(layers)

    def __iter__(self) -> Iterator[M]:
        return cast(Iterator[M], super().__iter__())

    def __getitem__(self, index: int) -> M:  # type: ignore[override]  # no slices
        return cast(M, super().__getitem__(index))


class Linear(nn.Module):
    """x @ weight.T + bias. weight: [C_out, C_in]; bias: [C_out] or None."""

    def __init__(
        self,
        kernels: Kernels,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = parameter(out_features, in_features, dtype=dtype)
        self.bias = parameter(out_features, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias)

    @property
    def weights(self) -> ProductWeights:
        """What it multiplies with."""
        return ProductWeights(self.weight, None, self.bias)


class Int8Linear(nn.Module):
    """(x @ weight.T) * scale + bias. weight: [C_out, C_in] int8; scale, bias: [C_out] as the kernels want them."""

    def __init__(
        self,
        kernels: Kernels,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """dtype: of x."""
        super().__init__()
        self.kernels = kernels
        scale_dtype, bias_dtype = kernels.int8_dtypes[dtype or torch.float32]
        self.weight = parameter(out_features, in_features, dtype=torch.int8)
        self.scale = parameter(out_features, dtype=scale_dtype)
        self.bias = parameter(out_features, dtype=bias_dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear_int8(x, self.weight, self.scale, self.bias)

    @property
    def weights(self) -> ProductWeights:
        """What it multiplies with."""
        return ProductWeights(self.weight, self.scale, self.bias)


class RMSNorm(nn.Module):
    """RMSNorm with weight [C], and the sum of a residual stream before it."""

    def __init__(self, kernels: Kernels, size: int, eps: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.kernels, self.eps = kernels, eps
        self.weight = parameter(size, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (normed, summed), both [T, C]: the norm of x + residual, and that sum, which is the next residual."""
        if residual is None:
            return self.kernels.rms_norm(x, self.weight, self.eps), x
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias, both [C]."""

    def __init__(self, kernels: Kernels, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.kernels, self.eps = kernels, eps
        self.weight = parameter(size)
        self.bias = parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Conv1d(Derived):
    """The parameters and strides of a 1-D convolution. weight: [C_out, C_in // groups, kernel].

    After loading weight and bias are as the backend wants them, which may be another dtype, and a second form of the
    weight may stand beside it: see Kernels.conv_weight and Kernels.transformed_weight.
    """

    def __init__(
        self, kernels: Kernels, in_channels: int, out_channels: int, kernel_size: int,
        stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1, products: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """products: the dtype that they may run in, None for that of the loaded weight."""
        super().__init__()
        self.kernels, self.products = kernels, products
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = parameter(out_channels, in_channels // groups, kernel_size)
        self.bias = parameter(out_channels)
        self.transformed: Tensor | None
        self.register_buffer("transformed", None, persistent=False)

    def derive(self) -> None:
        dtype = self.products or self.weight.dtype
        self.weight.data, self.bias.data = (self.kernels.conv_weight(x.data, dtype) for x in (self.weight, self.bias))
        self.transformed = self.kernels.transformed_weight(self.weight.data, self.stride, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.conv1d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.transformed
        )


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
