"""A Decoder on several ranks: rank 0's tells the others what is called, and they call it on theirs.

All ranks sample the same ids: they have the same bits of logits, the same settings and the same generators. So a step
needs no collective but those of the network. Tensors that only rank 0 has are broadcast where they are used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from covo_npu.kernels.device import Capture, Readback
from covo_npu.runtime.decode import Decoder, Rows
from covo_npu.runtime.networks.cache import KVCache, allocate
from covo_npu.runtime.networks.qwen2 import Qwen2
from covo_npu.runtime.options import Sampling
from covo_npu.runtime.ranks import Follower, Leader


class LeadingDecoder(Decoder):
    """Rank 0's: every call is made on all ranks. The others have caches and samplers of the same kind."""

    def __init__(self, leader: Leader, llm: Qwen2, cache: KVCache, capture: Capture | None = None) -> None:
        super().__init__(llm, cache, capture)
        self._leader, self._handle = leader, leader.handle()
        with leader.command("open", self._handle, cache.num_slots, cache.max_length):
            pass
        weakref.finalize(self, leader.drop, self._handle)

    def fill(self, slot: int, embeddings: Tensor, start: int) -> Tensor:
        with self._leader.command("fill", self._handle, slot, embeddings.shape[0], start):
            return super().fill(slot, self.llm.group.broadcast(embeddings.contiguous()), start)

    def begin(
        self, slot: int, input_ids: Tensor, hidden: Tensor, length: int, seed: int, sampling: Sampling
    ) -> Readback:
        """As in Decoder, of the hidden state that the last fill() has returned: the others have theirs."""
        with self._leader.command("begin", self._handle, slot, input_ids.shape[0], length, seed, asdict(sampling)):
            input_ids = self.llm.group.broadcast(input_ids)
            return _Watched(self._leader, super().begin(slot, input_ids, hidden, length, seed, sampling))

    def place(self, slot: int, length: int, ids: Tensor) -> None:
        with self._leader.command("place", self._handle, slot, length):
            super().place(slot, length, self.llm.group.broadcast(ids.clone()))

    def step(self, num_slots: int) -> Readback:
        with self._leader.command("step", self._handle, num_slots):
            return _Watched(self._leader, super().step(num_slots))

    def move(self, source: int, target: int) -> None:
        with self._leader.command("move", self._handle, source, target):
            super().move(source, target)

    def copy(self, source: int, target: int, length: int) -> None:
        with self._leader.command("copy", self._handle, source, target, length):
            super().copy(source, target, length)

    def read(self, slot: int, length: int) -> Rows:
        with self._leader.command("read", self._handle, slot, length):
            return super().read(slot, length)

    def park(self, slot: int, length: int) -> Rows:
        with self._leader.watched():
            return super().park(slot, length)

    def restore(self, slot: int, rows: Rows) -> None:
        whole = torch.stack(rows.tensors)
        with self._leader.command("restore", self._handle, slot, whole.shape):
            whole = self.llm.group.broadcast(whole.to(self.device))
            super().restore(slot, Rows(whole.unbind()))


class _Watched(Readback):
    """Ids that come when all ranks have done their parts."""

    def __init__(self, leader: Leader, coming: Readback) -> None:
        self._leader, self._coming = leader, coming

    def tokens(self) -> list[int]:
        with self._leader.watched():
            return self._coming.tokens()


class _Mirror:
    """A follower's Decoder, called with what rank 0 tells."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        self._decoder, self._group, self._dtype = decoder, decoder.llm.group, dtype
        self._hidden: Tensor | None = None

    def _received(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._group.broadcast(torch.empty(shape, dtype=dtype or self._dtype, device=self._decoder.device))

    def fill(self, slot: int, count: int, start: int) -> None:
        self._hidden = self._decoder.fill(slot, self._received(count, self._decoder.llm.sizes.hidden_size), start)

    def begin(self, slot: int, count: int, length: int, seed: int, sampling: dict[str, Any]) -> None:
        input_ids = self._received(count, dtype=torch.int64)
        assert self._hidden is not None, "fill comes first"
        self._decoder.begin(slot, input_ids, self._hidden, length, seed, Sampling(**sampling))

    def place(self, slot: int, length: int) -> None:
        self._decoder.place(slot, length, self._received(1, dtype=torch.int64))

    def step(self, num_slots: int) -> None:
        self._decoder.step(num_slots)

    def move(self, source: int, target: int) -> None:
        self._decoder.move(source, target)

    def copy(self, source: int, target: int, length: int) -> None:
        self._decoder.copy(source, target, length)

    def read(self, slot: int, length: int) -> None:
        self._decoder.read(slot, length)

    def restore(self, slot: int, shape: list[int]) -> None:
        self._decoder.restore(slot, Rows(self._received(*shape).unbind()))


@torch.inference_mode()
def follow(
    follower: Follower, llm: Qwen2, dtype: torch.dtype, device: torch.device, capture: Capture | None = None
) -> None:
    """Do on this rank what rank 0 does, until it ends."""
    mirrors: dict[int, _Mirror] = {}
    for name, handle, arguments in follower.commands():
        if name == "open":
            num_slots, max_length = arguments
            cache = allocate(llm.sizes, num_slots, max_length, dtype, device)
            mirrors[handle] = _Mirror(Decoder(llm, cache, capture), dtype)
        elif name == "close":
            del mirrors[handle]
        else:
            call: Callable[..., None] = getattr(mirrors[handle], name)
            call(*arguments)
