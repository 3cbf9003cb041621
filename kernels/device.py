"""Devices: opened once, what they are fast in, ids on their way back to the host, captured work.

Captured work: the device has seen it once and repeats it at one command, on CUDA and on NPU alike. What is captured
must take everything that changes from tensors at fixed places, and must not wait for the device.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from covo_npu.kernels.errors import BackendError, first_line

Work = Callable[[], None]


class Capture(Protocol):
    """Makes of work a function that repeats it on the same tensors. required: there is no going on without it."""

    required: bool

    def __call__(self, work: Work) -> Work: ...


GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}  # device: class of its graphs in torch.<device>
# Settings of the environment under which a device captures nothing. Source of the first: NPUGraph.cpp, capture_begin
# (Ascend/pytorch v2.9.0); under the second every launch waits, which a capture does not allow.
FORBIDS_CAPTURE = {"npu": {"TASK_QUEUE_ENABLE": "2", "ASCEND_LAUNCH_BLOCKING": "1"}}
DEVICE_NAME = re.compile(r"(cpu)|(?:(cuda|npu)(?::(\d+))?)")
CPU_INFO = Path("/proc/cpuinfo")
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's
log = logging.getLogger(__name__)


def open_device(name: str) -> torch.device:
    """Return the device cpu, cuda:N or npu:N, ready for use; auto is the first of npu:0, cuda:0 and cpu that is there.

    Raises BackendError that says what is missing.
    """
    if name == "auto":
        return _best_device()
    match = DEVICE_NAME.fullmatch(name)
    if not match:
        raise BackendError(f"unknown device {name!r}; expected auto, cpu, cuda:N or npu:N")
    index = int(match[3] or 0)
    if match[2] == "npu":
        return cast(torch.device, importlib.import_module("covo_npu.kernels.npu").open_device(index))
    if match[2] == "cuda":
        if index >= torch.cuda.device_count():
            raise BackendError(
                f"device {name} is not there: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda", index)
    return torch.device("cpu")


def rank_device(name: str, rank: int) -> torch.device:
    """Return the device of a rank of this machine, ready for use: so many behind `name`. A CPU serves all of them."""
    if rank == 0:
        return open_device(name)
    if name == "auto":  # rank 0 chooses in the same order, but passes over an NPU that cannot be used: name the device
        name = "npu" if importlib.util.find_spec("torch_npu") else "cuda" if torch.cuda.device_count() else "cpu"
    kind, _, index = name.partition(":")
    return open_device(kind if kind == "cpu" else f"{kind}:{int(index or 0) + rank}")


def _best_device() -> torch.device:
    if importlib.util.find_spec("torch_npu"):
        try:
            return open_device("npu:0")
        except BackendError as error:
            log.warning("torch_npu is installed but no NPU can be used: %s", error)
    return open_device("cuda:0" if torch.cuda.device_count() else "cpu")


def accelerator(device: torch.device) -> Any:
    """Return the module of an accelerator's streams, events and memory: torch.cuda or torch.npu."""
    return getattr(torch, device.type)


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it faster than float32, else float32.

    A CPU does if it has instructions for it; where the system does not list them (/proc/cpuinfo), float32 is assumed.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.bfloat16
    try:
        words = set(CPU_INFO.read_text("utf-8").split())
    except OSError:
        return torch.float32
    return torch.bfloat16 if words & BF16_INSTRUCTIONS else torch.float32


def release_pinned(device: torch.device) -> None:
    """Give page-locked memory that nothing uses any more back to the system, where the device's library keeps it."""
    release = {
        "cuda": getattr(torch._C, "_host_emptyCache", None),
        "npu": getattr(getattr(torch, "npu", None), "host_empty_cache", None),
    }.get(device.type)
    if release is not None:
        release()


