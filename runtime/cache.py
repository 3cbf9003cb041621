"""KV cache: keys and values of all layers for a fixed number of slots, allocated once, with their rotary tables."""

from dataclasses import dataclass

import torch
from torch import Tensor

from covo_npu.runtime.config import LLMConfig
from covo_npu.runtime.rotary import rotary_table


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values per layer, [B, G, K_max, D]; cos, sin: [K_max, D]. How many rows are valid, its user knows."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor

    @property
    def max_length(self) -> int:
        """Rows of a slot: the longest sequence it can hold."""
        return self.cos.shape[0]

    @property
    def num_slots(self) -> int:
        """Sequences that the cache holds side by side."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def rows(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Return the rows [T * G] of (token, kv head) in a cache seen as [B * G * K_max, D].

        slots, positions: [T] int64.
        """
        num_kv_heads = self.keys[0].shape[1]
        heads = torch.arange(num_kv_heads, device=positions.device)
        first = (slots[:, None] * num_kv_heads + heads) * self.max_length
        return (first + positions[:, None]).reshape(-1)


def allocate(config: LLMConfig, num_slots: int, max_length: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Return an empty cache. Zeroed, because a masked product with a row that holds NaN would still be NaN."""
    shape = (num_slots, config.num_kv_heads, max_length, config.head_dim)

    def buffers() -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers))

    cos, sin = rotary_table(max_length, config.head_dim, config.rope_theta, dtype, device)
    return KVCache(buffers(), buffers(), cos, sin)
