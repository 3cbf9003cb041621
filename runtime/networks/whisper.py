"""Whisper encoder: log-mel of 30 s segments to encoder states at 50 Hz. Source: arXiv 2212.04356."""

from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.checkpoint.config import EncoderConfig
from covo_npu.runtime.networks.layers import Conv1d, LayerNorm, Linear, Stack, Weight


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: EncoderConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.kernels, self.num_heads, self.head_dim = kernels, config.num_heads, size // config.num_heads
        self.self_attn_layer_norm = LayerNorm(kernels, size)
        self.qkv_proj = Linear(kernels, size, 3 * size)
        self.o_proj = Linear(kernels, size, size)
        self.final_layer_norm = LayerNorm(kernels, size)
        self.fc1 = Linear(kernels, size, config.intermediate_size)
        self.fc2 = Linear(kernels, config.intermediate_size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states, [B, S, C] like x."""
        batch, length, _ = x.shape
        qkv = self.qkv_proj(self.self_attn_layer_norm(x)).view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        attended = self.kernels.attention(q, k, v, self.head_dim**-0.5)
        x = x + self.o_proj(attended.reshape(batch, length, -1))
        return x + self.fc2(self.kernels.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """Two convolutions, learned positions, the layers, a final norm."""

    def __init__(self, config: EncoderConfig, kernels: Kernels) -> None:
        super().__init__()
        size = config.hidden_size
        self.kernels = kernels
        self.conv1 = Conv1d(kernels, config.num_mels, size, 3, padding=1)
        self.conv2 = Conv1d(kernels, size, size, 3, stride=2, padding=1)
        self.embed_positions = Weight(config.max_positions, size)
        self.layers = Stack(EncoderLayer(config, kernels) for _ in range(config.num_layers))
        self.layer_norm = LayerNorm(kernels, size)

    def forward(self, mel: Tensor) -> Tensor:
        """Return encoder states [B, S, C] at 50 Hz. mel: [B, M, 2 S] at 100 Hz, in the dtype of the weights."""
        gelu = self.kernels.gelu
        x = gelu(self.conv2(gelu(self.conv1(mel)))).transpose(1, 2)  # [B, S, C]
        x = x.contiguous()  # else every sum keeps the strides of this view, and every norm copies it
        x = x + self.embed_positions.weight
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)
