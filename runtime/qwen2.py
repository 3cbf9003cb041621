"""Qwen2 decoder on flat tokens [T, C]: fused qkv and gate_up, grouped-query attention over a static KV cache.

Source: arXiv 2407.10671; the order of roundings is that of transformers' Qwen2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_npu.kernels.interface import Kernels
from covo_npu.runtime.cache import KVCache
from covo_npu.runtime.config import LLMConfig
from covo_npu.runtime.layers import Linear, Stack, Weight

PREFILL_CHUNK = 2048  # tokens of one forward pass: bounds the activations of long prompts


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share. cos, sin: [1, T, 1, D]; rows: [T * G] of the cache to write."""

    cos: Tensor
    sin: Tensor
    rows: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # (q [T, H, D], key cache, value cache) -> [T, H, D]


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, without their norms' residual sums, which Qwen2 carries along."""

    def __init__(self, config: LLMConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.input_layernorm = Weight(config.hidden_size)
        self.qkv_proj = Linear(kernels, config.hidden_size, qkv_size)
        self.o_proj = Linear(kernels, config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.gate_up_proj = Linear(kernels, config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(kernels, config.intermediate_size, config.hidden_size, bias=False)

    def attention(self, x: Tensor, step: Step, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output [T, C] and write this layer's new keys and values. x: [T, C], normed."""
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x).view(1, x.shape[0], num_rotated + self.num_kv_heads, self.head_dim)
        rotated = self.kernels.rotary(qkv[:, :, :num_rotated], step.cos, step.sin)[0]  # q and k heads, [T, H + G, D]
        q, k, v = rotated[:, : self.num_heads], rotated[:, self.num_heads :], qkv[0, :, num_rotated:]
        self.kernels.write_kv(k, v, keys, values, step.rows)
        return self.o_proj(step.attend(q, keys, values).reshape(x.shape[0], -1))

    def mlp(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [T, C]. x: [T, C], normed."""
        return self.down_proj(self.kernels.swiglu(self.gate_up_proj(x)))


class Qwen2(nn.Module):
    """Embeddings, decoder layers, head."""

    def __init__(self, config: LLMConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels, self.eps, self.scale = kernels, config.rms_norm_eps, config.head_dim**-0.5
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = Stack(DecoderLayer(config, kernels) for _ in range(config.num_layers))
        self.norm = Weight(config.hidden_size)
        self.lm_head = Linear(kernels, config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return embeddings [T, C]. input_ids: [T] int64."""
        return F.embedding(input_ids, self.embed_tokens.weight)

    def prefill(self, x: Tensor, cache: KVCache, slot: int, start: int) -> Tensor:
        """Return float32 logits [1, V] after the last token, and fill `slot` of the cache from row `start` on.

        x: [S, C] embeddings of the tokens at positions start .. start + S - 1; rows before `start` are read.
        """
        last = x[-1:]
        for chunk in x.split(PREFILL_CHUNK):
            length = start + chunk.shape[0]
            positions = torch.arange(start, length, device=x.device)
            step = Step(
                cos=cache.cos[None, start:length, None],
                sin=cache.sin[None, start:length, None],
                rows=cache.rows(torch.full_like(positions, slot), positions),
                attend=_prefill_attention(self.kernels, slot, length, self.scale),
            )
            last = self._hidden(chunk, step, cache)[-1:]
            start = length
        return self._logits(last)

    def decode(self, input_ids: Tensor, positions: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
        """Return float32 logits [B, V] of one more token a slot, and write its keys and values at `positions`.

        input_ids, positions: [B] int64 on the device, for slots 0 .. B - 1; lengths: positions + 1, on the host.
        """
        slots = torch.arange(input_ids.shape[0], device=input_ids.device)

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self.kernels.decode_attention(q, keys, values, lengths, self.scale)

        step = Step(
            cos=cache.cos[positions][None, :, None],
            sin=cache.sin[positions][None, :, None],
            rows=cache.rows(slots, positions),
            attend=attend,
        )
        return self._logits(self._hidden(self.embed(input_ids), step, cache))

    def _hidden(self, x: Tensor, step: Step, cache: KVCache) -> Tensor:
        """Return the final normed hidden states [T, C]."""
        residual = x
        first, *following = [layer.input_layernorm.weight for layer in self.layers] + [self.norm.weight]
        x = self.kernels.rms_norm(x, first, self.eps)
        for layer, next_norm, keys, values in zip(self.layers, following, cache.keys, cache.values, strict=True):
            x = layer.attention(x, step, keys, values)
            x, residual = self.kernels.add_rms_norm(x, residual, layer.post_attention_layernorm.weight, self.eps)
            x = layer.mlp(x)
            x, residual = self.kernels.add_rms_norm(x, residual, next_norm, self.eps)
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()


def _prefill_attention(
    kernels: Kernels, slot: int, length: int, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return kernels.prefill_attention(q, keys, values, slot, length, scale)

    return attend
