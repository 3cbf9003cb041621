"""Token2wav the straightforward way, for comparison: what a direct PyTorch port of the published model does.

Written from the papers (arXiv 2206.04658, 2210.02747, 2212.09748) with the habits of the original program: weight norm
is recomputed in every forward, an attention bias of zeros is materialised in every layer, q, k and v are projected
apart, modulations are computed in every evaluation, activations are padded by replication and filtered by depthwise
(transposed) convolutions. float32. The weights are those of a Token2Wav, shared; only the parts that conversion folds
are unfolded again.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from covo_npu.runtime.token2wav import Token2Wav
from covo_npu.runtime.voice import Voice


class StockToken2Wav:
    """The networks of `token2wav` computed plainly, under one voice."""

    def __init__(self, token2wav: Token2Wav, voice: Voice) -> None:
        self.config, self.voice = token2wav.config, voice
        weights = {name: tensor.detach().float() for name, tensor in token2wav.state_dict().items()}
        self.dit = {name.removeprefix("dit."): t for name, t in weights.items() if name.startswith("dit.")}
        self.vocoder_weights: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if name.startswith("vocoder."):
                self._unfold(name.removeprefix("vocoder."), tensor)

    def _unfold(self, name: str, tensor: Tensor) -> None:
        """Store a vocoder tensor as the source has it: g beside v, and logarithms."""
        stored = self.vocoder_weights
        if name.endswith("alpha"):
            stored[name] = tensor.log()
        elif name.endswith("inverse_beta"):
            stored[name] = (1 / tensor - 1e-9).log()
        elif name.endswith("weight"):
            stored[f"{name}_v"] = tensor
            stored[f"{name}_g"] = tensor.norm(dim=(1, 2), keepdim=True)
        else:
            stored[name] = tensor

    # --- flow matching

    def normalised_latents(self, codes: Tensor, noise: Tensor, evaluations: int | None = None) -> Tensor:
        """Return the solution of the ODE [L, Z], or where it stands after some evaluations (an even number)."""
        config, z = self.config, noise[None]
        codes = torch.cat((self.voice.prompt_codes, codes))
        tokens = self._tokens(codes)
        known = torch.zeros_like(z)
        known[:, : self.voice.prompt_latents.shape[0]] = self.voice.prompt_latents
        times = torch.linspace(0, 1, config.flow.time_points, device=z.device)
        for start, end in list(itertools.pairwise(times))[: evaluations and evaluations // 2]:
            step = end - start
            half = z + self._guided(start, z, tokens, known) * (step / 2)
            z = z + self._guided(start + step / 2, half, tokens, known) * step
        return z[0]

    def _tokens(self, codes: Tensor) -> Tensor:
        tokens = self._linear("token_proj", F.embedding(codes, self.dit["token_embedding.weight"])[None])
        return F.conv_transpose1d(
            tokens.transpose(1, 2), self.dit["token_upsample.weight"], self.dit["token_upsample.bias"], 4, padding=2
        ).transpose(1, 2)

    def _guided(self, time: Tensor, z: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        both = torch.cat((torch.zeros_like(tokens), tokens))
        velocities = self.velocity(time.repeat(2), z.repeat(2, 1, 1), both, known.repeat(2, 1, 1))
        without, with_codes = velocities.chunk(2)
        return with_codes + (with_codes - without) * self.config.flow.cfg_alpha

    def velocity(self, time: Tensor, z: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """Return [B, L, Z]. time: [B]; z, known: [B, L, Z]; tokens: [B, L, C]."""
        config = self.config.dit
        half = config.time_dim // 2
        angles = time[:, None] * torch.exp(-math.log(10000) / half * torch.arange(half, device=z.device))
        embedded = self._linear("time_mlp.0", torch.cat((angles.cos(), angles.sin()), -1))
        embedded = self._linear("time_mlp.2", F.silu(embedded))
        speaker = self.voice.speaker_embedding.expand(z.shape[0], -1)
        c = self._linear("cond_proj", torch.cat((embedded, speaker), -1))
        x = self._linear("input_proj", torch.cat((tokens, known, z), -1))
        x = x + F.gelu(self._convolved(x))
        for index in range(config.num_layers):
            x = self.block(index, x, c)
        shift, scale = self._linear("output_modulation", F.silu(c)).chunk(2, -1)
        return self._linear("output_proj", _modulated(x, shift, scale))

    def _convolved(self, x: Tensor) -> Tensor:
        config = self.config.dit
        return F.conv1d(
            x.transpose(1, 2), self.dit["conv_embed.weight"], self.dit["conv_embed.bias"],
            padding=config.conv_kernel_size // 2, groups=config.conv_groups,
        ).transpose(1, 2)  # fmt: skip

    def block(self, index: int, x: Tensor, c: Tensor) -> Tensor:
        """Return the next hidden states [B, L, C] of one transformer block. c: [B, C]."""
        config, prefix = self.config.dit, f"blocks.{index}"
        batch, length, size = x.shape
        parts = self._linear(f"{prefix}.modulation", F.silu(c)).chunk(6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        normed = _modulated(x, shift_a, scale_a)
        projected = (normed @ weight.T for weight in self.dit[f"{prefix}.qkv_proj.weight"].chunk(3))
        q, k, v = (t.view(batch, length, config.num_heads, -1).transpose(1, 2) for t in projected)
        cos, sin = self._rotary(length, size // config.num_heads, x.device)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(q))
        attended = attended.transpose(1, 2).reshape(batch, length, size)
        x = x + gate_a[:, None] * self._linear(f"{prefix}.o_proj", attended)
        hidden = F.gelu(self._linear(f"{prefix}.fc1", _modulated(x, shift_m, scale_m)), approximate="tanh")
        return x + gate_m[:, None] * self._linear(f"{prefix}.fc2", hidden)

    def _bias(self, q: Tensor) -> Tensor:
        """Return what is added to scores, [B, H, L, L]. q: [B, H, L, D]."""
        return torch.zeros(*q.shape[:3], q.shape[2], device=q.device)

    def _rotary(self, length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frequencies = self.config.dit.rope_theta ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
        angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.dit[f"{name}.weight"], self.dit[f"{name}.bias"])

    # --- vocoder

    def vocoder(self, latents: Tensor) -> Tensor:
        """Return waveforms [B, N]. latents: [B, Z, L]."""
        config = self.config.vocoder
        x = F.conv1d(latents, self._weight("conv_pre"), self.vocoder_weights["conv_pre.bias"], padding=3)
        for index, rate in enumerate(config.upsample_rates):
            x = self.stage(index, rate, x)
        x = self._causal("conv_post", self._act("act_post", x), 1)
        return torch.tanh(x)[:, 0]

    def stage(self, index: int, rate: int, x: Tensor) -> Tensor:
        """Return [B, C / 2, N * rate]. x: [B, C, N]."""
        config, prefix = self.config.vocoder, f"stages.{index}"
        x = F.conv_transpose1d(
            x, self._weight(f"{prefix}.upsample"), self.vocoder_weights[f"{prefix}.upsample.bias"], rate
        )
        x = x[..., :-rate]
        total = torch.zeros_like(x)
        for block, dilations in enumerate(config.resblock_dilations):
            y = x
            for j, dilation in enumerate(dilations):
                inner = self._act(f"{prefix}.blocks.{block}.acts.{2 * j}", y)
                inner = self._causal(f"{prefix}.blocks.{block}.conv1.{j}", inner, dilation)
                inner = self._act(f"{prefix}.blocks.{block}.acts.{2 * j + 1}", inner)
                y = y + self._causal(f"{prefix}.blocks.{block}.conv2.{j}", inner, 1)
            total = total + y
        return total / len(config.resblock_dilations)

    def _weight(self, name: str) -> Tensor:
        v, g = self.vocoder_weights[f"{name}.weight_v"], self.vocoder_weights[f"{name}.weight_g"]
        return v * (g / v.norm(dim=(1, 2), keepdim=True))

    def _causal(self, name: str, x: Tensor, dilation: int) -> Tensor:
        weight = self._weight(name)
        x = F.pad(x, (dilation * (weight.shape[-1] - 1), 0))
        return F.conv1d(x, weight, self.vocoder_weights[f"{name}.bias"], dilation=dilation)

    def _act(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        up, down = (self.vocoder_weights[f"filters.{way}"].expand(channels, 1, -1) for way in ("up", "down"))
        alpha, beta = (self.vocoder_weights[f"{name}.{part}"].exp()[:, None] for part in ("alpha", "inverse_beta"))
        x = 2 * F.conv_transpose1d(F.pad(x, (5, 5), "replicate"), up, stride=2, groups=channels)[..., 15:-15]
        x = x + torch.sin(x * alpha) ** 2 / (beta + 1e-9)
        return F.conv1d(F.pad(x, (5, 6), "replicate"), down, stride=2, groups=channels)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
