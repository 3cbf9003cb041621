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
| staged | a device tensor each                 | before the load returns| before its block goes to the device  |

A staged tensor owns its memory: torch_npu casts a weight to another format by the sizes with which its memory was
allocated, and its operators are found again by where in its memory a tensor starts, so that the layers of a network
share what is prepared once only if all start at 0. Sources: FormatCastKernelNpu.cpp of Ascend/pytorch v2.9.0,
op_api_common.h of Ascend/op-plugin 7.3.0 (add_param_to_buf).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import itemgetter
from types import ModuleType, TracebackType
from typing import Literal

import torch
import xxhash
from torch import Tensor

from covo_npu.kernels.device import release_pinned
from covo_npu.kernels.errors import first_line
from covo_npu.kernels.topology import near_cpus
from covo_npu.runtime.checkpoint.blocks import (
    PIECE_BYTES,
    Block,
    Crew,
    Opened,
    all_blocks,
    find_record,
    open_file,
    read_block,
    verify,
)
from covo_npu.runtime.checkpoint.format import BLOCK_BYTES, RETIRED, CheckpointError, FileRecord, Manifest
from covo_npu.runtime.checkpoint.memory import available_memory_bytes

Mode = Literal["mmap", "eager", "staged"]

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
    "I8": torch.int8,
}


_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class ReadReport:
    """How a load went. `seconds` ends when the tensors can be used; a mapped load goes on reading behind it."""

    mode: Mode
    device: str
    bytes: int
    seconds: float
    threads: int
    checked: bool


