"""The decode loop of one sequence: sample, feed, repeat, until the stop token or the limit."""

from collections.abc import Iterator

import torch
from torch import Tensor

from covo_npu.runtime.cache import KVCache
from covo_npu.runtime.qwen2 import Qwen2
from covo_npu.runtime.sampling import Sampler


def generate(
    llm: Qwen2, cache: KVCache, logits: Tensor, length: int, sampler: Sampler, stop_id: int, max_new_tokens: int
) -> Iterator[int]:
    """Yield the ids of a reply, the stop token included. logits: [1, V] after the prompt; length: valid rows of slot 0.

    On an accelerator the next step is enqueued before the host reads the last id, so the device never waits for the
    host; the one step too many that this costs at the end writes a cache row that the next prompt overwrites.
    The last id that is yielded is never part of the valid rows: rows = length + yielded - 1.
    """
    ahead = logits.device.type != "cpu"
    last_length = min(length + max_new_tokens - 1, cache.max_length)
    position = torch.full((1,), length, dtype=torch.int64, device=logits.device)

    def step(ids: Tensor) -> Tensor:
        nonlocal length
        length += 1
        result = llm.decode(ids, position, [length], cache)
        position.add_(1)
        return result

    while True:
        ids = sampler.next(logits)
        final = length == last_length
        if ahead and not final:
            logits = step(ids)
        token = int(ids)  # the one read-back of the step
        yield token
        if token == stop_id or final:
            return
        if not ahead:
            logits = step(ids)
