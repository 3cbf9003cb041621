"""Qwen2 decoder on flat tokens [T, C]: fused qkv and gate_up, grouped-query attention over a static KV cache.

Source: arXiv 2407.10671; sums and norms are rounded where transformers' Qwen2 rounds them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_npu.kernels.interface import DecodeLayers, Kernels, LayerWeights
from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.checkpoint.format import HEAD, LAYERS
from covo_npu.runtime.networks.cache import KVCache
from covo_npu.runtime.networks.layers import Int8Linear, Linear, RMSNorm, Stack, Weight
from covo_npu.runtime.parallel import ALONE, Group

PREFILL_CHUNK = 2048  # tokens of one forward pass: bounds the activations of long prompts

Product = type[Linear | Int8Linear]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q [T, H, D], key cache, value cache) -> [T, H, D]


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers of one forward pass share. cos, sin: [1, T, 1, D]; rows: [T * G] of the cache to write.

    num_outputs: of how many last tokens the hidden states are wanted; in the last layer only those attend.
    """

    cos: Tensor
    sin: Tensor
    rows: Tensor
    num_outputs: int
    attend: Attend


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each behind a norm. A branch is added to the residual stream by the next norm."""

    def __init__(
        self, config: LLMConfig, kernels: Kernels, dtype: torch.dtype | None, product: Product, group: Group
    ) -> None:
        """config: the sizes of one rank of the group; product: the class of its products; the others as for Qwen2."""
        super().__init__()
        self.kernels, self.group = kernels, group
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        size, width, wide = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.input_layernorm = RMSNorm(kernels, size, config.rms_norm_eps, dtype)
        self.qkv_proj = product(kernels, size, qkv_size, dtype=dtype)
        self.o_proj = product(kernels, width, size, bias=False, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(kernels, size, config.rms_norm_eps, dtype)
        self.gate_up_proj = product(kernels, size, 2 * wide, bias=False, dtype=dtype)
        self.down_proj = product(kernels, wide, size, bias=False, dtype=dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None, step: Pass, keys: Tensor, values: Tensor, num_queries: int
    ) -> tuple[Tensor, Tensor]:
        """Return (feed-forward output, residual) of the last tokens, both [num_queries, C]: their sum goes on.

        x: [T, C]; residual: [T, C], None in the first layer. Writes the keys and values of all tokens.
        """
        x, residual = self.input_layernorm(x, residual)
        x = self.attention(x, step, keys, values, num_queries)
        x, residual = self.post_attention_layernorm(x, residual[-num_queries:])
        return self.mlp(x), residual

    def attention(self, x: Tensor, step: Pass, keys: Tensor, values: Tensor, num_queries: int) -> Tensor:
        """Return the attention output of the last tokens [num_queries, C]. x: [T, C]."""
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv_proj(x).view(1, x.shape[0], num_rotated + self.num_kv_heads, self.head_dim)
        rotated = self.kernels.rotary(qkv[:, :, :num_rotated], step.cos, step.sin)[0]  # q and k heads, [T, H + G, D]
        q, k, v = rotated[-num_queries:, : self.num_heads], rotated[:, self.num_heads :], qkv[0, :, num_rotated:]
        self.kernels.write_kv(k, v, keys, values, step.rows)
        return self.group.all_reduce(self.o_proj(step.attend(q, keys, values).reshape(num_queries, -1)))

    def mlp(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [T, C]. x: [T, C]."""
        return self.group.all_reduce(self.down_proj(self.kernels.swiglu(self.gate_up_proj(x))))

    def weights(self, keys: Tensor, values: Tensor) -> LayerWeights:
        """Return its weights beside its caches."""
        return LayerWeights(
            self.input_layernorm.weight,
            self.qkv_proj.weights,
            self.o_proj.weights,
            self.post_attention_layernorm.weight,
            self.gate_up_proj.weights,
            self.down_proj.weights,
            keys,
            values,
        )


