"""Measuring: what the machine can do, and what a piece of work or a process of its own takes in time and memory.

Times are seconds, sizes bytes, rates bytes or operations a second. Moments are CLOCK_MONOTONIC, which all processes of
a machine share: a child reports moments, its parent subtracts the moment it started the child.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from covo_npu.kernels.errors import CovoError
from covo_npu.runtime.process import module_command
from covo_npu.tools.report import proc_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SLAB_BYTES = 16 * 2**20


class MeasurementError(CovoError):
    """A measured process failed."""


# --- figures


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of some runs."""

    median: float
    low: float
    high: float
    runs: int


def spread(values: Iterable[float]) -> Spread:
    """Return the median and the range of at least one value."""
    found = list(values)
    return Spread(statistics.median(found), min(found), max(found), len(found))


def interleaved(rows: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[Any]]:
    """Return the results of each row's runs, the rows taken in turn so that a drift of the machine meets all alike."""
    results: dict[str, list[Any]] = {name: [] for name in rows}
    for _ in range(runs):
        for name, measure in rows.items():
            results[name].append(measure())
    return results


def best(measure: Callable[[], float], runs: int = 3) -> float:
    """Return the highest of some rates: what a floor is about."""
    return max(measure() for _ in range(runs))


# --- memory


class PeakMemory:
    """Samples a process while it runs: `resident` and `anonymous` are the peaks so far, in bytes.

    Anonymous memory is what the process cannot give back without swap; pages of mapped files are not in it. The peak of
    resident memory is the kernel's own, that of anonymous memory is sampled and may miss spikes below the interval.
    """

    def __init__(self, pid: int | None = None, interval_s: float = 0.02) -> None:
        self.resident = 0
        self.anonymous = 0
        self._status = f"/proc/{pid or os.getpid()}/status"
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._read()

    def _read(self) -> None:
        self.resident = max(self.resident, _kib(proc_line(self._status, "VmHWM")))
        self.anonymous = max(self.anonymous, _kib(proc_line(self._status, "RssAnon")))


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024 if text else 0


class Peak:
    """Peak memory of a block on a device, in bytes: anonymous memory of the process, or memory of the accelerator.

    bytes: at most; grown: above what was in use at the start of the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = self.grown = 0
        self._module, self._device = accelerator(device), device
        self._process = PeakMemory()

    def __enter__(self) -> Peak:
        if self._module:
            self._module.reset_peak_memory_stats(self._device)
            self._before = self._module.memory_allocated(self._device)
        self._process.__enter__()
        if not self._module:
            self._before = self._process.anonymous
        return self

    def __exit__(self, *exception: Any) -> None:
        self._process.__exit__(*exception)
        self.bytes = self._module.max_memory_allocated(self._device) if self._module else self._process.anonymous
        self.grown = max(0, self.bytes - self._before)


# --- a process of its own


@dataclass(frozen=True, slots=True)
class Measured:
    """What a process of its own reported and took. `report` is the JSON object on the last line of its stdout."""

    started: float  # CLOCK_MONOTONIC, just before the start of the process
    report: dict[str, Any]
    processor_s: float  # of all its threads: what is left of a figure when other work disturbs the machine
    peak_resident: int
    peak_anonymous: int


def in_own_process(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Measured:
    """Return what `python -m module arguments` measured. Its stderr goes to ours.

    Raises MeasurementError if it fails or ends without a JSON object.
    """
    command, variables = module_command(module, *arguments), {**os.environ, **(environment or {})}
    started, processor_s = time.monotonic(), _children_processor_s()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        with PeakMemory(process.pid) as memory:
            output, _ = process.communicate()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise MeasurementError(f"{module} {' '.join(arguments)}: failed with exit code {process.returncode}")
    try:
        report = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise MeasurementError(f"{module}: expected a JSON object on its last line, found {output[-200:]!r}") from error
    return Measured(started, report, _children_processor_s() - processor_s, memory.resident, memory.anonymous)


def _children_processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- files and the page cache


def drop_page_cache(path: str | Path) -> None:
    """Drop a file, or all files below a folder, from the page cache. Needs no privilege; mapped pages stay."""
    for file in _files(Path(path)):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages are never dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fill_page_cache(path: str | Path, threads: int = 0) -> float:
    """Return the rate at which a file, or all files below a folder, were read through the page cache."""
    files = _files(Path(path))
    begin = time.monotonic()
    for file in files:
        _read_all(file, threads or _threads())
    return sum(file.stat().st_size for file in files) / (time.monotonic() - begin)


def disk_bandwidth(path: str | Path) -> float:
    """Return the rate of one cold read of the files, in parallel. Drops them from the page cache first."""
    drop_page_cache(path)
    return fill_page_cache(path, max(4, _threads()))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _read_all(file: Path, threads: int) -> None:
    """Read a file into one small buffer a thread: the page cache's own speed, no first touch of new memory."""
    size = file.stat().st_size
    descriptor = os.open(file, os.O_RDONLY)

    def read(start: int) -> None:
        buffer = bytearray(2**20)
        for offset in range(start * SLAB_BYTES, size, threads * SLAB_BYTES):
            for inner in range(offset, min(offset + SLAB_BYTES, size), len(buffer)):
                os.preadv(descriptor, [buffer], inner)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
    finally:
        os.close(descriptor)


# --- floors: what the machine can do


def memory_copy_bandwidth(size: int = 2**28) -> float:
    """Return the bytes copied a second from memory to memory by all threads of torch, both sides touched before."""
    import torch

    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return rate(lambda: target.copy_(source), size, torch.device("cpu"))


def pinned_copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Return the bytes copied a second from pinned host memory to the device."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return rate(lambda: target.copy_(source, non_blocking=True), size, device)


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Return the operations a second of a square matrix product; in float32 where a CPU has none for the dtype."""
    import torch

    from covo_npu.kernels.native import product_dtype

    dtype = product_dtype(dtype, device)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return rate(lambda: left @ right, 2 * size**3, device)


def read_rate(weights: Sequence[Tensor], runs: int = 5) -> float:
    """Return the bytes of these tensors that their device reads a second: their extremes on a CPU, else a copy."""
    import torch

    size, device = sum(weight.nbytes for weight in weights), weights[0].device
    if device.type == "cpu":
        numbers = [weight.view(torch.int32) for weight in weights]
        return rate(lambda: [x.amax() for x in numbers], size, device, runs)
    targets = [torch.empty_like(weight) for weight in weights]
    return rate(lambda: [target.copy_(weight) for target, weight in zip(targets, weights)], 2 * size, device, runs)


def accelerator(device: torch.device) -> Any:
    """Return torch.cuda or torch.npu, None for the CPU."""
    import torch

    return None if device.type == "cpu" else getattr(torch, device.type)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return what one call takes, until the device has done it."""
    module = accelerator(device)
    if module:
        module.synchronize(device)
    begin = time.perf_counter()
    work()
    if module:
        module.synchronize(device)
    return time.perf_counter() - begin


def rate(work: Callable[[], object], amount: int, device: torch.device, runs: int = 5) -> float:
    """Return the best of some rates at which a piece of work does an amount."""
    return best(lambda: amount / seconds(work, device), runs)
