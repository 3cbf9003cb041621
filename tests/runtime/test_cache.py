"""The KV cache: zeros at first, whose memory is taken when it is written."""

from pathlib import Path

import torch

from covo_npu.runtime.checkpoint.config import LLMConfig
from covo_npu.runtime.networks.cache import allocate

CONFIG = LLMConfig(2, 64, 4, 2, 16, 64, 100, 1e-6, 1e6, 1 << 20)


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))


def test_memory_is_taken_when_rows_are_written():
    before = _anonymous()
    cache = allocate(CONFIG, 2, 400_000, torch.bfloat16, torch.device("cpu"))
    rotary = cache.rotary.nbytes * 6  # and what it takes to compute the tables
    nbytes = sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert nbytes == 2 * 2 * 2 * 2 * 400_000 * 16 * 2
    assert _anonymous() - before < rotary + 40e6 < nbytes
    taken = _anonymous()
    for t in (*cache.keys, *cache.values):
        assert not t[:, :, ::1000].any()
        t.fill_(1)
    assert _anonymous() - taken > 0.9 * nbytes


def test_rows_move_between_slots():
    cache = allocate(CONFIG, 3, 10, torch.float32, torch.device("cpu"))
    for number, t in enumerate((*cache.keys, *cache.values)):
        t[1, :, :4] = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(number))
    saved = cache.read(1, 4)
    cache.move(1, 2, 4)
    for t, rows in zip((*cache.keys, *cache.values), saved, strict=True):
        assert torch.equal(t[2, :, :4], rows)
        assert rows.any()
        assert not t[0].any()
        assert not t[2, :, 4:].any()
