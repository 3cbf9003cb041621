"""Bytes of a checkpoint to tensors: mapped views on the CPU, huge pages on request, a ring of pinned slabs elsewhere.

All ways share one engine: threads take the blocks of all files in the order of use, read each, and compare its xxh3-128
with the manifest as the bytes pass. `preadv` works on every kernel and file system and reports a broken disk or a cut
file as an error, where a page fault would kill the process. A mapped block is first populated (Linux 5.14), which
reports the same faults, copies nothing, and spares the networks their page faults: with preadv in its place the first
token of the full-size model comes 2 s later on 2 cores. From a cold disk populate, preadv and readahead(2) are equally
fast. (Python's own mmap.madvise holds the interpreter's lock while the disk reads.)

| mode   | tensors                              | reading                | damage is known                      |
|--------|--------------------------------------|------------------------|--------------------------------------|
| mmap   | zero-copy views of the page cache    | in the background      | before `Weights.wait()` returns      |
| eager  | views of anonymous huge-page memory  | before the load returns| before the load returns              |
| staged | views of one device tensor a file    | before the load returns| before its block goes to the device  |
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Literal

import torch
import xxhash
from torch import Tensor

from covo_npu.runtime.checkpoint import BLOCK_BYTES, CheckpointError, FileRecord, Manifest

Mode = Literal["mmap", "eager", "staged"]

PIECE_BYTES = 2**20  # one preadv: small enough that the checksum finds it in the cache
MADV_POPULATE_READ = 22  # not in Python's mmap
MAX_THREADS = 16
MAX_SLABS = 32  # pinned: 512 MiB at most
SLABS_IN_FLIGHT = 8  # beyond one a thread: their copies are under way
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a load went. `seconds` ends when the tensors can be used; a mapped load goes on reading behind it."""

    mode: Mode
    device: str
    bytes: int
    seconds: float
    threads: int
    checked: bool


class Weights:
    """The tensors of a load, by name, as stored. A context manager: leaving it stops what still reads.

    Guarantee: once `wait()` has returned, every byte of every loaded file has been compared with the manifest. Whoever
    calls it before the first result leaves the program knows that nothing damaged has spoken. With check=False `wait()`
    only waits. The files of a mapped load must not be written while they are in use; replace them by renaming.
    """

    def __init__(self, tensors: dict[str, Tensor], report: LoadReport, crew: _Crew | None = None) -> None:
        self.tensors = tensors
        self.report = report
        self._crew = crew

    def raise_if_damaged(self) -> None:
        """Raise what the background reader has met so far: CheckpointError for damage or a file that cannot be read."""
        if self._crew:
            self._crew.raise_fault()

    def wait(self) -> None:
        """Return when all bytes have been read and verified. Raises like raise_if_damaged()."""
        if self._crew:
            self._crew.join()

    def close(self) -> None:
        """Stop the background reader, verified or not. The tensors stay valid as long as they are referenced."""
        if self._crew:
            self._crew.stop()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_tensors(
    manifest: Manifest,
    files: Iterable[str],
    device: torch.device,
    *,
    mode: Mode = "mmap",
    check: bool = True,
    pinned: bool = True,
) -> Weights:
    """Return all tensors of the named safetensors files on the device, in the dtypes of the files.

    files: in the order of use. mode: on the CPU mmap or eager ("staged", the way to a device, is there for tests); any
    other device is always staged. check: compare each block with the manifest. pinned: stage in page-locked memory.
    Raises CheckpointError if a file is damaged or cannot be read, or if memory runs out; no thread or memory is left.
    """
    begin = time.monotonic()
    if device.type != "cpu":
        mode = "staged"
    records = [_record(manifest, name) for name in files]
    threads = min(MAX_THREADS, max(2, len(os.sched_getaffinity(0))))
    with ExitStack() as stack:
        opened = [_Opened(record, _open(stack, record)) for record in records]
        load = {"mmap": _load_mapped, "eager": _load_eager, "staged": _load_staged}[mode]
        flats, crew = load(opened, device, threads, check, pinned)
        if crew:
            crew.start(stack.pop_all().close)
    tensors = {
        name: flat[t.offset : t.offset + t.bytes].view(DTYPES[t.dtype]).view(t.shape)
        for record, flat in zip(records, flats)
        for name, t in record.tensors.items()
    }
    size = sum(record.bytes for record in records)
    return Weights(tensors, LoadReport(mode, str(device), size, time.monotonic() - begin, threads, check), crew)


# --- files and blocks


@dataclass(frozen=True, slots=True)
class _Opened:
    record: FileRecord
    descriptor: int