class Weights:
    """The tensors of a load by file and name, as stored. A context manager: leaving it stops what still reads.

    Guarantee: once `wait()` has returned, every byte of the files in question has been compared with the manifest.
    Whoever calls it before the first result leaves the program knows that nothing damaged has spoken. With check=False
    `wait()` only waits. The files of a mapped load must not be written while they are in use; replace them by renaming.
    """

    def __init__(self, files: dict[str, dict[str, Tensor]], report: ReadReport, crew: Crew | None = None) -> None:
        self.files = files
        self.report = report
        self._crew, self._read = crew, tuple(files)  # the files that the crew reads, as it counts them

    def beside(self, other: Weights) -> Weights:
        """Return the weights of two loads as those of one. At most one of them still reads: that onto the CPU."""
        reading = self if self._crew else other
        seconds = self.report.seconds + other.report.seconds
        size = self.report.bytes + other.report.bytes
        both = Weights(self.files | other.files, replace(reading.report, bytes=size, seconds=seconds), reading._crew)
        both._read = reading._read
        return both

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all files by name."""
        return {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}

    def wait(self, *files: str) -> None:
        """Return when all bytes of some files, by default of all, have been read and verified.

        Raises CheckpointError for damage, or for a file that cannot be read.
        """
        if self._crew:
            self._crew.wait([number for number, name in enumerate(self._read) if name in (files or self._read)])

    def release(self, *files: str) -> None:
        """Forget the tensors of some files: from here on they live as long as somebody else holds them."""
        for name in files:
            self.files[name] = {}

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
) -> Weights:
    """Return all tensors of the named safetensors files on the device, in the dtypes of the files, but the RETIRED.

    files: in the order of use. mode: on the CPU mmap or eager ("staged", the way to a device, is there for tests); on
    any other device mmap means staged, and eager is refused. check: compare each block with the manifest. Raises
    CheckpointError if a file is damaged or cannot be read, or if memory runs out; no thread or memory is left.
    """
    begin = time.monotonic()
    if device.type != "cpu":
        if mode == "eager":
            raise CheckpointError(
                f"{manifest.folder}: an eager load is one into the memory of the CPU; for {device} leave out --load"
            )
        mode = "staged"
    records = [find_record(manifest, name) for name in files]
    threads = min(MAX_THREADS, max(2, len(os.sched_getaffinity(0))))
    with ExitStack() as stack:
        opened = [Opened(record, open_file(stack, record)) for record in records]
        crew = None
        if mode == "mmap":
            tensors, crew = _load_mapped(opened, threads, check)
            crew.start(stack.pop_all().close)
        elif mode == "eager":
            tensors = _load_eager(opened, threads, check)
        else:
            tensors = _load_staged(opened, device, threads, check)
    by_file = {record.name: of_file for record, of_file in zip(records, tensors, strict=True)}
    size = sum(record.bytes for record in records)
    return Weights(by_file, ReadReport(mode, str(device), size, time.monotonic() - begin, threads, check), crew)


# --- the three ways. Each returns the tensors of each file by name

Tensors = dict[str, Tensor]


def _load_mapped(opened: Sequence[Opened], threads: int, check: bool) -> tuple[list[Tensors], Crew]:
    """Views of the files themselves, and the crew that pulls them into the page cache and verifies them: start it."""
    try:
        # Readable only: a writable map counts as data and may be refused where memory is limited or not overcommitted.
        memories = [mmap.mmap(o.descriptor, o.record.bytes, mmap.MAP_PRIVATE, mmap.PROT_READ) for o in opened]
    except (OSError, ValueError) as error:  # ValueError: the file is shorter now
        raise CheckpointError(f"{opened[0].record.path.parent}: cannot be mapped: {error}") from error

    for memory in memories:
        _ask_for_huge_pages(memory)
    flats, views = [_flat(memory) for memory in memories], [memoryview(memory) for memory in memories]

    def worker(blocks: Iterator[Block]) -> None:
        scratch = memoryview(bytearray(PIECE_BYTES))
        for block in blocks:
            if not _populated(flats[block.file], block):
                read_block(block, scratch, check)  # also says what is wrong
            elif check:
                verify(block, xxhash.xxh3_128_hexdigest(views[block.file][block.offset :][: block.bytes]))

    return _views(opened, flats), Crew(worker, all_blocks(opened), threads)


def _load_eager(opened: Sequence[Opened], threads: int, check: bool) -> list[Tensors]:
    """Private memory, of huge pages where there are any: to touch new memory page by page costs more than the read."""
    needed = sum(o.record.bytes for o in opened)
    available = available_memory_bytes()
    if needed > available:
        raise CheckpointError(
            f"{opened[0].record.path.parent}: an eager load needs {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available; a mapped load needs none of it"
        )
    memories = [mmap.mmap(-1, o.record.bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for o in opened]
    for memory in memories:
        _ask_for_huge_pages(memory)
    targets = [memoryview(memory) for memory in memories]

    def worker(blocks: Iterator[Block]) -> None:
        for block in blocks:
            read_block(block, targets[block.file][block.offset : block.offset + block.bytes], check)

    Crew(worker, all_blocks(opened), threads).run()
    return _views(opened, [_flat(memory) for memory in memories])


def _load_staged(opened: Sequence[Opened], device: torch.device, threads: int, check: bool) -> list[Tensors]:
    """One allocation a tensor on the device, filled through a ring of slabs: while one is copied, others are read.

    A slab holds one block. It is taken from the ring, its last copy waited for, filled, verified, and the copies of its
    parts to their tensors queued on a side stream. Never a copy to the device from a file mapping: on Ascend that can
    hang for ever.
    """
    module: ModuleType = getattr(torch, device.type)
    tensors = _allocate(opened, device, module)
    targets = [_Targets(o.record, of_file) for o, of_file in zip(opened, tensors, strict=True)]
    stream = module.Stream(device)
    stream.wait_stream(
        module.current_stream(device)
    )  # the allocator may hand out memory that work in flight still uses
    pinned = torch.accelerator.is_available()
    blocks, cpus = all_blocks(opened), near_cpus(device)
    ring: queue.SimpleQueue[_Slab] = queue.SimpleQueue()
    for _ in range(min(MAX_SLABS, threads + SLABS_IN_FLIGHT, len(blocks))):
        ring.put(_Slab(module))

    def copy(block: Block, slab: _Slab) -> None:
        memory = slab.ready(pinned)[: block.bytes]
        read_block(block, memory.numpy().data, check)
        for target, part in targets[block.file].parts(block, memory):
            target.copy_(part, non_blocking=True)
        slab.copied.record()

    def worker(blocks: Iterator[Block]) -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)  # of this thread: what it reads into lies beside the device then
        module.set_device(device)  # a new thread has device 0: the first use of a stream would open a context there
        with module.stream(stream):
            for block in blocks:
                slab = ring.get()  # there are at least as many slabs as threads
                try:
                    copy(block, slab)
                except RuntimeError as error:
                    path, reason = block.opened.record.path, first_line(error)
                    hint = "; staging takes page-locked memory: what does `ulimit -l` allow?" if pinned else ""
                    raise CheckpointError(f"{path}: cannot be brought to {device}: {reason}{hint}") from error
                finally:
                    ring.put(slab)

    try:
        Crew(worker, blocks, threads).run()
    finally:  # before slabs are freed and tensors are used
        copied = module.Event()
        copied.record(stream)
        copied.synchronize()
        while not ring.empty():
            ring.get()
        release_pinned(device)
    return tensors


class _Targets:
    """The tensors of one file on a device as bytes, by where they lie in the file."""

    def __init__(self, record: FileRecord, tensors: Tensors) -> None:
        filled = [(record.tensors[name].offset, tensor) for name, tensor in tensors.items() if tensor.numel()]
        placed = sorted(filled, key=itemgetter(0))
        self._starts = [offset for offset, _ in placed]
        self._bytes = [tensor.view(-1).view(torch.uint8) for _, tensor in placed]

    def parts(self, block: Block, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (bytes of a tensor, the same in the block's memory) for all that the block holds of tensors."""
        start, end = block.offset, block.offset + block.bytes
        first = max(0, bisect_right(self._starts, start) - 1)
        for offset, target in zip(self._starts[first:], self._bytes[first:], strict=True):
            if offset >= end:
                return
            low, high = max(start, offset), min(end, offset + target.numel())
            if low < high:
                yield target[low - offset : high - offset], memory[low - start : high - start]


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


