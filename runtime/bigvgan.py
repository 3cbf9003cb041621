"""BigVGAN vocoder: latents at 100 Hz to a waveform at 24 kHz. Causal but for its first layer and anti-alias filters.

Source: arXiv 2206.04658. Weight norm is folded and the log-scale parameters are exponentiated at conversion.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.config import VocoderConfig
from covo_npu.runtime.layers import Conv1d, ConvTranspose1d, Stack, parameter

FILTER_TAPS = 12


class Filters(nn.Module):
    """The two anti-alias filters, as tensors of the checkpoint and as host constants for the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = parameter(FILTER_TAPS)
        self.down = parameter(FILTER_TAPS)
        self._taps: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def taps(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return (up, down) on the host. Read back from the device once."""
        if self._taps is None:
            self._taps = tuple(self.up.tolist()), tuple(self.down.tolist())
        return self._taps


class Snake(nn.Module):
    """SnakeBeta at twice the rate. alpha and inverse_beta: [C]."""

    def __init__(self, channels: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.alpha = parameter(channels)
        self.inverse_beta = parameter(channels)

    def forward(self, x: Tensor, filters: Filters) -> Tensor:
        return self.kernels.anti_aliased_snake(x, self.alpha, self.inverse_beta, *filters.taps())


class CausalConv1d(Conv1d):
    """A convolution that sees only the past: kernel - 1 zeros, times the dilation, on the left."""

    def __init__(
        self, kernels: Kernels, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1
    ) -> None:
        super().__init__(kernels, in_channels, out_channels, kernel_size, dilation=dilation)
        self.left = dilation * (kernel_size - 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.left, 0)))


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each after an activation, with a residual sum a pair."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...], kernels: Kernels) -> None:
        super().__init__()
        self.conv1 = Stack(CausalConv1d(kernels, channels, channels, kernel_size, d) for d in dilations)
        self.conv2 = Stack(CausalConv1d(kernels, channels, channels, kernel_size) for _ in dilations)
        self.acts = Stack(Snake(channels, kernels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor, filters: Filters) -> Tensor:
        """Return [B, C, N] like x."""
        for conv1, conv2, act1, act2 in zip(self.conv1, self.conv2, self.acts[::2], self.acts[1::2], strict=True):
            x = x + conv2(act2(conv1(act1(x, filters)), filters))
        return x


class Stage(nn.Module):
    """Raise the rate, halve the channels, then the mean of the residual blocks."""

    def __init__(self, config: VocoderConfig, index: int, kernels: Kernels) -> None:
        super().__init__()
        channels = config.initial_channels // 2 ** (index + 1)
        self.rate = config.upsample_rates[index]
        self.upsample = ConvTranspose1d(
            kernels, 2 * channels, channels, config.upsample_kernel_sizes[index], stride=self.rate
        )
        self.blocks = Stack(
            ResidualBlock(channels, kernel_size, dilations, kernels)
            for kernel_size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilations, strict=True)
        )

    def forward(self, x: Tensor, filters: Filters) -> Tensor:
        """Return [B, C / 2, N * rate]. x: [B, C, N]."""
        x = self.upsample(x)[..., : x.shape[-1] * self.rate]  # the tail that would belong to the next sample goes
        return torch.stack([block(x, filters) for block in self.blocks]).mean(0)


class BigVGAN(nn.Module):
    """Latents in, waveform out."""

    def __init__(self, config: VocoderConfig, kernels: Kernels) -> None:
        super().__init__()
        last_channels = config.initial_channels // 2 ** len(config.upsample_rates)
        self.filters = Filters()
        self.conv_pre = Conv1d(kernels, config.latent_dim, config.initial_channels, 7, padding=3)
        self.stages = Stack(Stage(config, index, kernels) for index in range(len(config.upsample_rates)))
        self.act_post = Snake(last_channels, kernels)
        self.conv_post = CausalConv1d(kernels, last_channels, 1, 7)

    def forward(self, latents: Tensor, on_stage: Callable[[int, int], None] | None = None) -> Tensor:
        """Return waveforms [B, N] in [-1, 1], N = 240 L. latents: [B, Z, L] at 100 Hz; on_stage gets (done, total)."""
        x = self.conv_pre(latents)
        for done, stage in enumerate(self.stages, 1):
            x = stage(x, self.filters)
            if on_stage:
                on_stage(done, len(self.stages))
        return torch.tanh(self.conv_post(self.act_post(x, self.filters)))[:, 0]