@dataclass(frozen=True, slots=True)
class _Block:
    """BLOCK_BYTES of a file, or what is left at its end. `file` counts the files of the load."""

    opened: _Opened
    file: int
    index: int

    @property
    def offset(self) -> int:
        return self.index * BLOCK_BYTES

    @property
    def bytes(self) -> int:
        return min(BLOCK_BYTES, self.opened.record.bytes - self.offset)


def _record(manifest: Manifest, name: str) -> FileRecord:
    record = manifest.files.get(name)
    if record is None or record.data_start is None:
        known = ", ".join(file.name for file in manifest.files.values() if file.data_start is not None)
        raise CheckpointError(f"{manifest.folder}: has no weights {name}; it holds {known}")
    return record


def _open(stack: ExitStack, record: FileRecord) -> int:
    """Return a descriptor that the stack closes, of a file that still has the size of the manifest."""
    try:
        descriptor = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold us
    except OSError as error:
        raise _unreadable(record.path, error) from error
    stack.callback(os.close, descriptor)
    found = os.fstat(descriptor).st_size
    if found != record.bytes:
        raise CheckpointError(
            f"{record.path}: changed since it was opened: expected {record.bytes} bytes, found {found}"
        )
    return descriptor


def _blocks(opened: Sequence[_Opened]) -> list[_Block]:
    return [_Block(o, file, i) for file, o in enumerate(opened) for i in range(len(o.record.blocks))]


def _read(block: _Block, target: memoryview, check: bool) -> None:
    """Read a block into target and verify it. A target shorter than the block is filled over and over."""
    record, hasher, done = block.opened.record, xxhash.xxh3_128(), 0
    while done < block.bytes:
        at = done % len(target)
        piece = target[at : at + min(PIECE_BYTES, block.bytes - done, len(target) - at)]
        try:
            got = os.preadv(block.opened.descriptor, [piece], block.offset + done)
        except OSError as error:
            raise _unreadable(record.path, error) from error
        if got == 0:
            raise CheckpointError(
                f"{record.path}: ends at byte {block.offset + done}, expected {record.bytes} bytes: it changed while "
                "it was read; copy it again"
            )
        if check:
            hasher.update(piece[:got])
        done += got
    if check:
        _verify(block, hasher.hexdigest())


def _verify(block: _Block, found: str) -> None:
    record = block.opened.record
    if found != record.blocks[block.index]:
        raise CheckpointError(
            f"{record.path}: damaged in the block of {block.bytes} bytes at offset {block.offset}: checksum expected "
            f"{record.blocks[block.index]}, found {found}; copy the file again or convert the source again"
        )


def _populated(flat: Tensor, block: _Block) -> bool:
    """Bring a block of a mapped file into memory and into the page table; False if that cannot be done here."""
    address = ctypes.c_void_p(flat.data_ptr() + block.offset)
    return bool(_libc.madvise(address, ctypes.c_size_t(block.bytes), MADV_POPULATE_READ) == 0)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


class _Crew:
    """Threads that share the blocks of a load, first block first. The first fault stops all of them.

    worker: called once in each thread with the blocks that fall to it, which it takes one by one.
    """

    def __init__(self, worker: Callable[[Iterator[_Block]], None], blocks: Sequence[_Block], threads: int) -> None:
        self._worker = worker
        self._blocks = iter(blocks)
        self._lock = threading.Lock()
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

    def raise_fault(self) -> None:
        if self._fault:
            raise self._fault

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        self.raise_fault()

    def stop(self) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()

    def run(self) -> None:
        """Do all the work; whatever ends it, no thread is left."""
        self.start()
        try:
            self.join()
        finally:
            self.stop()

    def _take(self) -> Iterator[_Block]:
        while not self._stopped:
            with self._lock:
                block = next(self._blocks, None)
            if block is None:
                return
            yield block

    def _run(self) -> None:
        try:
            self._worker(self._take())
        except BaseException as error:  # noqa: BLE001 - carried to the thread that asks, which raises it
            self._fault = self._fault or error
            self._stopped = True
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            self._finish()


# --- the three ways. Each returns one uint8 tensor a file, and the crew that is still to be started, if any


_Loaded = tuple[list[Tensor], _Crew | None]


def _load_mapped(opened: Sequence[_Opened], device: torch.device, threads: int, check: bool, pinned: bool) -> _Loaded:
    """Views of the files themselves. Behind them the crew pulls the files into the page cache and verifies them."""
    try:
        # Readable only: a writable map counts as data and may be refused where memory is limited or not overcommitted.
        memories = [mmap.mmap(o.descriptor, o.record.bytes, mmap.MAP_PRIVATE, mmap.PROT_READ) for o in opened]
    except (OSError, ValueError) as error:  # ValueError: the file is shorter now
        raise CheckpointError(f"{opened[0].record.path.parent}: cannot be mapped: {error}") from error

    flats, views = [_flat(memory) for memory in memories], [memoryview(memory) for memory in memories]

    def worker(blocks: Iterator[_Block]) -> None:
        scratch = memoryview(bytearray(PIECE_BYTES))
        for block in blocks:
            if not _populated(flats[block.file], block):
                _read(block, scratch, check)  # also says what is wrong
            elif check:
                _verify(block, xxhash.xxh3_128_hexdigest(views[block.file][block.offset :][: block.bytes]))

    return flats, _Crew(worker, _blocks(opened), threads)


