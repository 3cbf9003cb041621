"""KV cache: keys and values of all layers for a fixed number of slots, allocated once, with their rotary tables."""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from covo_npu.runtime.config import LLMConfig
from covo_npu.runtime.rotary import rotary_table


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values per layer, [B, G, K_max, D]. How many rows are valid, its user knows.

    rotary: [2, K_max, D], cosines and sines; first_rows: [B, G] int64, the row of position 0 of each kv head in a cache
    seen as [B * G * K_max, D].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rotary: Tensor
    first_rows: Tensor

    @property
    def max_length(self) -> int:
        """Rows of a slot: the longest sequence it can hold."""
        return self.rotary.shape[1]

    @property
    def num_slots(self) -> int:
        """Sequences that the cache holds side by side."""
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def read(self, slot: int, length: int) -> tuple[Tensor, ...]:
        """Return copies of a slot's first rows, [G, length, D] each: the keys of all layers, then the values."""
        return tuple(t[slot, :, :length].clone() for t in (*self.keys, *self.values))

    def write(self, slot: int, rows: Iterable[Tensor]) -> None:
        """Write what read() returned into the first rows of a slot."""
        for t, saved in zip((*self.keys, *self.values), rows, strict=True):
            t[slot, :, : saved.shape[1]].copy_(saved)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` rows of slot `source` into slot `target`."""
        self.write(target, (t[source, :, :length] for t in (*self.keys, *self.values)))


def allocate(config: LLMConfig, num_slots: int, max_length: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Return an empty cache. Zeroed, because a masked product with a row that holds NaN would still be NaN."""
    shape = (num_slots, config.num_kv_heads, max_length, config.head_dim)

    def buffers() -> tuple[Tensor, ...]:
        return tuple(_zeros(shape, dtype, device) for _ in range(config.num_layers))

    rotary = torch.stack(rotary_table(max_length, config.head_dim, config.rope_theta, dtype, device))
    first_rows = torch.arange(num_slots * config.num_kv_heads).view(num_slots, -1) * max_length
    return KVCache(buffers(), buffers(), rotary, first_rows.to(device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. The host hands out its pages when they are first written: few dialogues fill their cache.

    At the real size this saves half a gigabyte and up to a second before the first token.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
