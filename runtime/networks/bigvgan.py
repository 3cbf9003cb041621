"""BigVGAN vocoder: latents at 100 Hz to a waveform at 24 kHz, at once or in pieces.

Source: arXiv 2206.04658. Weight norm is folded and the log-scale parameters are exponentiated at conversion.

There is one way through the network: pieces of any size go in, the samples that they decide come out, and a Stream
keeps the last inputs of each layer for the next piece. A whole reply is a stream of large pieces. Only conv_pre and the
anti-alias filters look ahead: `samples_ready` adds up how far.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_npu.kernels.interface import SNAKE_CONTEXT, Kernels
from covo_npu.runtime.checkpoint.config import VocoderConfig
from covo_npu.runtime.networks.layers import Conv1d, ConvTranspose1d, Derived, Stack, parameter

FILTER_TAPS = 12

# Frames of a piece by device. On the CPU the activations of a piece stay in the caches; a device wants few launches,
# and the convolutions of an NPU take at most 1,000,000 samples.
PIECE_FRAMES = {"cpu": 128}
PIECE_FRAMES_OF_A_DEVICE = 1024


def piece_frames(device: torch.device) -> int:
    """Return how many frames a piece has at most."""
    return PIECE_FRAMES.get(device.type, PIECE_FRAMES_OF_A_DEVICE)


class Stream:
    """What one run remembers between its pieces: the last inputs of every layer, a constant amount.

    `ends` says that no piece follows: layers that look ahead give out what they hold back.
    """

    def __init__(self) -> None:
        self.ends = False
        self._kept: dict[Hashable, Tensor] = {}

    def extended(self, layer: Hashable, x: Tensor, reach: int, zeros: int = 0) -> Tensor:
        """Return x with the layer's kept inputs before it, or with some zeros if this is its first piece.

        Keeps the last `reach` of the result (all, if it has fewer) for the next piece.
        """
        kept = self._kept.get(layer)
        if kept is not None:
            buffer = torch.cat((kept, x), dim=-1)
        else:
            buffer = F.pad(x, (zeros, 0)) if zeros else x
        if not self.ends:  # a view would keep the whole piece
            self._kept[layer] = buffer[..., max(0, buffer.shape[-1] - reach) :].clone()
        return buffer

    def delayed(self, layer: Hashable, x: Tensor, count: int) -> Tensor:
        """Return the `count` oldest inputs that were not returned yet, and keep the rest."""
        kept = self._kept.get(layer)
        buffer = x if kept is None else torch.cat((kept, x), dim=-1)
        if not self.ends:
            self._kept[layer] = buffer[..., count:].clone()
        return buffer[..., :count]


class Filters(Derived):
    """The two anti-alias filters. taps: both as host constants, for the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = parameter(FILTER_TAPS)
        self.down = parameter(FILTER_TAPS)
        self.taps: tuple[tuple[float, ...], tuple[float, ...]] = (), ()

    def derive(self) -> None:
        self.taps = tuple(self.up.tolist()), tuple(self.down.tolist())