def _load_eager(opened: Sequence[_Opened], device: torch.device, threads: int, check: bool, pinned: bool) -> _Loaded:
    """Private memory, of huge pages where there are any: to touch new memory page by page costs more than the read."""
    needed = sum(o.record.bytes for o in opened)
    available = _available_memory()
    if needed > available:
        raise CheckpointError(
            f"{opened[0].record.path.parent}: an eager load needs {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available; a mapped load needs none of it"
        )
    memories = [mmap.mmap(-1, o.record.bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for o in opened]
    for memory in memories:
        memory.madvise(mmap.MADV_HUGEPAGE)
    targets = [memoryview(memory) for memory in memories]

    def worker(blocks: Iterator[_Block]) -> None:
        for block in blocks:
            _read(block, targets[block.file][block.offset : block.offset + block.bytes], check)

    _Crew(worker, _blocks(opened), threads).run()
    return [_flat(memory) for memory in memories], None


def _load_staged(opened: Sequence[_Opened], device: torch.device, threads: int, check: bool, pinned: bool) -> _Loaded:
    """One allocation a file on the device, filled through a ring of slabs: while one is copied, others are read.

    A slab holds one block. It is taken from the ring, its last copy waited for, filled, verified, and its copy queued
    on a side stream. Never a copy to the device from a file mapping: on Ascend that can hang for ever.
    """
    module: ModuleType = getattr(torch, device.type)
    flats = _allocate(opened, device, module)
    stream = module.Stream(device)
    stream.wait_stream(
        module.current_stream(device)
    )  # the allocator may hand out memory that work in flight still uses
    pinned = pinned and torch.accelerator.is_available()
    blocks = _blocks(opened)
    ring: queue.SimpleQueue[_Slab] = queue.SimpleQueue()
    for _ in range(min(MAX_SLABS, threads + SLABS_IN_FLIGHT, len(blocks))):
        ring.put(_Slab(module))

    def copy(block: _Block, slab: _Slab) -> None:
        memory = slab.ready(pinned)[: block.bytes]
        _read(block, memory.numpy().data, check)
        flats[block.file][block.offset : block.offset + block.bytes].copy_(memory, non_blocking=True)
        slab.copied.record()

    def worker(blocks: Iterator[_Block]) -> None:
        with module.stream(stream):
            for block in blocks:
                slab = ring.get()  # there are at least as many slabs as threads
                try:
                    copy(block, slab)
                except RuntimeError as error:
                    path, reason = block.opened.record.path, str(error).splitlines()[0]
                    hint = "; it may help to load without pinned memory" if pinned else ""
                    raise CheckpointError(f"{path}: cannot be brought to {device}: {reason}{hint}") from error
                finally:
                    ring.put(slab)

    try:
        _Crew(worker, blocks, threads).run()
    finally:  # before slabs are freed and tensors are used
        copied = module.Event()
        copied.record(stream)
        copied.synchronize()
    return flats, None


class _Slab:
    """Host memory of one block and the event of its last copy. The first thread that needs the memory pins it."""

    def __init__(self, module: ModuleType) -> None:
        self.copied = module.Event()
        self._memory: Tensor | None = None

    def ready(self, pinned: bool) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned)
        else:
            self.copied.synchronize()
        return self._memory


def _allocate(opened: Sequence[_Opened], device: torch.device, module: ModuleType) -> list[Tensor]:
    """Return one uint8 tensor a file. Raises CheckpointError with what is needed and what is free."""
    try:
        return [torch.empty(o.record.bytes, dtype=torch.uint8, device=device) for o in opened]
    except RuntimeError as error:  # torch.OutOfMemoryError is one; some backends raise nothing finer
        needed = sum(o.record.bytes for o in opened)
        free = f"{module.mem_get_info(device)[0] / 1e9:.1f} GB" if hasattr(module, "mem_get_info") else "less"
        reason = str(error).splitlines()[0]
        folder = opened[0].record.path.parent
        raise CheckpointError(
            f"{folder}: the weights need {needed / 1e9:.1f} GB on {device}, {free} is free ({reason})"
        ) from error


def _flat(memory: mmap.mmap) -> Tensor:
    """Return the memory as a tensor, which keeps it mapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes into weights
        return torch.frombuffer(memory, dtype=torch.uint8)


def _available_memory() -> float:
    """Return the bytes that can be allocated without swapping, infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), float("inf"))
