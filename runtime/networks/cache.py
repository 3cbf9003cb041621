"""KV cache: keys and values of all layers for a fixed number of slots, allocated once, with their rotary tables."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.networks.rotary import rotary_table


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


class SharedPrefixes:
    """Keys and values of what dialogues begin with, the system prompt: computed once, copied for all but the first.

    The `kept` latest are held, on the device, beside those that were there from the start: were these computed anew,
    later dialogues would differ from earlier ones. Safe to be used from several threads.
    """

    def __init__(self, lasting: Mapping[tuple[int, ...], tuple[Tensor, ...]] | None = None, kept: int = 4) -> None:
        """lasting: ids and rows of the prefixes that were computed before."""
        self._lasting, self._kept, self._lock = dict(lasting or {}), kept, threading.Lock()
        self._rows: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def get(self, input_ids: Sequence[int]) -> tuple[Tensor, ...] | None:
        """Return the rows of a prefix, as KVCache.read() gives them, or None if they are not known."""
        with self._lock:
            ids = tuple(input_ids)
            return self._lasting.get(ids) or self._rows.get(ids)

    def put(self, input_ids: Sequence[int], rows: tuple[Tensor, ...]) -> None:
        """Remember the rows of a prefix; the oldest goes if there are too many."""
        with self._lock:
            while len(self._rows) >= self._kept:
                del self._rows[next(iter(self._rows))]
            self._rows[tuple(input_ids)] = rows


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
