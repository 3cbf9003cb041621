"""Diffusion transformer of the flow matching: the velocity of the latents, given codes, prompt, speaker and time.

Sources: arXiv 2212.09748 (DiT, adaptive LayerNorm), arXiv 2210.02747 (flow matching). All that does not depend on the
latents is computed once, before the ODE: see Conditions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.config import DiTConfig
from covo_npu.runtime.layers import Conv1d, ConvTranspose1d, Linear, Stack, Weight
from covo_npu.runtime.rotary import rotary_table

NORM_EPS = 1e-6
MODULATION_PARTS = 6  # shift, scale, gate of the attention, then of the feed-forward


@dataclass(frozen=True, slots=True)
class Conditions:
    """What stays the same over all evaluations of one reply.

    inputs: [2, L, C] float32, the input projection of codes and prompt, row 0 without the codes (guidance), row 1 with
    them; cos, sin: [1, L, 1, D] in the dtype of the matrix products.
    """

    inputs: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Modulation:
    """The adaptive parts at one time, all [C] float32: per block `MODULATION_PARTS`, scales with 1 already added."""

    blocks: tuple[tuple[Tensor, ...], ...]
    shift: Tensor
    scale: Tensor


class DiTBlock(nn.Module):
    """Attention and feed-forward with adaptive LayerNorm and gated residuals."""

    def __init__(self, config: DiTConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.kernels, self.num_heads, self.head_dim = kernels, config.num_heads, size // config.num_heads
        self.modulation = Linear(kernels, size, MODULATION_PARTS * size)
        self.qkv_proj = Linear(kernels, size, 3 * size, bias=False)
        self.o_proj = Linear(kernels, size, size)
        self.fc1 = Linear(kernels, size, config.intermediate_size)
        self.fc2 = Linear(kernels, config.intermediate_size, size)

    def forward(self, x: Tensor, conditions: Conditions, modulation: tuple[Tensor, ...]) -> Tensor:
        """Return the next hidden states, [B, L, C] float32 like x. The products run in the dtype of their weights."""
        batch, length, size = x.shape
        dtype = self.qkv_proj.weight.dtype
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        heads = (batch, length, self.num_heads, self.head_dim)
        qkv = self.qkv_proj(self.kernels.layer_norm(x, scale_a, shift_a, NORM_EPS).to(dtype))
        # [3 B, L, H, D], the q, then the k, then the v: one copy here, where attention may want three
        qkv = qkv.view(batch, length, 3, *heads[2:]).permute(2, 0, 1, 3, 4).reshape(3 * batch, *heads[1:])
        q, k = self.kernels.rotary(qkv[: 2 * batch], conditions.cos, conditions.sin).view(2, *heads)
        attended = self.kernels.attention(q, k, qkv[2 * batch :], self.head_dim**-0.5).reshape(batch, length, size)
        x = torch.addcmul(x, self.o_proj(attended).to(x.dtype), gate_a)
        normed = self.kernels.layer_norm(x, scale_m, shift_m, NORM_EPS).to(dtype)
        hidden = self.kernels.linear_gelu_tanh(normed, self.fc1.weight, self.fc1.bias)
        return torch.addcmul(x, self.fc2(hidden).to(x.dtype), gate_m)


class DiT(nn.Module):
    """Codes and prompt in, velocity of the latents out."""

    def __init__(self, config: DiTConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.config, self.kernels = config, kernels
        self.product_dtype = torch.float32
        self.token_embedding = Weight(config.num_codes, config.code_dim)
        self.token_proj = Linear(kernels, config.code_dim, size)
        factor = config.upsample_factor
        self.token_upsample = ConvTranspose1d(kernels, size, size, 2 * factor, stride=factor, padding=factor // 2)
        # numbered as in a sequence whose second member is the SiLU
        self.time_mlp = nn.ModuleDict({"0": Linear(kernels, config.time_dim, size), "2": Linear(kernels, size, size)})
        self.cond_proj = Linear(kernels, size + config.speaker_dim, size)
        self.input_proj = Linear(kernels, size + 2 * config.latent_dim, size)
        kernel_size = config.conv_kernel_size
        self.conv_embed = Conv1d(kernels, size, size, kernel_size, padding=kernel_size // 2, groups=config.conv_groups)
        self.blocks = Stack(DiTBlock(config, kernels) for _ in range(config.num_layers))
        self.output_modulation = Linear(kernels, size, 2 * size)
        self.output_proj = Linear(kernels, size, config.latent_dim)

    def multiply_in(self, dtype: torch.dtype) -> None:
        """Cast the weights of the blocks' matrix products, most of an evaluation's work; all else stays float32."""
        self.product_dtype = dtype
        for block in self.blocks:
            for layer in (block.qkv_proj, block.o_proj, block.fc1, block.fc2):
                layer.to(dtype)

    def conditions(self, codes: Tensor, prompt_latents: Tensor) -> Conditions:
        """Return the conditions of one reply.

        codes: [P] int64, prompt and reply; prompt_latents: [L_prompt, Z], L_prompt <= L.
        """
        config, length = self.config, codes.shape[0] * self.config.upsample_factor
        tokens = self.token_proj(F.embedding(codes, self.token_embedding.weight))
        tokens = self.token_upsample(tokens.T[None])[0].T  # [L, C]
        prompt = F.pad(prompt_latents, (0, 0, 0, length - prompt_latents.shape[0]))  # [L, Z]
        of_tokens, of_prompt, _ = self._input_weights()
        without = self.kernels.linear(prompt, of_prompt, self.input_proj.bias)
        inputs = torch.stack((without, without + self.kernels.linear(tokens, of_tokens)))
        head_dim = config.hidden_size // config.num_heads
        cos, sin = rotary_table(length, head_dim, config.rope_theta, self.product_dtype, inputs.device)
        return Conditions(inputs, cos[None, :, None], sin[None, :, None])

    def modulation(self, time: float, speaker: Tensor) -> Modulation:
        """Return the adaptive parts at one time. speaker: [C_speaker]."""
        embedded = time_embedding(time, self.config.time_dim).to(speaker.device, speaker.dtype)
        embedded = self.time_mlp["2"](F.silu(self.time_mlp["0"](embedded)))
        c = F.silu(self.cond_proj(torch.cat((embedded, speaker)))[None])

        def parts(layer: Linear, count: int) -> list[Tensor]:
            return list(layer(c)[0].chunk(count))

        blocks = []
        for block in self.blocks:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts(block.modulation, MODULATION_PARTS)
            blocks.append((shift_a, 1 + scale_a, gate_a, shift_m, 1 + scale_m, gate_m))
        shift, scale = parts(self.output_modulation, 2)
        return Modulation(tuple(blocks), shift, 1 + scale)

    def forward(self, latents: Tensor, conditions: Conditions, modulation: Modulation) -> Tensor:
        """Return the velocities [2, L, Z], without and with the codes. latents: [L, Z]."""
        x = conditions.inputs + self.kernels.linear(latents, self._input_weights()[2])
        x = x + self.kernels.gelu(self.conv_embed(x.transpose(1, 2))).transpose(1, 2)
        for block, parts in zip(self.blocks, modulation.blocks, strict=True):
            x = block(x, conditions, parts)
        return self.output_proj(self.kernels.layer_norm(x, modulation.scale, modulation.shift, NORM_EPS))

    def _input_weights(self) -> tuple[Tensor, ...]:
        """Return the columns of the input projection for codes, prompt latents and noisy latents."""
        latent_dim = self.config.latent_dim
        return self.input_proj.weight.split((self.config.hidden_size, latent_dim, latent_dim), dim=1)


def time_embedding(time: float, size: int) -> Tensor:
    """Return the sinusoid of a time in [0, 1]: [size] float32, the cosines first. Source: arXiv 2112.10741."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = time * frequencies
    return torch.cat((angles.cos(), angles.sin()))
