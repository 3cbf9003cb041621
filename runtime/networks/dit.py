"""Diffusion transformer of the flow matching: the velocity of the latents, given codes, prompt, speaker and time.

Sources: arXiv 2212.09748 (DiT, adaptive LayerNorm), arXiv 2210.02747 (flow matching). All that does not depend on the
latents is computed once, before the ODE: see Conditions and TimeModulation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.checkpoint.config import DiTConfig
from covo_npu.runtime.networks.layers import Conv1d, ConvTranspose1d, Linear, Stack, Weight
from covo_npu.runtime.networks.rotary import rotary_table

NORM_EPS = 1e-6
MAX_FRAMES = 4096  # positions that the published network was made for


@dataclass(frozen=True, slots=True)
class Conditions:
    """What stays the same over all evaluations of one reply.

    inputs: [2, L, C] float32, the input projection of known latents and codes, row 0 without the codes (guidance), row
    1 with them; cos, sin: [1, K, 1, D] in the dtype of the matrix products, of the K - L frames before these, whose
    Rows an evaluation is given, too; mask: key_mask() of the frames that are attended to, None: all are.
    """

    inputs: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """What frames are to others, that come after them, at one time.

    inputs: [2, n, C] float32, which the convolution sees; layers: [4, n, H, D] of each block in the dtype of the
    products, the keys of both rows of Conditions before their rotation, then the values.
    """

    inputs: Tensor
    layers: tuple[Tensor, ...]

    def part(self, start: int, end: int) -> "Rows":
        """Return those of frames start .. end - 1, which share memory."""
        return Rows(self.inputs[:, start:end], tuple(layer[:, start:end] for layer in self.layers))


@dataclass(frozen=True, slots=True)
class Modulation:
    """What the condition does to one residual branch, [C] float32 each: x + gate * branch(norm(x) * scale + shift)."""

    shift: Tensor
    scale: Tensor  # 1 is added already
    gate: Tensor


@dataclass(frozen=True, slots=True)
class BlockModulation:
    """The adaptive parts of a block at one time."""

    attention: Modulation
    feed_forward: Modulation


@dataclass(frozen=True, slots=True)
class TimeModulation:
    """The adaptive parts of all blocks, and of the norm before the output, at one time: views of `rows`."""

    rows: Tensor
    blocks: tuple[BlockModulation, ...]
    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "TimeModulation":
        """Return the parts in rows [6 blocks + 2, C]: shift, scale and gate of each branch, then shift and scale."""
        branches = [Modulation(*parts) for parts in rows[:-2].unflatten(0, (-1, 3))]
        return cls(rows, tuple(map(BlockModulation, branches[::2], branches[1::2])), rows[-2], rows[-1])


class DiTBlock(nn.Module):
    """Attention and feed-forward with adaptive LayerNorm and gated residuals."""

    def __init__(self, config: DiTConfig, kernels: Kernels, dtype: torch.dtype) -> None:
        """dtype: of the matrix products, most of an evaluation's work."""
        super().__init__()
        size = config.hidden_size
        self.kernels, self.num_heads, self.head_dim = kernels, config.num_heads, size // config.num_heads
        self.modulation = Linear(kernels, size, 6 * size)
        self.qkv_proj = Linear(kernels, size, 3 * size, bias=False, dtype=dtype)
        self.o_proj = Linear(kernels, size, size, dtype=dtype)
        self.fc1 = Linear(kernels, size, config.intermediate_size, dtype=dtype)
        self.fc2 = Linear(kernels, config.intermediate_size, size, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        conditions: Conditions,
        modulation: BlockModulation,
        before: Sequence[Tensor] = (),
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the next hidden states, [B, L, C] float32 like x. The products run in the dtype of their weights.

        before: [2 B, n, H, D] each, see Rows, attended to as well; kept: gets that of these frames.
        """
        attention, feed_forward = modulation.attention, modulation.feed_forward
        attended = self._attention(self._normed(x, attention), conditions, before, kept)
        x = torch.addcmul(x, attended.to(x.dtype), attention.gate)
        hidden = self.kernels.linear_gelu_tanh(self._normed(x, feed_forward), self.fc1.weight, self.fc1.bias)
        return torch.addcmul(x, self.fc2(hidden).to(x.dtype), feed_forward.gate)

    def _normed(self, x: Tensor, by: Modulation) -> Tensor:
        return self.kernels.layer_norm(x, by.scale, by.shift, NORM_EPS).to(self.qkv_proj.weight.dtype)

    def _attention(
        self, x: Tensor, conditions: Conditions, before: Sequence[Tensor], kept: list[Tensor] | None
    ) -> Tensor:
        batch, length, size = x.shape
        heads = (batch, length, self.num_heads, self.head_dim)
        # [3 B, L, H, D], the q, then the k, then the v: one copy here, where attention may want three
        qkv = self.qkv_proj(x).view(batch, length, 3, *heads[2:])
        qkv = qkv.permute(2, 0, 1, 3, 4).reshape(3 * batch, *heads[1:])
        if kept is not None:
            kept.append(qkv[batch:].clone())  # the queries need not stay
        cos, sin, scale = conditions.cos, conditions.sin, self.head_dim**-0.5
        if before:
            keys_values = torch.cat((*before, qkv[batch:]), dim=1)
            q = self.kernels.rotary(qkv[:batch], cos[:, -length:], sin[:, -length:])
            k, v = self.kernels.rotary(keys_values[:batch], cos, sin), keys_values[batch:]
        else:
            q, k = self.kernels.rotary(qkv[: 2 * batch], cos, sin).view(2, *heads)
            v = qkv[2 * batch :]
        if conditions.mask is None:
            attended = self.kernels.attention(q, k, v, scale)
        else:
            attended = self.kernels.masked_attention(q, k, v, conditions.mask, scale)
        return self.o_proj(attended.reshape(batch, length, size))


class DiT(nn.Module):
    """Codes and prompt in, velocity of the latents out."""

    def __init__(self, config: DiTConfig, kernels: Kernels, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the products in the blocks and of the convolution before them; all else is float32."""
        super().__init__()
        size = config.hidden_size
        self.config, self.kernels, self.dtype = config, kernels, dtype
        self.token_embedding = Weight(config.num_codes, config.code_dim)
        self.token_proj = Linear(kernels, config.code_dim, size)
        factor = config.upsample_factor
        self.token_upsample = ConvTranspose1d(kernels, size, size, 2 * factor, stride=factor, padding=factor // 2)
        # numbered as in a sequence whose second member is the SiLU
        self.time_mlp = nn.ModuleDict({"0": Linear(kernels, config.time_dim, size), "2": Linear(kernels, size, size)})
        self.cond_proj = Linear(kernels, size + config.speaker_dim, size)
        self.input_proj = Linear(kernels, size + 2 * config.latent_dim, size)
        kernel_size = config.conv_kernel_size
        self.conv_embed = Conv1d(
            kernels, size, size, kernel_size, padding=kernel_size // 2, groups=config.conv_groups, products=dtype
        )
        self.blocks = Stack(DiTBlock(config, kernels, dtype) for _ in range(config.num_layers))
        self.output_modulation = Linear(kernels, size, 2 * size)
        self.output_proj = Linear(kernels, size, config.latent_dim)

    def conditions(
        self, codes: Tensor, known_latents: Tensor, last_code: Tensor | None = None, num_before: int = 0
    ) -> Conditions:
        """Return the conditions of one reply.

        codes: [n] int64, prompt and reply; known_latents: [K, Z], those of the first frames, K <= L. num_before: frames
        before these, whose last code, [1], these hear, too.
        """
        config = self.config
        if last_code is None:
            inputs = self._inputs(codes, known_latents)
        else:
            factor = config.upsample_factor
            known_latents = F.pad(known_latents, (0, 0, factor, 0))  # of frames that are dropped again
            inputs = self._inputs(torch.cat((last_code, codes)), known_latents)[:, factor:]
        length, head_dim = num_before + inputs.shape[1], config.hidden_size // config.num_heads
        cos, sin = rotary_table(length, head_dim, config.rope_theta, self.dtype, inputs.device)
        return Conditions(inputs, cos[None, :, None], sin[None, :, None])

    def _inputs(self, codes: Tensor, known_latents: Tensor) -> Tensor:
        """Return the inputs of Conditions, of all codes."""
        length = codes.shape[0] * self.config.upsample_factor
        tokens = self.token_proj(F.embedding(codes, self.token_embedding.weight))
        tokens = self.token_upsample(tokens.T[None])[0].T  # [L, C]
        known = F.pad(known_latents, (0, 0, 0, length - known_latents.shape[0]))  # [L, Z]
        of_tokens, of_known, _ = self._input_weights()
        without = self.kernels.linear(known, of_known, self.input_proj.bias)
        return torch.stack((without, without + self.kernels.linear(tokens, of_tokens)))

    def modulations(self, times: Sequence[float], speaker: Tensor) -> list[TimeModulation]:
        """Return the adaptive parts at each time. speaker: [C_speaker]."""
        embedded = torch.stack([time_embedding(time, self.config.time_dim) for time in times]).to(speaker.device)
        embedded = self.time_mlp["2"](F.silu(self.time_mlp["0"](embedded)))
        c = F.silu(self.cond_proj(torch.cat((embedded, speaker.expand(len(times), -1)), dim=-1)))  # [times, C]
        parts = [*(block.modulation(c) for block in self.blocks), self.output_modulation(c)]
        rows = torch.cat(parts, dim=-1).unflatten(-1, (-1, self.config.hidden_size))  # [times, 6 blocks + 2, C]
        rows[:, 1::3] += 1  # the scales
        return list(map(TimeModulation.of, rows))

    def forward(
        self,
        latents: Tensor,
        conditions: Conditions,
        modulation: TimeModulation,
        before: Sequence[Rows] = (),
        kept: list[Rows] | None = None,
    ) -> Tensor:
        """Return the velocities [2, L, Z], without and with the codes. latents: [L, Z].

        before: the Rows of the frames before these at this time, in order; kept: gets those of these frames.
        """
        inputs = conditions.inputs + self.kernels.linear(latents, self._input_weights()[2])
        layers: list[Tensor] | None = None if kept is None else []
        x = inputs + self._convolved(inputs, before)
        for number, (block, of_block) in enumerate(zip(self.blocks, modulation.blocks, strict=True)):
            x = block(x, conditions, of_block, [rows.layers[number] for rows in before], layers)
        if kept is not None and layers is not None:
            kept.append(Rows(inputs, tuple(layers)))
        return self.output_proj(self.kernels.layer_norm(x, modulation.scale, modulation.shift, NORM_EPS))

    def _convolved(self, inputs: Tensor, before: Sequence[Rows]) -> Tensor:
        """Return what the convolution adds, like inputs: [2, L, C]. It sees the last frames before these."""
        length, reach = inputs.shape[1], self.config.conv_kernel_size // 2
        if before:
            inputs = torch.cat((*(rows.inputs[:, -reach:] for rows in before), inputs), dim=1)[:, -(length + reach) :]
        return self.kernels.gelu(self.conv_embed(inputs.transpose(1, 2))).transpose(1, 2)[:, -length:]

    def _input_weights(self) -> tuple[Tensor, ...]:
        """Return the columns of the input projection for codes, known latents and noisy latents."""
        latent_dim = self.config.latent_dim
        return self.input_proj.weight.split((self.config.hidden_size, latent_dim, latent_dim), dim=1)


def time_embedding(time: float, size: int) -> Tensor:
    """Return the sinusoid of a time in [0, 1]: [size] float32, the cosines first. Source: arXiv 2112.10741."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = time * frequencies
    return torch.cat((angles.cos(), angles.sin()))
