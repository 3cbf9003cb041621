"""Decoding: sequences side by side, one a slot of the cache, one token each a step, eager or as a captured graph."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from covo_npu.kernels.device import Capture, Readback, Work
from covo_npu.kernels.errors import BackendError
from covo_npu.kernels.interface import DecodeLayers
from covo_npu.kernels.masked import TOLERANCES, masked_attention_error
from covo_npu.runtime.networks.cache import KVCache
from covo_npu.runtime.networks.qwen2 import Qwen2
from covo_npu.runtime.options import Sampling
from covo_npu.runtime.sampling import Sampler

log = logging.getLogger(__name__)

NOT_FINITE = -1  # is read in place of an id whose logits hold NaN or infinity
MOST_REPLAYS = 256  # captured steps that are kept: 7 bounds of 8 numbers of slots, and a few ways to sample
SMALLEST_BOUND = 512  # cache rows that a captured step attends to at least; doubled until the longest sequence fits


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one sequence outside of the cache: keys of all layers, then values, [G, n, D] of all kv heads."""

    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device) -> Rows:
        """Return the rows on a device."""
        return Rows(tuple(tensor.to(device) for tensor in self.tensors))


class Decoder:
    """The cache, the sampler and the last ids of some slots: what a step reads and writes, all at fixed places.

    logits: float32 [n, V], what the last ids were chosen from in begin() or in a step that is not captured.

    A step feeds the last ids of the first n slots and replaces them by the next ones; nothing comes from the host. A
    sequence that has ended may be fed once more: what that writes lies beyond its valid rows, or is the last row of a
    full slot, which nothing reads any more.
    """

    def __init__(self, llm: Qwen2, cache: KVCache, capture: Capture | None = None) -> None:
        device = cache.rotary.device
        self.llm, self.cache, self.device = llm, cache, device
        self.sampler = Sampler(cache.num_slots, llm.vocab_size, device)
        self.runs_ahead = device.type != "cpu"  # whether a step can be enqueued before the ids of the last one are read
        self._lengths = [0] * cache.num_slots  # rows written in each slot, the steps under way included
        self._ids = torch.zeros(cache.num_slots, dtype=torch.int64, device=device)
        self._told = torch.zeros_like(self._ids)  # the ids as they are read: NOT_FINITE among them
        # A tensor, because an NPU fills int64 under a mask on its AICPU.
        self._none = torch.tensor([NOT_FINITE], device=device)
        self._positions = torch.zeros_like(self._ids)  # where the ids will be written
        self._capture = capture
        self.logits: Tensor
        self._replays: dict[Hashable, Work] = {}  # in the order of their last use
        self._measured: set[int] = set()  # bounds whose masks have been measured

    @cached_property
    def _layers(self) -> DecodeLayers | None:
        """Made for the first step: by then all weights are there."""
        return self.llm.in_one_call(self.cache)

    def fill(self, slot: int, embeddings: Tensor, start: int) -> Tensor:
        """Put tokens into a slot from row `start` on; return the hidden state of the last one [1, C].

        embeddings: [S, C]. The rows before `start` are read.
        """
        return self.llm.fill(embeddings, self.cache, slot, start)

    def begin(
        self, slot: int, input_ids: Tensor, hidden: Tensor, length: int, seed: int, sampling: Sampling
    ) -> Readback:
        """Sample the first id of a reply; the next step feeds it.

        input_ids: [S] the prompt of the round, which the penalties look at; hidden: [1, C] of its last token; length:
        rows of the slot that are filled. Earlier rounds are not penalised.
        """
        slots = slice(slot, slot + 1)
        self.logits = self.llm.logits(hidden)
        self.sampler.begin(slot, input_ids, seed, sampling)
        self.sampler.prepare(slots)
        self._place(slot, length, self._sampled(slots, self.logits))
        return Readback(self._told[slots])

    def place(self, slot: int, length: int, ids: Tensor) -> None:
        """Let the next step feed ids [1] to a slot whose first `length` rows are in the cache."""
        self._place(slot, length, ids)

    def _place(self, slot: int, length: int, ids: Tensor) -> None:
        slots = slice(slot, slot + 1)
        self._lengths[slot] = length
        self._positions[slots].fill_(length)
        self._ids[slots].copy_(ids)

    def step(self, num_slots: int) -> Readback:
        """Feed the last ids of the first slots and sample the next: ids, or NOT_FINITE."""
        slots, max_length = slice(0, num_slots), self.cache.max_length
        lengths = [min(length + 1, max_length) for length in self._lengths[slots]]
        self.sampler.prepare(slots)
        if self._capture and not self._masks_hold(self._capture, num_slots, step_bound(max(lengths), max_length)):
            self._capture = None
        if self._capture is None:
            ids, positions = self._ids[slots], self._positions[slots]
            self.logits = self.llm.decode(ids, positions, lengths, self.cache, self._layers)
            self._advance(slots, self.logits)
        else:
            self._replay(self._capture, num_slots, step_bound(max(lengths), max_length))
        self._lengths[slots] = lengths
        return Readback(self._told[slots])

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` go on in slot `target`."""
        self.cache.move(source, target, self._lengths[source])
        self.sampler.move(source, target)
        for tensor in (self._ids, self._positions):
            tensor[target].copy_(tensor[source])
        self._lengths[target] = self._lengths[source]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first rows of slot `source` into slot `target`: of a dialogue between two questions."""
        self.cache.move(source, target, length)

    def read(self, slot: int, length: int) -> Rows:
        """Return copies of the first rows of a slot, of all heads, on the device."""
        group = self.llm.group
        return Rows(tuple(group.join(t, 0, t.shape[0] * group.size) for t in self.cache.read(slot, length)))

    def park(self, slot: int, length: int) -> Rows:
        """Return what read() returns, in host memory."""
        return self.read(slot, length).to(torch.device("cpu"))

    def restore(self, slot: int, rows: Rows) -> None:
        """Put rows that were read into the first rows of a slot."""
        self.cache.write(slot, (self.llm.group.part(tensor, 0) for tensor in rows.tensors))

    def _sampled(self, slots: slice, logits: Tensor) -> Tensor:
        """Return the next ids of some slots, and note what is read of them: no more read-backs, a few small operators.

        One value that is not finite makes the sum of a row so, and only a finite sum minus itself is 0.
        """
        ids = self.sampler.next(logits, slots)
        total = logits.sum(-1)
        self._told[slots].copy_(torch.where(total - total == 0, ids, self._none))
        return ids

    def _advance(self, slots: slice, logits: Tensor) -> None:
        self._ids[slots].copy_(self._sampled(slots, logits))
        # A step beyond the end of the cache, for a sequence that has ended there, stays inside.
        self._positions[slots].add_(1).clamp_(max=self.cache.max_length - 1)

    def _masks_hold(self, capture: Capture, num_slots: int, bound: int) -> bool:
        """Return whether a captured step attends to what an eager one does, on all ranks; measured once for each bound.

        Raises BackendError if it does not and steps must be captured.
        """
        if bound in self._measured:
            return True
        self._measured.add(bound)
        config = self.llm.layers[0]
        q = self.cache.keys[0].new_empty(num_slots, config.num_heads, config.head_dim)
        own = masked_attention_error(self.llm.kernels, q, self.cache.keys[0][:num_slots], bound)
        errors = torch.tensor([own], device=self.device)
        error = self.llm.group.join(errors, 0, self.llm.group.size).max().item()
        if error <= TOLERANCES[q.dtype]:
            return True
        says = (
            f"{self.device}: attention under a mask of {bound} rows differs by {error:.2g} from attention by lengths "
            f"(at most {TOLERANCES[q.dtype]:.2g}), so decode steps cannot be captured"
        )
        if capture.required:
            raise BackendError(f"{says}: start again with --graph off, and please report it")
        log.warning("%s: they are launched one by one; please report it", says)
        return False

    def _replay(self, capture: Capture, num_slots: int, bound: int) -> None:
        """Run a captured step; capture it first if it is the first of its kind."""
        slots = slice(0, num_slots)

        def work() -> None:
            logits = self.llm.decode_masked(self._ids[slots], self._positions[slots], bound, self.cache)
            self._advance(slots, logits)

        kind = (num_slots, bound, self.sampler.form(slots))
        if (replay := self._replays.pop(kind, None)) is None:
            # The warm-up run is a step: what it changes is put back, and the cache row it writes is written again.
            state = (self._ids, self._positions, *self.sampler.state)
            before = [tensor.clone() for tensor in state]
            replay = capture(work)
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self._replays[kind] = replay
        if len(self._replays) > MOST_REPLAYS:  # what clients choose decides how many kinds there are
            del self._replays[next(iter(self._replays))]
        replay()


def step_bound(longest: int, max_length: int) -> int:
    """Return how many rows a captured step attends to: a power of two, so that few graphs serve all lengths."""
    bound = SMALLEST_BOUND
    while bound < longest:
        bound *= 2
    return min(bound, max_length)
