"""Measuring: the figures against things whose size or time is known."""

import math
import os
import time

import pytest
import torch

from covo_npu.tools.bench import measure
from covo_npu.tools.bench.measure import MeasurementError, PeakMemory, spread


def test_spread():
    assert spread([5.0, 1.0, 2.0]) == measure.Spread(2.0, 1.0, 5.0, 3)
    assert spread(iter([4])) == measure.Spread(4, 4, 4, 1)


def test_rows_are_taken_in_turn():
    order = []
    rows = {name: lambda name=name: order.append(name) or name for name in ("a", "b")}
    assert measure.interleaved(rows, 2) == {"a": ["a", "a"], "b": ["b", "b"]}
    assert order == ["a", "b", "a", "b"]


def test_peak_memory_tells_touched_memory_from_reserved():
    with PeakMemory(interval_s=0.005) as memory:
        time.sleep(0.05)
        before = memory.anonymous
        touched = bytearray(b"x") * 300_000_000
        time.sleep(0.05)
        del touched
    assert 290e6 < memory.anonymous - before < 330e6
    assert memory.resident >= memory.anonymous


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that a process of its own can import, and return its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code: str) -> str:
        (tmp_path / "measured_thing.py").write_text(code)
        return "measured_thing"

    return write


def test_own_process_reports_moments_and_memory(module):
    code = "import json, sys, time; x = bytearray(b'x') * 200_000_000; time.sleep(0.3)\n"
    code += "while time.process_time() < 0.5: pass\n"
    name = module(code + "print('noise'); print(json.dumps({'said': sys.argv[1], 'at': time.monotonic()}))")
    found = measure.in_own_process(name, "hello")
    assert 0.5 <= found.processor_s < 2
    assert found.report["said"] == "hello"
    assert 0.3 < found.report["at"] - found.started < 30
    assert 200e6 < found.peak_anonymous < 300e6
    assert found.peak_resident >= found.peak_anonymous


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit(3)", "failed with exit code 3"),
        ("print('no figures')", "expected a JSON object"),
        ("", "expected a JSON object"),
    ],
)
def test_own_process_that_fails(module, code, message):
    with pytest.raises(MeasurementError, match=message):
        measure.in_own_process(module(code))


def test_page_cache_is_dropped_and_filled(disk):
    """Told by mincore: the share of pages of a fresh map that are resident."""
    file = disk / "data"
    file.write_bytes(os.urandom(8 << 20))
    assert measure.fill_page_cache(file) > 0
    assert _resident_share(file) == 1.0
    measure.drop_page_cache(disk)
    assert _resident_share(file) < 0.1
    assert measure.disk_bandwidth(file) > 0
    assert _resident_share(file) == 1.0


def _resident_share(file) -> float:
    import ctypes
    import mmap

    page, size = mmap.PAGESIZE, file.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), size) as mapped:
        memory = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * math.ceil(size / page))()
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(memory)), ctypes.c_size_t(size), pages) == 0
        del memory
    return sum(flag & 1 for flag in pages) / len(pages)


def test_floors_are_rates():
    cpu = torch.device("cpu")
    assert 1e8 < measure.memory_copy_bandwidth(1 << 24) < 1e13
    assert 1e8 < measure.matrix_rate(torch.float32, cpu, size=256) < 1e16
    assert 1e8 < measure.read_rate([torch.ones(2048, 512, dtype=torch.bfloat16)] * 4) < 1e13


def test_the_rate_of_a_known_piece_of_work():
    assert 80 < measure.rate(lambda: time.sleep(0.05), 5, torch.device("cpu")) < 101


def test_the_peak_of_a_block_and_what_it_grew_by():
    with measure.Peak(torch.device("cpu")) as peak:
        time.sleep(0.05)
        touched = bytearray(b"x") * 200_000_000
        time.sleep(0.1)
        del touched
    assert 190e6 < peak.grown < 230e6 and peak.bytes > peak.grown
