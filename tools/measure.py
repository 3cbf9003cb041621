"""Measuring: what the machine is and can do, and what a process of its own takes in time and memory.

Times are seconds, sizes bytes, rates bytes or operations a second. Moments are CLOCK_MONOTONIC, which all processes of
a machine share: a child reports moments, its parent subtracts the moment it started the child.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from covo_npu.kernels.errors import CovoError

if TYPE_CHECKING:
    import torch

PACKAGES = ("covo-npu", "torch", "torch_npu", "transformers", "safetensors", "numpy")
SLAB_BYTES = 16 * 2**20
SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()  # the working folder must not shadow packages


class MeasurementError(CovoError):
    """A measured process failed."""


# --- the machine


def machine_report(device: str = "cpu") -> dict[str, Any]:
    """Return what a reader needs to judge a figure: processor, cores, memory, kernel, versions, device."""
    return {
        "processor": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "device": _device_name(device),
    }


def machine_line(report: Mapping[str, Any]) -> str:
    """Return machine_report() as one line for a table's foot."""
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    host = f"{report['processor']}, {report['cores']} cores, {report['memory_bytes'] / 2**30:.0f} GiB"
    return f"{report['device']} | {host} | {report['system']} | {packages}"


def _line(path: str, key: str) -> str:
    """Return what stands after `key:` in a file of /proc, "" if it is absent."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)), "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    kind = torch.device(device).type
    named = getattr(getattr(torch, kind, None), "get_device_name", None)
    return f"{device} ({named(device)})" if named else device


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


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, columns padded to be read as plain text too."""
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    ruler = "|".join("-" * (width + 2) for width in widths)
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    return "\n".join([text[0], f"|{ruler}|", *text[1:]])


def write_json(path: str | Path, report: object) -> None:
    """Write a report as JSON; dataclasses become objects."""
    text = json.dumps(
        report, indent=1, default=lambda value: asdict(value) if isinstance(value, Spread) else str(value)
    )
    Path(path).write_text(text + "\n", "utf-8")


def best(measure: Callable[[], float], runs: int = 3) -> float:
    """Return the highest of some rates: what a floor is about."""
    return max(measure() for _ in range(runs))


# --- a process of its own


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
        self.resident = max(self.resident, _kib(_line(self._status, "VmHWM")))
        self.anonymous = max(self.anonymous, _kib(_line(self._status, "RssAnon")))


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024 if text else 0


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
    command = [sys.executable, *SAFE_PATH, "-m", module, *arguments]
    started, processor_s = time.monotonic(), _children_processor_s()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
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
    return best(lambda: _rate(lambda: target.copy_(source), size, "cpu"), 5)


def pinned_copy_bandwidth(device: str, size: int = 2**28) -> float:
    """Return the bytes copied a second from pinned host memory to the device."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return best(lambda: _rate(lambda: target.copy_(source, non_blocking=True), size, device), 5)


def matrix_rate(dtype: torch.dtype, device: str = "cpu", size: int = 2048) -> float:
    """Return the floating-point operations a second of a square matrix product."""
    import torch

    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return best(lambda: _rate(lambda: left @ right, 2 * size**3, device), 5)


def vector_bandwidth(dtype: torch.dtype, device: str = "cpu", rows: int = 18944, columns: int = 3584) -> float:
    """Return the bytes of weights read a second by a matrix-vector product: the floor of one decoded token."""
    import torch

    weights = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(4)]  # more than the caches hold
    vector = torch.randn(1, columns, device=device).to(dtype)

    def all_weights() -> None:
        for weight in weights:
            torch.nn.functional.linear(vector, weight)

    return best(lambda: _rate(all_weights, sum(w.nbytes for w in weights), device), 5)


def synchronize(device: str) -> None:
    """Wait until the device has done all it was given; the CPU always has."""
    import torch

    wait = getattr(getattr(torch, torch.device(device).type, None), "synchronize", None)
    if wait:
        wait()


def _rate(work: Callable[[], object], amount: int, device: str) -> float:
    synchronize(device)
    begin = time.monotonic()
    work()
    synchronize(device)
    return amount / (time.monotonic() - begin)
