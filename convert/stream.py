"""Streams of bytes from files into a file: past the page cache, with a checksum for each block as it passes.

One thread fills a block of 16 MiB while another hashes and writes the one before; three blocks is all the memory.
"""

import contextlib
import errno
import fcntl
import io
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

import xxhash

from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, WrittenFile

RING = 3  # one block being filled, one being written, one between them
DIRECT_UNIT = 4096  # what direct I/O wants of offset, length and address; the address of a mapping has it
MODE = 0o644


class ByteStream(Protocol):
    """Bytes to come: `bytes` in all, handed out in order."""

    @property
    def bytes(self) -> int:
        """How many there are."""

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes."""


class Bytes:
    """A stream of bytes that lie in memory."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self._data.nbytes

    def read_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes."""
        view[:] = self._data[self._at : self._at + view.nbytes]
        self._at += view.nbytes


class Zeros:
    """A stream of zeros."""

    def __init__(self, count: int) -> None:
        self._count = count

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self._count

    def read_into(self, view: memoryview) -> None:
        """Fill the view with zeros."""
        view[:] = bytes(view.nbytes)


class SourceFile:
    """A file to read from: what lies in the page cache is taken from there, the rest from the disk past the cache.

    A checkpoint is larger than the cache: copies through it cost most of the time and push out what others need.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._direct: io.FileIO | None = None
        with contextlib.suppress(OSError):  # this file system has no direct I/O
            self._direct = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
        self._bounce = mmap.mmap(-1, BLOCK_BYTES)  # direct I/O wants its own alignment of offset, length and address

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view from an offset. Raises EOFError if the file ends before."""
        done = 0
        while done < view.nbytes:
            rest, place = view[done:], offset + done
            count = self._read_cached(rest, place) or self._read_disk(rest, place)
            if count == 0:
                raise EOFError(f"ends at {place}")
            done += count

    def _read_cached(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._file.fileno(), [view], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            return 0

    def _read_disk(self, view: memoryview, offset: int) -> int:
        ahead = offset % DIRECT_UNIT
        length = min(BLOCK_BYTES, ahead + view.nbytes + -(ahead + view.nbytes) % DIRECT_UNIT)
        if self._direct is not None:
            try:
                found = os.preadv(self._direct.fileno(), [memoryview(self._bounce)[:length]], offset - ahead)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = None
            else:
                count = max(0, min(found - ahead, view.nbytes))
                view[:count] = memoryview(self._bounce)[ahead : ahead + count]
                return count
        return os.preadv(self._file.fileno(), [view], offset)


def write_file(
    path: Path, streams: Iterable[ByteStream], advance: Callable[[int], object] = lambda count: None
) -> WrittenFile:
    """Return the record of a new file that holds the streams one after another.

    The file is on the disk when this returns. advance is told of bytes as they are written. Raises OSError.
    """
    with _Target(path) as target, ThreadPoolExecutor(1) as writer:
        buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(RING)]
        busy: list[Future[str]] = []
        digests: list[str] = []
        filled = 0

        def flush() -> None:
            block = memoryview(buffers[len(busy) % RING])[:filled]
            busy.append(writer.submit(_flush, target, block, len(busy) * BLOCK_BYTES, advance))
            if len(busy) >= RING:  # the next block goes where this one lies
                digests.append(busy[len(busy) - RING].result())

        for stream in streams:
            left = stream.bytes
            while left:
                count = min(left, BLOCK_BYTES - filled)
                stream.read_into(memoryview(buffers[len(busy) % RING])[filled : filled + count])
                filled, left = filled + count, left - count
                if filled == BLOCK_BYTES:
                    flush()
                    filled = 0
        size = len(busy) * BLOCK_BYTES + filled
        if filled:
            flush()
        digests += [future.result() for future in busy[len(digests) :]]
        target.sync()
    return WrittenFile(size, digests)


def let_others_read(path: Path, mode: int = MODE) -> None:
    """Give a new file or folder its mode, whatever the umask; file systems without modes keep theirs."""
    with contextlib.suppress(PermissionError, NotImplementedError):
        path.chmod(mode)


def _flush(target: "_Target", block: memoryview, offset: int, advance: Callable[[int], object]) -> str:
    digest = xxhash.xxh3_128_hexdigest(block)
    target.write(block, offset)
    advance(block.nbytes)
    return digest


class _Target:
    """A new file, written past the page cache where the file system can (a checkpoint is larger than the cache)."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._path = path
        try:
            self._fd = os.open(path, flags | os.O_DIRECT, MODE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system has no direct I/O
                raise
            path.unlink(missing_ok=True)
            self._fd = os.open(path, flags, MODE)
        let_others_read(path)

    def write(self, block: memoryview, offset: int) -> None:
        """Write a block, wholly. The block lies at the start of a page, the offset is a multiple of BLOCK_BYTES."""
        done = 0
        while done < block.nbytes:
            if (block.nbytes - done) % DIRECT_UNIT or done % DIRECT_UNIT:
                self._buffered()
            try:
                done += os.pwrite(self._fd, block[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_DIRECT:
                    raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from error
                self._buffered()

    def sync(self) -> None:
        """Put everything on the disk."""
        os.fsync(self._fd)

    def _buffered(self) -> None:
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)

    def __enter__(self) -> "_Target":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