class Readback:
    """Ids on their way to the host. Made when they are enqueued; reading waits for them, not for what came after."""

    def __init__(self, ids: Tensor) -> None:
        self._event: Any = None
        if ids.device.type == "cpu":
            self._ids = ids.clone()  # the next step writes there
        else:
            self._ids = ids.to("cpu", non_blocking=True)
            module = accelerator(ids.device)
            self._event = module.Event()
            self._event.record(module.current_stream(ids.device))  # a thread's own device may be another

    def tokens(self) -> list[int]:
        """Return the ids."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._ids.tolist()
        return tokens


@dataclass(slots=True)
class CaptureReport:
    """What capturing has cost so far."""

    graphs: int = 0
    seconds: float = 0.0
    bytes: int = 0  # of device memory that was reserved meanwhile


# A capture begins with a wait for the whole device, which no stream that is captured allows: one at a time, of all.
_CAPTURING = threading.Lock()


class DeviceCapture:
    """Captures work on one device; all its graphs share one memory pool, so none may run beside another. A Capture."""

    def __init__(self, device: torch.device, required: bool = True) -> None:
        self.required = required
        self.report = CaptureReport()
        self._device, self._module = device, accelerator(device)
        self._graph_class: Any = getattr(self._module, GRAPHS[device.type])
        self._pool = self._module.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Return the replay of `work`. Runs it once before, on a side stream: libraries set themselves up then.

        Raises BackendError if the device cannot capture it.
        """
        with _CAPTURING, self._module.device(self._device):  # a new thread's own device is the first one
            return self._captured(work)

    def _captured(self, work: Work) -> Work:
        module, graph = self._module, self._graph_class()
        started, reserved = time.perf_counter(), module.memory_reserved()
        side = module.Stream()
        side.wait_stream(module.current_stream())
        with module.stream(side):
            work()
        module.current_stream().wait_stream(side)
        try:
            # thread_local: what other threads do meanwhile, for instance speech, is none of this capture's.
            with module.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
            module.synchronize()
        except RuntimeError as error:
            # Ending a capture that has failed raises an error of its own; what went wrong stands behind it.
            reason = first_line(error.__context__ or error)
            raise BackendError(
                f"{module.__name__.rpartition('.')[2]}: work could not be captured as a graph ({reason}): start "
                "again with --graph off, and please report it"
            ) from error
        self.report.graphs += 1
        self.report.seconds += time.perf_counter() - started
        self.report.bytes += module.memory_reserved() - reserved
        replay: Work = graph.replay
        return replay


class Turns:
    """Turns at tensors with fixed places: one caller at a time, on the host and, whatever its stream, on the device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: Any = None  # the event after the last turn

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Have a turn: what is enqueued inside, on the device's current stream, follows what the last turn enqueued."""
        with self._lock:
            if device.type == "cpu":
                yield
                return
            module = accelerator(device)
            stream = module.current_stream(device)
            if self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done = module.Event()
                self._done.record(stream)


class Replayed:
    """A function of one tensor of one shape that is captured at its first call. Safe to be called from many threads."""

    def __init__(self, function: Callable[[Tensor], Tensor], capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._turns = Turns()
        self._replay: Work | None = None
        self._input: Tensor
        self._output: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return a copy of what the function gives."""
        with self._turns.on(x.device):
            if self._replay is None:
                self._input = x.clone()
                self._replay = self._capture(self._work)
            self._input.copy_(x)
            self._replay()
            return self._output.clone()

    def _work(self) -> None:
        self._output = self._function(self._input)


def device_capture(choice: str, device: torch.device) -> DeviceCapture | None:
    """Return how work is captured, or None for none. choice: auto, on or off; auto captures where it can be done.

    Raises BackendError if graphs are asked for on a device that has none, or under settings that forbid them.
    """
    if choice not in ("auto", "on", "off"):
        raise BackendError(f"graph must be auto, on or off, found {choice!r}")
    forbidden = [
        f"{name}={value}"
        for name, value in FORBIDS_CAPTURE.get(device.type, {}).items()
        if os.environ.get(name) == value
    ]
    if choice == "on" and device.type not in GRAPHS:
        raise BackendError(f"device {device} has no graphs to capture; there are those of {', '.join(GRAPHS)}")
    if choice == "on" and forbidden:
        raise BackendError(f"device {device} captures no graphs under {', '.join(forbidden)}: unset it, or --graph off")
    if choice == "off" or device.type not in GRAPHS:
        return None
    if forbidden:
        log.warning("%s: nothing is captured under %s; steps are launched one by one", device, ", ".join(forbidden))
        return None
    return DeviceCapture(device, required=choice == "on")
