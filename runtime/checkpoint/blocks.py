"""The blocks of a checkpoint's files: opened, read piece by piece, verified, and shared by a crew of threads."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash

from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, CheckpointError, FileRecord, Manifest

PIECE_BYTES = 2**20  # one preadv: small enough that the checksum finds it in the cache


@dataclass(frozen=True, slots=True)
class Opened:
    """A file of the load and its descriptor."""

    record: FileRecord
    descriptor: int


@dataclass(frozen=True, slots=True)
class Block:
    """BLOCK_BYTES of a file, or what is left at its end. `file` counts the files of the load."""

    opened: Opened
    file: int
    index: int

    @property
    def offset(self) -> int:
        return self.index * BLOCK_BYTES

    @property
    def bytes(self) -> int:
        return min(BLOCK_BYTES, self.opened.record.bytes - self.offset)


def find_record(manifest: Manifest, name: str) -> FileRecord:
    record = manifest.files.get(name)
    if record is None or record.data_start is None:
        known = ", ".join(file.name for file in manifest.files.values() if file.data_start is not None)
        raise CheckpointError(f"{manifest.folder}: has no weights {name}; it holds {known}")
    return record


def open_file(stack: ExitStack, record: FileRecord) -> int:
    """Return a descriptor that the stack closes, of a file that still has the size of the manifest."""
    try:
        descriptor = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us
    except OSError as error:
        raise unreadable(record.path, error) from error
    stack.callback(os.close, descriptor)
    found = os.fstat(descriptor).st_size
    if found != record.bytes:
        raise CheckpointError(
            f"{record.path}: changed since it was opened: expected {record.bytes} bytes, found {found}"
        )
    return descriptor


def all_blocks(opened: Sequence[Opened]) -> list[Block]:
    return [Block(o, file, i) for file, o in enumerate(opened) for i in range(len(o.record.blocks))]


def read_block(block: Block, target: memoryview, check: bool) -> None:
    """Read a block into target and verify it. A target shorter than the block is filled over and over."""
    record, hasher, done = block.opened.record, xxhash.xxh3_128(), 0
    while done < block.bytes:
        at = done % len(target)
        piece = target[at : at + min(PIECE_BYTES, block.bytes - done, len(target) - at)]
        try:
            got = os.preadv(block.opened.descriptor, [piece], block.offset + done)
        except OSError as error:
            raise unreadable(record.path, error) from error
        if got == 0:
            raise CheckpointError(
                f"{record.path}: ends at byte {block.offset + done}, expected {record.bytes} bytes: it changed while "
                "it was read; copy it again"
            )
        if check:
            hasher.update(piece[:got])
        done += got
    if check:
        verify(block, hasher.hexdigest())


def verify(block: Block, found: str) -> None:
    record = block.opened.record
    if found != record.blocks[block.index]:
        raise CheckpointError(
            f"{record.path}: damaged in the block of {block.bytes} bytes at offset {block.offset}: checksum expected "
            f"{record.blocks[block.index]}, found {found}; copy the file again or convert the source again"
        )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


class Crew:
    """Threads that share the blocks of a load, first block first. The first fault stops all of them.

    worker: called once in each thread with the blocks that fall to it, which it takes one by one.
    """

    def __init__(self, worker: Callable[[Iterator[Block]], None], blocks: Sequence[Block], threads: int) -> None:
        self._worker = worker
        self._blocks = iter(blocks)
        self._left = Counter(block.file for block in blocks)  # blocks that are not done yet, by file
        self._changed = threading.Condition()  # guards what is left, who runs and what went wrong
        self._stopped = False
        self._fault: BaseException | None = None
        count = min(threads, len(blocks))
        self._threads = [threading.Thread(target=self._run, name=f"weights-{i}", daemon=True) for i in range(count)]
        self._running = count
        self._finish: Callable[[], None] = lambda: None

    def start(self, finish: Callable[[], None] | None = None) -> None:
        """Start all threads; the last one to end calls finish."""
        self._finish = finish or self._finish
        for thread in self._threads:
            thread.start()

    def wait(self, files: Sequence[int]) -> None:
        """Return when all blocks of some files are done, or the crew was stopped. Raises what else ended it."""

        def done() -> bool:
            return not any(self._left[file] for file in files)

        with self._changed:
            self._changed.wait_for(lambda: done() or not self._running)
            at_the_end = not self._running or not self._left.total()
        if at_the_end:
            self._join()
        if self._fault and not done():
            raise self._fault

    def stop(self) -> None:
        self._stopped = True
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def run(self) -> None:
        """Do all the work; whatever ends it, no thread is left."""
        self.start()
        try:
            self.wait(list(self._left))
        finally:
            self.stop()

    def _take(self) -> Iterator[Block]:
        while not self._stopped:
            with self._changed:
                block = next(self._blocks, None)
            if block is None:
                return
            yield block
            with self._changed:
                self._left[block.file] -= 1
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._worker(self._take())
        except BaseException as error:  # noqa: BLE001 - carried to the thread that asks, which raises it
            self._fault = self._fault or error
            self._stopped = True
        with self._changed:
            self._running -= 1
            last = self._running == 0
            self._changed.notify_all()
        if last:
            self._finish()