class Qwen2(nn.Module):
    """Embeddings, decoder layers, head. Of these, each rank of a group has its heads, its part of F and of the head.

    All of them are called with the same arguments and return the same; each fills a cache of `sizes`, its own.
    """

    def __init__(
        self,
        config: LLMConfig,
        kernels: Kernels,
        dtype: torch.dtype | None = None,
        int8: Collection[str] = (),
        group: Group = ALONE,
    ) -> None:
        """config: the sizes of the whole; dtype: of the activations and, but for int8, of the weights.

        int8: which products are in 8 bits, LAYERS, HEAD. Raises ConfigError if the ranks cannot share the sizes.
        """
        super().__init__()
        self.kernels, self.scale, self.group = kernels, config.head_dim**-0.5, group
        self.vocab_size, self.sizes = config.vocab_size, config.of_rank(group.size)
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size, dtype=dtype)
        layers, head = (Int8Linear if part in int8 else Linear for part in (LAYERS, HEAD))
        self.layers = Stack(DecoderLayer(self.sizes, kernels, dtype, layers, group) for _ in range(config.num_layers))
        self.norm = RMSNorm(kernels, config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = head(kernels, config.hidden_size, config.head_rows(group.size), bias=False, dtype=dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return embeddings [T, C]. input_ids: [T] int64."""
        return F.embedding(input_ids, self.embed_tokens.weight)

    def fill(self, x: Tensor, cache: KVCache, slot: int, start: int) -> Tensor:
        """Return the hidden states of the last token [1, C], and fill `slot` of the cache from row `start` on.

        x: [S, C] embeddings of the tokens at positions start .. start + S - 1; rows before `start` are read.
        """
        last = x[-1:]
        for chunk in x.split(PREFILL_CHUNK):
            length = start + chunk.shape[0]
            positions = torch.arange(start, length, device=x.device)
            step = Pass(
                cos=cache.rotary[0, None, start:length, None],
                sin=cache.rotary[1, None, start:length, None],
                rows=(cache.first_rows[slot] + positions[:, None]).view(-1),
                num_outputs=1,
                attend=_prefill_attention(self.kernels, slot, length, self.scale),
            )
            last = self._hidden(chunk, step, cache)
            start = length
        return last

    def in_one_call(self, cache: KVCache) -> DecodeLayers | None:
        """Return what computes all layers of a decode step in one call, None where nothing does."""
        if self.group.size > 1:  # each layer waits for the other ranks
            return None
        layers = zip(self.layers, cache.keys, cache.values, strict=True)
        weights = [layer.weights(keys, values) for layer, keys, values in layers]
        return self.kernels.decode_layers(weights, self.norm.eps, self.scale)

    def decode(
        self,
        input_ids: Tensor,
        positions: Tensor,
        lengths: list[int],
        cache: KVCache,
        layers: DecodeLayers | None = None,
    ) -> Tensor:
        """Return float32 logits [B, V] of one more token a slot, and write its keys and values at `positions`.

        input_ids, positions: [B] int64 on the device, for slots 0 .. B - 1; lengths: positions + 1, on the host;
        layers: from in_one_call() with this cache.
        """

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self.kernels.decode_attention(q, keys, values, lengths, self.scale)

        return self._decode(input_ids, positions, cache, attend, lengths, layers)

    def decode_masked(self, input_ids: Tensor, positions: Tensor, bound: int, cache: KVCache) -> Tensor:
        """Return what decode() returns, from tensors alone: a step that can be captured. bound: above all positions."""
        mask = self.kernels.step_mask(torch.arange(cache.max_length, device=positions.device) <= positions[:, None])

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self.kernels.masked_decode_attention(q, keys, values, mask, bound, self.scale)

        return self._decode(input_ids, positions, cache, attend)

    def _decode(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attend: Attend,
        lengths: Sequence[int] = (),
        layers: DecodeLayers | None = None,
    ) -> Tensor:
        """Return logits as decode() does. lengths: only `layers` reads them."""
        x, (cos, sin) = self.embed(input_ids), cache.rotary.index_select(1, positions)
        if layers and (streams := layers(x, cos, sin, lengths)):
            return self.logits(self.norm(*streams)[0])
        step = Pass(
            cos=cos[None, :, None],
            sin=sin[None, :, None],
            rows=(cache.first_rows[: input_ids.shape[0]] + positions[:, None]).view(-1),
            num_outputs=input_ids.shape[0],
            attend=attend,
        )
        return self.logits(self._hidden(x, step, cache))

    def _hidden(self, x: Tensor, step: Pass, cache: KVCache) -> Tensor:
        """Return the final normed hidden states of the last tokens, [step.num_outputs, C]."""
        residual = None
        num_queries = [x.shape[0]] * (len(self.layers) - 1) + [step.num_outputs]
        for layer, keys, values, queries in zip(self.layers, cache.keys, cache.values, num_queries, strict=True):
            x, residual = layer(x, residual, step, keys, values, queries)
        normed, _ = self.norm(x, residual)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [T, V]. hidden: [T, C], from fill()."""
        return self.group.join(self.lm_head(hidden), 1, self.vocab_size).float()


def joined_layer(layer: DecoderLayer, ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a whole layer from those that each rank has of it; of a single rank, its own."""
    fused = {"qkv_proj": [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], "gate_up_proj": [1, 1]}
    whole = {}
    for name, wanted in layer.state_dict().items():
        parts = [tensors[name] for tensors in ranks]
        if len(parts) == 1 or parts[0].shape == wanted.shape:
            whole[name] = parts[0]
        elif parts[0].shape[0] == wanted.shape[0]:
            whole[name] = torch.cat(parts, dim=1)
        else:  # rows: those of q of all ranks, then those of k, then those of v
            sizes, rows = fused[name.partition(".")[0]], parts[0].shape[0]
            blocks = zip(*(part.split([rows * size // sum(sizes) for size in sizes]) for part in parts), strict=True)
            whole[name] = torch.cat([part for block in blocks for part in block])
    return whole


def _prefill_attention(
    kernels: Kernels, slot: int, length: int, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return kernels.prefill_attention(q, keys, values, slot, length, scale)

    return attend