class Snake(nn.Module):
    """The parameters of SnakeBeta at twice the rate. alpha and inverse_beta: [C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = parameter(channels)
        self.inverse_beta = parameter(channels)


class Activation(Derived):
    """SnakeBeta of some layers, side by side in the channels; its samples come SNAKE_CONTEXT late.

    alpha, inverse_beta: [C] over all layers, joined.
    """

    window = 2 * SNAKE_CONTEXT

    def __init__(self, kernels: Kernels, snakes: Iterable[Snake]) -> None:
        super().__init__()
        self.kernels = kernels
        self._snakes = tuple(snakes)  # a tuple: as modules they belong to their layers
        self.alpha: Tensor
        self.inverse_beta: Tensor
        for name in ("alpha", "inverse_beta"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def derive(self) -> None:
        self.alpha = torch.cat([snake.alpha for snake in self._snakes])
        self.inverse_beta = torch.cat([snake.inverse_beta for snake in self._snakes])

    def step(self, x: Tensor, filters: Filters, stream: Stream) -> Tensor:
        """Return [B, C, N'], as much as can be told. x: [B, C, N], C over all layers."""
        buffer = stream.extended(self, x, self.window)
        if buffer.shape[-1] < self.window and not stream.ends:
            return x[..., :0]  # the first samples wait until the edge lies outside of the window
        starts = buffer.shape[-1] - x.shape[-1] < self.window
        return self.kernels.anti_aliased_snake(
            buffer, self.alpha, self.inverse_beta, *filters.taps, starts, stream.ends
        )

    @classmethod
    def samples_ready(cls, inputs: int) -> int:
        """Return how many samples are out after some inputs, the end not yet known."""
        return inputs - SNAKE_CONTEXT if inputs >= cls.window else 0


class StreamConv1d(Conv1d):
    """A convolution of stride 1 between zeros; causal but for `look_ahead` inputs."""

    def __init__(
        self, kernels: Kernels, in_channels: int, out_channels: int, kernel_size: int,
        dilation: int = 1, look_ahead: int = 0, products: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kernels, in_channels, out_channels, kernel_size, dilation=dilation, products=products)
        self.reach = dilation * (kernel_size - 1)
        self.look_ahead = look_ahead

    def step(self, x: Tensor, stream: Stream) -> Tensor:
        """Return [B, C_out, N'], as much as can be told. x: [B, C_in, N]."""
        buffer = stream.extended(self, x, self.reach, zeros=self.reach - self.look_ahead)
        if stream.ends and self.look_ahead:
            buffer = F.pad(buffer, (0, self.look_ahead))
        if buffer.shape[-1] <= self.reach:
            return x.new_empty(x.shape[0], self.weight.shape[0], 0)
        return self(buffer)


class Upsample(ConvTranspose1d):
    """A causal transposed convolution: `rate` outputs an input."""

    def __init__(self, kernels: Kernels, in_channels: int, out_channels: int, kernel_size: int, rate: int) -> None:
        super().__init__(kernels, in_channels, out_channels, kernel_size, stride=rate)
        self.rate = rate
        self.reach = -(-kernel_size // rate) - 1  # inputs before its own that an output depends on

    def step(self, x: Tensor, stream: Stream) -> Tensor:
        """Return [B, C_out, N * rate]. x: [B, C_in, N]."""
        if not x.shape[-1]:
            return x.new_empty(x.shape[0], self.weight.shape[1], 0)
        buffer = stream.extended(self, x, self.reach, zeros=self.reach)
        return self(buffer)[..., self.reach * self.rate : buffer.shape[-1] * self.rate]


class ResidualBlock(nn.Module):
    """The weights of one residual block, by their names in the checkpoint. How they are used: ResidualLayer."""

    def __init__(
        self, channels: int, kernel_size: int, dilations: tuple[int, ...], kernels: Kernels, dtype: torch.dtype
    ) -> None:
        super().__init__()
        convolution = partial(StreamConv1d, kernels, channels, channels, kernel_size, products=dtype)
        self.conv1 = Stack(convolution(dilation) for dilation in dilations)
        self.conv2 = Stack(convolution() for _ in dilations)
        self.acts = Stack(Snake(channels) for _ in range(2 * len(dilations)))


class ResidualLayer(nn.Module):
    """x + conv2(act2(conv1(act1(x)))): layer j of all residual blocks of a stage.

    The blocks run side by side, their signals stacked in the channels: an activation is many small operators, and one
    serves all blocks.
    """

    def __init__(self, blocks: Sequence[ResidualBlock], j: int, kernels: Kernels) -> None:
        super().__init__()
        self.act1 = Activation(kernels, (block.acts[2 * j] for block in blocks))
        self.act2 = Activation(kernels, (block.acts[2 * j + 1] for block in blocks))
        self._conv1 = tuple(block.conv1[j] for block in blocks)
        self._conv2 = tuple(block.conv2[j] for block in blocks)

    def forward(self, x: Tensor, filters: Filters, stream: Stream) -> Tensor:
        """Return [B, blocks * C, N'], as much as can be told. x: [B, blocks * C, N]."""
        y = _side_by_side(self._conv1, self.act1.step(x, filters, stream), stream)
        y = _side_by_side(self._conv2, self.act2.step(y, filters, stream), stream)
        return y.add_(stream.delayed(self, x, y.shape[-1]))


def _side_by_side(convolutions: Sequence[StreamConv1d], x: Tensor, stream: Stream) -> Tensor:
    """Return the convolution of each block's channels, in x's dtype. x: [B, blocks * C, N]."""
    parts = x.to(convolutions[0].weight.dtype).chunk(len(convolutions), dim=1)
    y = torch.cat([conv.step(part, stream) for conv, part in zip(convolutions, parts, strict=True)], dim=1)
    return y.to(x.dtype)


class Stage(nn.Module):
    """Raise the rate, halve the channels, then the mean of the residual blocks."""

    def __init__(self, config: VocoderConfig, index: int, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        channels = config.initial_channels // 2 ** (index + 1)
        self.upsample = Upsample(
            kernels, 2 * channels, channels, config.upsample_kernel_sizes[index], config.upsample_rates[index]
        )
        self.blocks = Stack(
            ResidualBlock(channels, kernel_size, dilations, kernels, dtype)
            for kernel_size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilations, strict=True)
        )
        num_layers = len(config.resblock_dilations[0])
        self.layers = Stack(ResidualLayer(list(self.blocks), j, kernels) for j in range(num_layers))

    def forward(self, x: Tensor, filters: Filters, stream: Stream) -> Tensor:
        """Return [B, C / 2, N'], as much as can be told of N * rate. x: [B, C, N]."""
        x = torch.cat([self.upsample.step(x, stream)] * len(self.blocks), dim=1)  # [B, blocks * C / 2, N * rate]
        for layer in self.layers:
            x = layer(x, filters, stream)
        return x.unflatten(1, (len(self.blocks), -1)).mean(1)

    def samples_ready(self, inputs: int) -> int:
        """Return how many samples are out after some inputs, the end not yet known."""
        samples = inputs * self.upsample.rate
        for layer in self.layers:
            samples = layer.act2.samples_ready(layer.act1.samples_ready(samples))
        return samples


class BigVGAN(nn.Module):
    """Latents in, waveform out."""

    def __init__(self, config: VocoderConfig, kernels: Kernels, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the products in the residual blocks, 97 % of all; the signal between them is float32."""
        super().__init__()
        last_channels = config.initial_channels // 2 ** len(config.upsample_rates)
        self.filters = Filters()
        self.conv_pre = StreamConv1d(kernels, config.latent_dim, config.initial_channels, 7, look_ahead=3)
        self.stages = Stack(Stage(config, index, kernels, dtype) for index in range(len(config.upsample_rates)))
        self.act_post = Snake(last_channels)
        self.last_act = Activation(kernels, [self.act_post])
        self.conv_post = StreamConv1d(kernels, last_channels, 1, 7)

    def forward(self, latents: Tensor) -> Tensor:
        """Return waveforms [B, N] in [-1, 1], N = 240 L. latents: [B, Z, L] at 100 Hz."""
        return torch.cat(list(self.pieces(latents, Stream(), ends=True)), dim=-1)

    def pieces(self, latents: Tensor, stream: Stream, ends: bool) -> Iterator[Tensor]:
        """Yield what step() returns for [B, Z, L], L >= 1, one piece of bounded size after the other."""
        pieces = latents.split(piece_frames(latents.device), dim=-1)
        for number, piece in enumerate(pieces, 1):
            yield self.step(piece, stream, ends and number == len(pieces))

    def step(self, latents: Tensor, stream: Stream, ends: bool) -> Tensor:
        """Return the samples [B, N] that one more piece decides. latents: [B, Z, L], L >= 0.

        A stream starts as Stream() and ends with the piece that says so; then all 240 samples a frame have come out.
        """
        stream.ends = ends
        x = self.conv_pre.step(latents, stream)
        for stage in self.stages:
            x = stage(x, self.filters, stream)
        return torch.tanh(self.conv_post.step(self.last_act.step(x, self.filters, stream), stream))[:, 0]

    def samples_ready(self, frames: int) -> int:
        """Return how many samples are out after some frames of a stream that goes on."""
        samples = max(0, frames - self.conv_pre.look_ahead)
        for stage in self.stages:
            samples = stage.samples_ready(samples)
        return self.last_act.samples_ready(samples)
