"""The stream writer: every byte, every checksum, little memory, with and without direct I/O."""

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from made_checkpoint import block_digests

from covo_npu.convert import stream
from covo_npu.convert.stream import Bytes, Zeros, write_file
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES
from covo_npu.tools.bench.measure import PeakMemory, drop_page_cache


def pieces(seed: int, sizes: list[int]) -> list[bytes]:
    random = np.random.default_rng(seed)
    return [random.bytes(size) for size in sizes]


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [4096],
        [BLOCK_BYTES],
        [BLOCK_BYTES + 1],
        [BLOCK_BYTES - 3, 7, 2 * BLOCK_BYTES + 4093, 0, 512],
        [4 * BLOCK_BYTES],
        [1000] * 200,
    ],
    ids=str,
)
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_holds_its_streams_one_after_another(direct: bool, sizes: list[int], tmp_path: Path, monkeypatch):
    if not direct:
        opened = os.open

        def no_direct_io(path: object, flags: int, *mode: int, **keywords: object) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, flags, *mode, **keywords)

        monkeypatch.setattr(stream.os, "open", no_direct_io)
    data, told = pieces(len(sizes), sizes), []
    written = write_file(tmp_path / "file", [Bytes(piece) for piece in data], told.append)
    assert (tmp_path / "file").read_bytes() == b"".join(data)
    assert written.bytes == sum(told) == sum(sizes)
    assert written.blocks == block_digests(tmp_path / "file")


def test_direct_io_that_fails_in_the_middle_goes_on_buffered(tmp_path: Path, monkeypatch):
    write, direct = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, data, offset)

    monkeypatch.setattr(stream.os, "pwrite", pwrite)
    data = pieces(1, [BLOCK_BYTES + 4096])[0]
    write_file(tmp_path / "file", [Bytes(data)])
    assert (tmp_path / "file").read_bytes() == data
    assert len(direct) <= 1


def test_short_writes_are_continued(tmp_path: Path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(stream.os, "pwrite", lambda fd, data, offset: write(fd, data[:1_000_001], offset))
    data = pieces(2, [2 * BLOCK_BYTES + 12345])[0]
    write_file(tmp_path / "file", [Bytes(data)])
    assert (tmp_path / "file").read_bytes() == data


def test_an_existing_file_is_not_overwritten(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", [Bytes(b"new")])
    assert (tmp_path / "file").read_text() == "old"


def test_a_failed_write_is_an_error_not_a_short_file(tmp_path: Path, monkeypatch):
    calls = []

    def full(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if offset >= 2 * BLOCK_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    monkeypatch.setattr(stream.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(tmp_path / "file", [Zeros(6 * BLOCK_BYTES)])
    assert caught.value.filename == str(tmp_path / "file") and calls.count(2 * BLOCK_BYTES) == 1


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    size = 24 * BLOCK_BYTES
    with PeakMemory(interval_s=0.002) as memory:
        memory._read()
        before = memory.anonymous
        write_file(tmp_path / "file", [Zeros(size)])
    assert memory.anonymous - before < 6 * BLOCK_BYTES < size / 3


@pytest.mark.parametrize("cache", ["cold", "warm", "no direct I/O", "direct I/O that fails"])
def test_a_source_file_gives_its_bytes_from_cache_and_disk(cache: str, disk: Path, monkeypatch):
    data = pieces(3, [3 * BLOCK_BYTES + 12345])[0]
    path = disk / "file"
    path.write_bytes(data)
    if cache != "warm":
        drop_page_cache(path)
    opened, read, direct = os.open, os.preadv, []

    def no_direct_io(name: object, flags: int, *mode: int, **keywords: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(name, flags, *mode, **keywords)

    def preadv(fd: int, buffers: list, offset: int, *flags: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(offset)
            if cache == "direct I/O that fails":
                raise OSError(errno.EINVAL, "Invalid argument")
        return read(fd, buffers, offset, *flags)

    if cache == "no direct I/O":
        monkeypatch.setattr(stream.os, "open", no_direct_io)
    monkeypatch.setattr(stream.os, "preadv", preadv)
    file, buffer = stream.SourceFile(path), bytearray(BLOCK_BYTES)
    for offset, count in [(0, 1), (7, 4096), (4095, 2), (123, BLOCK_BYTES), (len(data) - 99, 99), (2 * BLOCK_BYTES, 0)]:
        view = memoryview(buffer)[:count]
        file.read_into(view, offset)
        assert view == data[offset : offset + count], (offset, count)
    assert (cache == "warm") == (len(direct) == 0) or cache == "no direct I/O"
    assert len(direct) <= 1 or cache == "cold"
    with pytest.raises(EOFError, match=f"ends at {len(data)}"):
        file.read_into(memoryview(buffer)[:100], len(data) - 99)
