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

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q [T, H, D], key cache, value cache) -> [T, H, D]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of one forward pass share. cos, sin: [1, T, 1, D]; rows: [T * G] of the cache to write.

    num_outputs: of how many last tokens the hidden states are wanted; in the last layer only those attend.
    """

    cos: Tensor
    sin: Tensor
    rows: Tensor
    num_outputs: int
    attend: Attend


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

    def attention(self, x: Tensor, step: Step, keys: Tensor, values: Tensor, num_queries: int) -> Tensor:
        """Return the attention output of the last tokens [num_queries, C]; write the keys and values of all.

        x: [T, C], normed.
        """
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x).view(1, x.shape[0], num_rotated + self.num_kv_heads, self.head_dim)
        rotated = self.kernels.rotary(qkv[:, :, :num_rotated], step.cos, step.sin)[0]  # q and k heads, [T, H + G, D]
        q, k, v = rotated[-num_queries:, : self.num_heads], rotated[:, self.num_heads :], qkv[0, :, num_rotated:]
        self.kernels.write_kv(k, v, keys, values, step.rows)
        return self.o_proj(step.attend(q, keys, values).reshape(num_queries, -1))

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
        """Return float32 logits [1, V] after the last token, and do what fill() does."""
        return self._logits(self.fill(x, cache, slot, start))

    def fill(self, x: Tensor, cache: KVCache, slot: int, start: int) -> Tensor:
        """Return the hidden states of the last token [1, C], and fill `slot` of the cache from row `start` on.

        x: [S, C] embeddings of the tokens at positions start .. start + S - 1; rows before `start` are read.
        """
        last = x[-1:]
        for chunk in x.split(PREFILL_CHUNK):
            length = start + chunk.shape[0]
            positions = torch.arange(start, length, device=x.device)
            step = Step(
                cos=cache.rotary[0, None, start:length, None],
                sin=cache.rotary[1, None, start:length, None],
                rows=(cache.first_rows[slot] + positions[:, None]).view(-1),
                num_outputs=1,
                attend=_prefill_attention(self.kernels, slot, length, self.scale),
            )
            last = self._hidden(chunk, step, cache)
            start = length
        return last

    def decode(self, input_ids: Tensor, positions: Tensor, lengths: list[int], cache: KVCache) -> Tensor:
        """Return float32 logits [B, V] of one more token a slot, and write its keys and values at `positions`.

        input_ids, positions: [B] int64 on the device, for slots 0 .. B - 1; lengths: positions + 1, on the host.
        """

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self.kernels.decode_attention(q, keys, values, lengths, self.scale)

        return self._decode(input_ids, positions, cache, attend)

    def decode_masked(self, input_ids: Tensor, positions: Tensor, bound: int, cache: KVCache) -> Tensor:
        """Return what decode() returns, from tensors alone: a step that can be captured. bound: above all positions."""
        attended = torch.arange(cache.max_length, device=positions.device) <= positions[:, None]

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self.kernels.masked_decode_attention(q, keys, values, attended, bound, self.scale)

        return self._decode(input_ids, positions, cache, attend)

    def _decode(self, input_ids: Tensor, positions: Tensor, cache: KVCache, attend: Attend) -> Tensor:
        cos, sin = cache.rotary.index_select(1, positions)
        step = Step(
            cos=cos[None, :, None],
            sin=sin[None, :, None],
            rows=(cache.first_rows[: input_ids.shape[0]] + positions[:, None]).view(-1),
            num_outputs=input_ids.shape[0],
            attend=attend,
        )
        return self._logits(self._hidden(self.embed(input_ids), step, cache))

    def _hidden(self, x: Tensor, step: Step, cache: KVCache) -> Tensor:
        """Return the final normed hidden states of the last tokens, [step.num_outputs, C]."""
        residual = x
        first, *following = [layer.input_layernorm.weight for layer in self.layers] + [self.norm.weight]
        num_queries = [x.shape[0]] * (len(self.layers) - 1) + [step.num_outputs]
        layers = zip(self.layers, following, num_queries, cache.keys, cache.values, strict=True)
        x = self.kernels.rms_norm(x, first, self.eps)
        for layer, next_norm, queries, keys, values in layers:
            x, residual = layer.attention(x, step, keys, values, queries), residual[-queries:]
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