def _allocate(opened: Sequence[Opened], device: torch.device, module: ModuleType) -> list[Tensors]:
    """Return tensors to be filled. Raises CheckpointError with what is needed and what is free."""
    try:
        return [
            {
                name: torch.empty(t.shape, dtype=DTYPES[t.dtype], device=device)
                for name, t in o.record.tensors.items()
                if name not in RETIRED
            }
            for o in opened
        ]
    except RuntimeError as error:  # torch.OutOfMemoryError is one; some backends raise nothing finer
        needed = sum(o.record.bytes for o in opened)
        free = f"{module.mem_get_info(device)[0] / 1e9:.1f} GB" if hasattr(module, "mem_get_info") else "less"
        reason = first_line(error)
        folder = opened[0].record.path.parent
        raise CheckpointError(
            f"{folder}: the weights need {needed / 1e9:.1f} GB on {device}, {free} is free ({reason})"
        ) from error


def _views(opened: Sequence[Opened], flats: Sequence[Tensor]) -> list[Tensors]:
    """Return the tensors of each file as views of its bytes."""
    return [
        {
            name: flat[t.offset : t.offset + t.bytes].view(DTYPES[t.dtype]).view(t.shape)
            for name, t in o.record.tensors.items()
            if name not in RETIRED
        }
        for o, flat in zip(opened, flats, strict=True)
    ]


def _populated(flat: Tensor, block: Block) -> bool:
    """Bring a block of a mapped file into memory and into the page table; False if that cannot be done here."""
    address = ctypes.c_void_p(flat.data_ptr() + block.offset)
    return bool(_libc.madvise(address, ctypes.c_size_t(block.bytes), MADV_POPULATE_READ) == 0)


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    """Let the memory come in huge pages where there are any: in files those of xfs, and of ext4 from Linux 6.16 on.

    A token reads every weight; the page tables of 4 KiB pages for them are more than a cache holds.
    """
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)


def _flat(memory: mmap.mmap) -> Tensor:
    """Return the memory as a tensor, which keeps it mapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes into weights
        return torch.frombuffer(memory, dtype=torch.uint8)
