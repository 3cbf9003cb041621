"""Decoding: sequences side by side, one a slot of the cache, one token each a step, eager or as a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from covo_npu.runtime.cache import KVCache
from covo_npu.runtime.graph import Capture, Work
from covo_npu.runtime.qwen2 import Qwen2
from covo_npu.runtime.sampling import Sampler, Sampling

SMALLEST_BOUND = 512  # cache rows that a captured step attends to at least; doubled until the longest sequence fits


class Readback:
    """Ids on their way to the host. Made when they are enqueued; reading waits for them, not for what came after."""

    def __init__(self, ids: Tensor) -> None:
        self._event: Any = None
        if ids.device.type == "cpu":
            self._ids = ids.clone()  # the next step writes there
        else:
            self._ids = ids.to("cpu", non_blocking=True)
            self._event = getattr(torch, ids.device.type).Event()
            self._event.record()

    def tokens(self) -> list[int]:
        """Return the ids."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._ids.tolist()
        return tokens


class Decoder:
    """The cache, the sampler and the last ids of some slots: what a step reads and writes, all at fixed places.

    A step feeds the last ids of the first n slots and replaces them by the next ones; nothing comes from the host. A
    sequence that has ended may be fed once more: what that writes lies beyond its valid rows.
    """

    def __init__(self, llm: Qwen2, cache: KVCache, sampling: Sampling, capture: Capture | None = None) -> None:
        device = cache.rotary.device
        self.llm, self.cache, self.device = llm, cache, device
        self.sampler = Sampler(sampling, cache.num_slots, llm.lm_head.weight.shape[0], device)
        self.runs_ahead = device.type != "cpu"  # whether a step can be enqueued before the ids of the last one are read
        self._lengths = [0] * cache.num_slots  # rows written in each slot, the steps under way included
        self._ids = torch.zeros(cache.num_slots, dtype=torch.int64, device=device)
        self._positions = torch.zeros(
            cache.num_slots, dtype=torch.int64, device=device
        )  # where the ids will be written
        self._capture = capture
        self._replays: dict[tuple[int, int], Work] = {}

    def begin(self, slot: int, input_ids: Tensor, embeddings: Tensor, start: int, seed: int) -> Readback:
        """Prefill a slot from row `start` on and sample the first id of the reply.

        input_ids: [S] the prompt of the round, which the penalties look at; embeddings: [T, C] of its last T tokens,
        those before them are in the cache already. Earlier rounds are not penalised.
        """
        slots = slice(slot, slot + 1)
        logits = self.llm.prefill(embeddings, self.cache, slot, start)
        self.sampler.begin(slot, input_ids, seed)
        self.sampler.prepare(slots)
        self.place(slot, start + embeddings.shape[0], self.sampler.next(logits, slots))
        return Readback(self._ids[slots])

    def place(self, slot: int, length: int, ids: Tensor) -> None:
        """Let the next step feed ids [1] to a slot whose first `length` rows are in the cache."""
        slots = slice(slot, slot + 1)
        self._lengths[slot] = length
        self._positions[slots].fill_(length)
        self._ids[slots].copy_(ids)

    def step(self, num_slots: int) -> Readback:
        """Feed the last ids of the first slots and sample the next."""
        slots, max_length = slice(0, num_slots), self.cache.max_length
        lengths = [min(length + 1, max_length) for length in self._lengths[slots]]
        self._lengths[slots] = lengths
        self.sampler.prepare(slots)
        if self._capture is None:
            ids, positions = self._ids[slots], self._positions[slots]
            self._advance(slots, self.llm.decode(ids, positions, lengths, self.cache))
        else:
            self._replay(num_slots, step_bound(max(lengths), max_length))
        return Readback(self._ids[slots])

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` go on in slot `target`."""
        self.cache.move(source, target, self._lengths[source])
        self.sampler.move(source, target)
        for tensor in (self._ids, self._positions):
            tensor[target].copy_(tensor[source])
        self._lengths[target] = self._lengths[source]

    def _advance(self, slots: slice, logits: Tensor) -> None:
        self._ids[slots].copy_(self.sampler.next(logits, slots))
        # A step beyond the end of the cache, for a sequence that has ended there, stays inside.
        self._positions[slots].add_(1).clamp_(max=self.cache.max_length - 1)

    def _replay(self, num_slots: int, bound: int) -> None:
        """Run a captured step; capture it first if it is the first of its kind."""
        slots = slice(0, num_slots)

        def work() -> None:
            logits = self.llm.decode_masked(self._ids[slots], self._positions[slots], bound, self.cache)
            self._advance(slots, logits)

        if (num_slots, bound) not in self._replays:
            assert self._capture is not None
            # The warm-up run is a step: what it changes is put back, and the cache row it writes is written again.
            state = (self._ids, self._positions, *self.sampler.state)
            before = [tensor.clone() for tensor in state]
            self._replays[num_slots, bound] = self._capture(work)
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self._replays[num_slots, bound]()


def step_bound(longest: int, max_length: int) -> int:
    """Return how many rows a captured step attends to: a power of two, so that few graphs serve all lengths."""
    bound = SMALLEST_BOUND
    while bound < longest:
        bound *= 2
    return min(bound, max_length)


def generate(decoder: Decoder, first: Readback, stop_id: int, max_tokens: int) -> Iterator[int]:
    """Yield the ids of the reply in slot 0, the stop token included. first: from Decoder.begin.

    On an accelerator the next step is enqueued before the host reads the last id, so the device never waits for the
    host. The last id that is yielded is never part of the valid rows.
    """
    readback = first
    for count in range(1, max_tokens + 1):
        final = count == max_tokens
        following = decoder.step(1) if decoder.runs_ahead and not final else None
        [token] = readback.tokens()
        yield token
        if token == stop_id or final:
            return
        readback = following or decoder.step(1)


class SharedPrefixes:
    """Keys and values of what dialogues begin with, the system prompt: computed once, copied for all but the first."""

    def __init__(self, llm: Qwen2, kept: int = 4) -> None:
        self._llm, self._kept = llm, kept
        self._rows: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def fill(self, cache: KVCache, slot: int, input_ids: Tensor) -> None:
        """Fill the first rows of a slot. input_ids: [S] of the prefix. The first dialogue does what it must anyway."""
        key = tuple(input_ids.tolist())
        if key not in self._rows:
            self._llm.fill(self._llm.embed(input_ids), cache, slot, 0)
            while len(self._rows) >= self._kept:
                del self._rows[next(iter(self._rows))]
            self._rows[key] = cache.read(slot, len(key))
        else:
            cache.write(slot, self._rows[key])
