"""Fixed contexts of flow matching: frames that are solved once, and reused by all that goes on from them.

Usually a block is solved together with what it goes on from, a voice's prompt and the past: all frames see all. Here
the frames of a context see each other and those before them, never what follows, so their keys and values at every
evaluation stay as they are, and a block computes its own frames alone. That is an approximation. Where a context ends,
its frames hear zeros in the convolution and no further code; what follows hears the context's last inputs and code.
Guidance that rescales looks at the frames that are solved together.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from covo_npu.runtime.networks.dit import Rows

MAX_PROMPTS = 2  # that are kept, of all voices and ways to solve: 2.2 GB each for the published prompt in bfloat16

Segment = tuple[Rows, ...]  # frames that were solved together, at each evaluation


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """All frames before those that are solved, in order. last_code: [1] int64, None: there are no frames."""

    segments: tuple[Segment, ...]
    last_code: Tensor | None

    @property
    def num_frames(self) -> int:
        """How many frames they are."""
        return sum(map(num_frames, self.segments))

    def at(self, evaluation: int) -> list[Rows]:
        """Return what they are at an evaluation, counted from 0."""
        return [segment[evaluation] for segment in self.segments]


NOTHING = Context((), None)


def num_frames(segment: Segment) -> int:
    """Return how many frames a segment has."""
    return segment[0].inputs.shape[1]


def without(segments: Sequence[Segment], start: int, end: int) -> list[Segment]:
    """Return segments without frames start .. end - 1, counted through all of them. What is left shares memory."""
    found, at = [], 0
    for segment in segments:
        last = at + num_frames(segment)
        if end <= at or last <= start or start == end:
            found.append(segment)
        else:
            left = ((at, min(start, last)), (max(end, at), last))
            found += [tuple(rows.part(a - at, b - at) for rows in segment) for a, b in left if a < b]
        at = last
    return found


class Prompts:
    """Prompts of voices as fixed contexts: the MAX_PROMPTS that were used last. Safe to be used from many threads.

    Two threads that miss the same one both compute it, and find the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: OrderedDict[Hashable, Segment] = OrderedDict()

    def get(self, key: Hashable) -> Segment | None:
        """Return a prompt, if it is kept."""
        with self._lock:
            if key in self._segments:
                self._segments.move_to_end(key)
            return self._segments.get(key)

    def add(self, key: Hashable, segment: Segment) -> None:
        """Keep a prompt; the one that was used longest ago may go."""
        with self._lock:
            self._segments[key] = segment
            while len(self._segments) > MAX_PROMPTS:
                self._segments.popitem(last=False)


def digest(*tensors: Tensor) -> bytes:
    """Return what tells these values from others. The host waits for them."""
    return hashlib.sha256(b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)).digest()
